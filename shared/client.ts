import type { ErrorCode } from './errors.ts';
import type {
  ChatPayload,
  ClientFrame,
  ClientFrameOf,
  FinishReason,
  LogFrame,
  ServerFrame,
  ServerFrameOf,
  Usage,
} from './protocol.ts';

/**
 * The client, one file for browsers and Node, without a dependency at run time (browsers get it with the types
 * stripped, so every import here is type-only).
 *
 *     const client = createClient({ url: 'ws://127.0.0.1:8080/ws', userId: 20001 });
 *     for await (const text of client.chat('Hello')) process.stdout.write(text);
 *     await client.close();
 *
 * **Connection**: idle → connecting → ready ⇄ waiting (backoff) → closed. `connect()` or the first request opens
 * it. Lost connections are opened again for ever, with jittered exponential backoff, on the next URL where there
 * are several; close codes 4500–4999 and `close()` are final. A server that stays silent after a heartbeat counts
 * as lost.
 *
 * **Answers**: every open one is picked up again after a reconnect, from the last id seen. Ids decide: not above
 * the last one = a double, dropped; next in line = taken; a hole = the log is read again by `resume`. A request
 * that the server does not know is submitted again under the same messageId, which never asks twice.
 *
 * **In line**: a gateway keeps 64 frames of one client waiting and refuses more. So at most 32 frames wait for their
 * replies, open answers and new questions first; the rest follows with the replies. What is refused as
 * `rate_limited` all the same is written again after the time that the server names.
 *
 * **Restarts**: `start` of a later attempt voids the text so far. `answer.text` is always the text of the current
 * attempt. An iterator cannot take back what it handed out, so it stays silent while the new attempt repeats that
 * text word for word (then nothing was lost), and otherwise goes on with the new attempt's whole text. Loops that
 * care use `answer.parts()`, which says `{ type: 'restart' }` at exactly that place; screens use the `restart`
 * event and show `answer.text`.
 *
 * **Leaving a loop** (`break`) does not stop the answer, as a lost connection does not: it goes on filling
 * `answer.text`. `answer.cancel()`, an aborted `signal`, or `cancelOnBreak: true` stop it.
 *
 * Cost: per open answer its text and request; per iterator what it has not read yet. A slow reader gets longer
 * pieces, never a longer queue.
 */

// ---------------------------------------------------------------------------------------------- what it offers

/** What the client needs of a WebSocket: the browser's own, or the `ws` package's. */
export interface WebSocketLike {
  readonly readyState: number;
  onopen: ((event: never) => void) | null;
  onmessage: ((event: never) => void) | null;
  onclose: ((event: never) => void) | null;
  onerror: ((event: never) => void) | null;
  send(data: string): void;
  close(code?: number, reason?: string): void;
  /** `ws` only: drops a connection that no longer answers. */
  terminate?(): void;
}
export type WebSocketConstructor = new (url: string) => WebSocketLike;

export interface ClientOptions {
  /** `ws://`, `wss://`, `http://` or `https://`; `/ws` is added where there is no path. Several: the next one is tried when one fails. */
  url: string | string[];
  userId: string | number;
  /** Sent in `init`, never in the URL. A function is asked before every connection. */
  token?: string | (() => string | Promise<string>);
  device?: string;
  /** Messages from people after this inbox id; later connections go on from the last one received. */
  inboxAfter?: string;
  /** Node 20 has none of its own; without this option the `ws` package is loaded there. */
  WebSocket?: WebSocketConstructor;
  /** First backoff, ms. Doubles with every round over all URLs. */
  reconnectBaseMs?: number;
  reconnectMaxMs?: number;
  /** From dialling to `ready`, ms. */
  connectTimeoutMs?: number;
  /** Answers that may be open at once. */
  maxOpenAnswers?: number;
}

export interface ChatOptions extends Omit<ChatPayload, 'contents'> {
  /** Chosen for you when absent. The same id again joins the existing answer. */
  messageId?: string;
  /** Aborting it cancels the answer. */
  signal?: AbortSignal;
  /** Leaving a `for await` early cancels the answer. Off by default. */
  cancelOnBreak?: boolean;
}

export interface ResumeOptions {
  /** The text up to `after`, when it was kept somewhere; otherwise `text` begins after that id. */
  text?: string;
  signal?: AbortSignal;
  cancelOnBreak?: boolean;
}

/** `sending` = not confirmed by the server yet. `failed` covers refusals too; `error.code` says which. */
export type AnswerStatus = 'sending' | 'queued' | 'running' | 'done' | 'cancelled' | 'failed';

export interface AnswerResult {
  messageId: string;
  status: 'done' | 'cancelled';
  text: string;
  finishReason: FinishReason;
  usage?: Usage;
  attempt: number;
}

/** `restart`: everything handed out so far is void; the text begins again. */
export type AnswerPart = { type: 'text'; text: string } | { type: 'restart'; attempt: number };

export interface Answer extends AsyncIterable<string> {
  readonly messageId: string;
  /** The text of the current attempt. */
  readonly text: string;
  readonly status: AnswerStatus;
  /** Requests ahead of it while it waits; null when not known or no longer waiting. */
  readonly position: number | null;
  readonly attempt: number;
  /** The id of the last frame taken, '' before the first: what a later `resume` can go on from. */
  readonly lastId: string;
  /** How often a later attempt began anew. */
  readonly restarts: number;
  /** The end. Rejects with a `ClientError` when it failed or was refused; need not be awaited. */
  readonly done: Promise<AnswerResult>;
  /** Stops the generation, now or as soon as there is a connection. The partial text stays. */
  cancel(): Promise<AnswerResult>;
  /** The texts, with the restarts between them. */
  parts(): AsyncIterableIterator<AnswerPart>;
}

export type ClientErrorCode = ErrorCode | 'closed' | 'timeout' | 'too_many_pending';

export class ClientError extends Error {
  readonly code: ClientErrorCode;
  /** The same request may succeed later. */
  readonly temporary: boolean;
  readonly retryAfterMs: number | undefined;
  readonly position: number | undefined;
  /** The WebSocket close code, where the connection was closed for good. */
  readonly closeCode: number | undefined;

  constructor(
    code: ClientErrorCode,
    message: string,
    details: { temporary?: boolean; retryAfterMs?: number; position?: number; closeCode?: number } = {},
  ) {
    super(message);
    this.name = 'ClientError';
    this.code = code;
    this.temporary = details.temporary ?? false;
    this.retryAfterMs = details.retryAfterMs;
    this.position = details.position;
    this.closeCode = details.closeCode;
  }
}

/** Frames by their type, as far as they were taken (no doubles), and what happens to the connection. */
export type ClientEvents = { [T in ServerFrame['type']]: ServerFrameOf<T> } & {
  /** A ready connection is gone, or (`final`) no other will be opened. */
  disconnected: { code: number; reason: string; final: boolean };
  reconnecting: { attempt: number; delayMs: number; url: string; code: number; reason: string };
  /** The text of this answer is void; a later attempt begins. */
  restart: { messageId: string; attempt: number };
  /** An answer has ended, in whatever way, also without a frame from the server. */
  ended: { messageId: string; status: 'done' | 'cancelled' | 'failed'; error?: ClientError };
};

export type Recipient = { user: string | number } | { group: string };

export interface Client {
  readonly state: 'idle' | 'connecting' | 'ready' | 'waiting' | 'closed';
  /** The server's `ready`, while connected. */
  readonly session: ServerFrameOf<'ready'> | null;
  /** The URL in use, or tried next. */
  readonly url: string;
  readonly answers: ReadonlyMap<string, Answer>;
  connect(options?: { timeoutMs?: number }): Promise<ServerFrameOf<'ready'>>;
  chat(contents: string, options?: ChatOptions): Answer;
  resume(messageId: string, after?: string, options?: ResumeOptions): Answer;
  cancel(messageId: string): void;
  /** Settles when the message is durable in the recipients' inboxes. Sent again after a reconnect. */
  send(to: Recipient, contents: string, options?: { messageId?: string }): Promise<ServerFrameOf<'sent'>>;
  ack(id: string): void;
  /** Settles when the server has answered; asked again after a reconnect. Rejects with `forbidden` where it may not be. */
  join(group: string): Promise<ServerFrameOf<'joined'>>;
  leave(group: string): Promise<ServerFrameOf<'left'>>;
  /** Who is in a group of this user's. */
  members(group: string): Promise<ServerFrameOf<'members'>>;
  /** The groups of this user. */
  groups(): Promise<string[]>;
  presence(
    userIds: (string | number)[],
    options?: { timeoutMs?: number },
  ): Promise<ServerFrameOf<'presence'>['online']>;
  /** Returns what removes the listener. */
  on<T extends keyof ClientEvents>(event: T, listener: (value: ClientEvents[T]) => void): () => void;
  /** Replaces the URLs; a ready connection stays. */
  setUrls(urls: string | string[]): void;
  /** The network is back, or the tab is visible again: reconnect now, or check that the connection lives. */
  wake(): void;
  /** Final. Open answers and sends are rejected with `closed`; on the server they go on. */
  close(): Promise<void>;
}

// ------------------------------------------------------------------------------------------------------ limits

const RECONNECT_BASE_MS = 300;
const RECONNECT_MAX_MS = 15_000;
const CONNECT_TIMEOUT_MS = 10_000;
const STABLE_MS = 5_000; // a connection this old starts the backoff anew; younger ones may be part of a loop
const SILENCE_MS = 10_000; // longest wait for the answer to a heartbeat
const WAKE_SILENCE_MS = 3_000;
const CLOSE_MS = 1_000; // for the closing handshake
const MAX_OPEN_ANSWERS = 48;
const MAX_PENDING = 256; // sends, presence queries, questions about groups
const MAX_KEPT = 16; // frames without a reply, kept while offline
const MAX_UNDER_WAY = 32; // frames without their reply; a gateway keeps 64 of one client in line
const MAX_RESUBMISSIONS = 3; // of one request that the server does not know (again)
const MAX_RETRIES = 8; // of one answer or send, refused for the moment
const ALL_SEEN_MS = 1_000; // an ended answer of which nothing more comes was asked for after its last frame
const REMEMBERED_MESSAGES = 2_048; // from people, to drop doubles
const PRESENCE_TIMEOUT_MS = 10_000;
const QUESTION_TIMEOUT_MS = 10_000; // from asking on a ready connection
/** Close codes that come with advice to wait: too many connections, replaced by a newer login. */
const PATIENCE_MS: Record<number, number> = { 4003: 2_000, 4010: 10_000 };

const MAX_PRESENCE = 100; // users in one query
const ID_PATTERN = /^[A-Za-z0-9._:@-]+$/;

// -------------------------------------------------------------------------------------------------- one answer

interface Id {
  attempt: number;
  seq: number;
}

function parseId(text: unknown): Id | null {
  const match = typeof text === 'string' ? /^(\d{1,15})-(\d{1,15})$/.exec(text) : null;
  return match ? { attempt: Number(match[1]), seq: Number(match[2]) } : null;
}

/** What an iterator has not handed out yet. */
interface Reader {
  pending: string;
  /** Handed out before a restart and not confirmed by the new attempt; null when there is no such doubt. */
  doubted: string | null;
  /** How much of `doubted` the new attempt has repeated. */
  repeated: number;
  /** The new attempt differs: say so before the next text. */
  restarted: boolean;
  wake: () => void;
}

/** One answer as seen from here. Takes frames and says what to do with them; sends nothing itself. */
class AnswerState {
  readonly messageId: string;
  /** Null for an answer that was only resumed: it cannot be submitted again. */
  readonly request: ClientFrameOf<'chat'> | null;
  text = '';
  status: AnswerStatus = 'sending';
  position: number | null = null;
  attempt = 0;
  restarts = 0;
  last: Id | null = null;
  /** Written to some connection, so the server may know of it. */
  sent = false;
  /** The server has shown that it knows of it. */
  known = false;
  cancelWanted = false;
  resubmissions = 0;
  retries = 0;
  error: ClientError | null = null;
  readonly done: Promise<AnswerResult>;
  readonly readers = new Set<Reader>();
  #settle!: { resolve: (result: AnswerResult) => void; reject: (error: ClientError) => void };
  /** Text before the first frame is not known here, so lengths cannot be compared. */
  #partial = false;
  /** Finished a while ago: replayed as start, one token, terminal, with a hole between the ids. */
  #compacted = false;
  /** The frame whose arrival showed a hole; the log is being read. */
  #healing = '';
  /** The same, after the log was read: if it comes again, the hole is in the log itself. */
  #healed = '';
  #readAgain = false;

  constructor(messageId: string, request: ClientFrameOf<'chat'> | null) {
    this.messageId = messageId;
    this.request = request;
    this.done = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    this.done.catch(() => {}); // nobody has to look at it
  }

  get ended(): boolean {
    return this.status === 'done' || this.status === 'cancelled' || this.status === 'failed';
  }

  get lastId(): string {
    return this.last ? `${this.last.attempt}-${this.last.seq}` : '';
  }

  /** Continues after an id seen in an earlier life, with the text of that time if it was kept. */
  continueAfter(after: Id, text: string | undefined): void {
    this.last = after;
    this.attempt = after.attempt;
    this.text = text ?? '';
    this.#partial = text === undefined;
  }

  /** What follows begins with `start`, under ids that may have been seen. */
  expectReplay(compacted = false): void {
    this.last = null;
    this.#compacted = compacted;
  }

  /** A new connection, or the answer to a `resume`: frames now come in the order of the log. */
  healed(): void {
    this.#healed = this.#healing;
    this.#healing = '';
  }

  connectionLost(): void {
    this.#healing = '';
  }

  /** `hole`: read the log after `lastId`. */
  take(frame: LogFrame): 'taken' | 'dropped' | 'hole' {
    const id = parseId(frame.id);
    if (this.ended || !id) return 'dropped';
    const { last } = this;
    if (last && (id.attempt - last.attempt || id.seq - last.seq) <= 0) return 'dropped';
    if (!this.#isNext(frame, id) && frame.id !== this.#healed) return this.#hole(frame.id);
    if (frame.type === 'done' && frame.length !== this.text.length && !this.#partial && !this.#readAgain) {
      // The ids were in line and yet the text is not the log's: read it from the beginning, once.
      this.#readAgain = true;
      this.last = null;
      return this.#hole(frame.id);
    }
    this.last = id;
    this.known = true;
    this.position = null;
    this.retries = 0;
    switch (frame.type) {
      case 'start':
        this.#restart(id.attempt);
        break;
      case 'token':
        this.status = 'running';
        this.text += frame.text;
        for (const reader of this.readers) readToken(reader, frame.text, this.text);
        break;
      case 'done':
        this.end({
          messageId: this.messageId,
          status: frame.finishReason === 'cancelled' ? 'cancelled' : 'done',
          text: this.text,
          finishReason: frame.finishReason,
          ...(frame.usage ? { usage: frame.usage } : {}),
          attempt: this.attempt,
        });
        break;
      case 'failed':
        this.fail(new ClientError(frame.code, frame.message, { temporary: frame.temporary }));
        break;
    }
    return 'taken';
  }

  end(result: AnswerResult): void {
    if (this.ended) return;
    this.status = result.status;
    this.position = null;
    for (const reader of this.readers) readEnd(reader, this.text);
    this.#settle.resolve(result);
  }

  /** Cancelled before the server knew of it. */
  endUnsent(): void {
    const { messageId, text, attempt } = this;
    this.end({ messageId, status: 'cancelled', text, finishReason: 'cancelled', attempt });
  }

  fail(error: ClientError): void {
    if (this.ended) return;
    this.status = 'failed';
    this.position = null;
    this.error = error;
    for (const reader of this.readers) reader.wake();
    this.#settle.reject(error);
  }

  async *read(onLeave: () => void): AsyncGenerator<AnswerPart, void, undefined> {
    const reader: Reader = {
      pending: this.text,
      doubted: null,
      repeated: 0,
      restarted: false,
      wake: () => {},
    };
    this.readers.add(reader);
    try {
      while (true) {
        if (reader.restarted) {
          reader.restarted = false;
          reader.doubted = null;
          yield { type: 'restart', attempt: this.attempt };
        } else if (reader.pending !== '') {
          const text = reader.pending;
          reader.pending = '';
          yield { type: 'text', text };
        } else if (this.error) {
          throw this.error;
        } else if (this.ended) {
          return;
        } else {
          await new Promise<void>((resolve) => {
            reader.wake = resolve;
          });
        }
      }
    } finally {
      this.readers.delete(reader);
      if (!this.ended) onLeave();
    }
  }

  #isNext(frame: LogFrame, id: Id): boolean {
    const { last } = this;
    if (frame.type === 'start') return true; // it voids whatever a hole before it held
    if (!last) return id.seq === 0 && frame.type === 'done'; // cancelled before an attempt began
    if (id.attempt === last.attempt) return this.#compacted || id.seq === last.seq + 1;
    // A cancel ends the attempt before it.
    return frame.type === 'done' && id.seq === 0 && id.attempt === last.attempt + 1;
  }

  #hole(frameId: string): 'dropped' | 'hole' {
    if (this.#healing) return 'dropped';
    this.#healing = frameId;
    return 'hole';
  }

  #restart(attempt: number): void {
    if (this.attempt !== 0 && attempt !== this.attempt) this.restarts++;
    this.attempt = attempt;
    this.status = 'running';
    for (const reader of this.readers) readRestart(reader, this.text);
    this.text = '';
    this.#partial = false;
  }
}

function readToken(reader: Reader, piece: string, text: string): void {
  if (reader.doubted === null || reader.restarted) {
    reader.pending += piece;
  } else {
    const overlap = Math.min(piece.length, reader.doubted.length - reader.repeated);
    if (!reader.doubted.startsWith(piece.slice(0, overlap), reader.repeated)) {
      reader.restarted = true;
      reader.pending = text;
    } else {
      reader.repeated += overlap;
      if (reader.repeated < reader.doubted.length) return;
      reader.doubted = null;
      reader.pending = piece.slice(overlap);
    }
  }
  reader.wake();
}

function readRestart(reader: Reader, text: string): void {
  const handedOut = reader.doubted ?? text.slice(0, text.length - reader.pending.length);
  reader.doubted = handedOut === '' ? null : handedOut;
  reader.repeated = 0;
  reader.restarted = false;
  reader.pending = '';
}

function readEnd(reader: Reader, text: string): void {
  if (reader.doubted !== null && !reader.restarted) {
    reader.restarted = true; // the last attempt is shorter than what was handed out
    reader.pending = text;
  }
  reader.wake();
}

// -------------------------------------------------------------------------------------------------- the client

interface PendingSend {
  frame: ClientFrameOf<'send'>;
  retries: number;
  resolve: (sent: ServerFrameOf<'sent'>) => void;
  reject: (error: ClientError) => void;
}

interface PendingPresence {
  frame: ClientFrameOf<'presence'>;
  resolve: (online: ServerFrameOf<'presence'>['online']) => void;
  reject: (error: ClientError) => void;
}

/** A question about groups. Answers come in the order of the questions, and errors name the kind of question. */
interface PendingQuestion {
  frame: ClientFrameOf<'join' | 'leave' | 'members' | 'groups'>;
  timer: ReturnType<typeof setTimeout> | undefined;
  resolve: (answer: never) => void;
  reject: (error: ClientError) => void;
}
const ANSWER_OF = { joined: 'join', left: 'leave', members: 'members', groups: 'groups' } as const;

export function createClient(options: ClientOptions): Client {
  const userId = String(options.userId);
  const baseMs = options.reconnectBaseMs ?? RECONNECT_BASE_MS;
  const maxMs = options.reconnectMaxMs ?? RECONNECT_MAX_MS;
  const connectTimeoutMs = options.connectTimeoutMs ?? CONNECT_TIMEOUT_MS;

  let urls = readUrls(options.url, userId);
  let urlIndex = 0;
  let state: Client['state'] = 'idle';
  let session: ServerFrameOf<'ready'> | null = null;
  let socket: WebSocketLike | null = null;
  /** Rises with every connection; what belongs to an older one is stale. */
  let connection = 0;
  /** Connections lost in a row without a stable one between them. */
  let failures = 0;
  let closeError: ClientError | null = null;
  /** Why the server says that it will close. */
  let lastError: ServerFrameOf<'error'> | null = null;
  let inboxAfter = options.inboxAfter;

  const timers = new Map<
    'dial' | 'retry' | 'beat' | 'silence' | 'stable' | 'pause',
    ReturnType<typeof setTimeout>
  >();
  let pausedUntil = 0;
  const resumeTimers = new Map<string, ReturnType<typeof setTimeout>>();
  const states = new Map<string, AnswerState>();
  const answers = new Map<string, Answer>();
  const sends = new Map<string, PendingSend>();
  const presences: PendingPresence[] = [];
  const questions: PendingQuestion[] = [];
  /** Answers of which the server is to be told. */
  const unasked = new Set<AnswerState>();
  /** Written to this connection, and without a reply. */
  const underWay = new Set<AnswerState | PendingSend | PendingPresence | PendingQuestion>();
  /** Small frames asked for while offline. */
  const outbox: ClientFrame[] = [];
  const seenMessages = new Set<string>();
  const listeners = new Map<string, Set<(value: never) => void>>();
  const connectWaiters = new Set<{
    resolve: (r: ServerFrameOf<'ready'>) => void;
    reject: (e: ClientError) => void;
  }>();

  // ------------------------------------------------------------------------------------------------- events

  function emit<T extends keyof ClientEvents>(event: T, value: ClientEvents[T]): void {
    for (const listener of [...(listeners.get(event) ?? [])]) {
      try {
        (listener as (value: ClientEvents[T]) => void)(value);
      } catch (error) {
        // A listener's mistake is its own: it surfaces as an uncaught error, as with EventTarget, and stops nothing here.
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }

  // --------------------------------------------------------------------------------------------- connection

  function setTimer(name: Parameters<typeof timers.get>[0], ms: number, run: () => void): void {
    clearTimeout(timers.get(name));
    timers.set(
      name,
      setTimeout(() => {
        timers.delete(name);
        run();
      }, ms),
    );
  }

  function clearTimers(): void {
    for (const timer of timers.values()) clearTimeout(timer);
    timers.clear();
    for (const timer of resumeTimers.values()) clearTimeout(timer);
    resumeTimers.clear();
  }

  function open(): void {
    if (state === 'closed') return;
    state = 'connecting';
    clearTimers();
    const mine = ++connection;
    setTimer('dial', connectTimeoutMs, () => lose(mine, 1006, 'no answer in time'));
    dial(mine).catch((error) =>
      lose(mine, 1006, error instanceof Error ? error.message : 'could not connect'),
    );
  }

  async function dial(mine: number): Promise<void> {
    const Constructor = await findWebSocket(options.WebSocket);
    const token = typeof options.token === 'function' ? await options.token() : options.token;
    if (mine !== connection) return;
    lastError = null;
    const opened = new Constructor(urls[urlIndex]!);
    socket = opened;
    opened.onopen = () => {
      write({
        type: 'init',
        userId,
        ...(token ? { token } : {}),
        ...(options.device ? { device: options.device } : {}),
        ...(inboxAfter ? { inboxAfter } : {}),
      });
    };
    opened.onmessage = (event: { data: unknown }) => {
      if (mine === connection) receive(event.data);
    };
    opened.onclose = (event: { code?: number; reason?: unknown }) =>
      lose(mine, event.code ?? 1006, String(event.reason ?? ''));
    opened.onerror = () => {}; // a close follows, and says more
  }

  function becomeReady(frame: ServerFrameOf<'ready'>): void {
    state = 'ready';
    session = frame;
    clearTimeout(timers.get('dial'));
    timers.delete('dial');
    setTimer('stable', STABLE_MS, () => {
      failures = 0;
    });
    scheduleHeartbeat();
    for (const answer of states.values()) unasked.add(answer);
    emit('ready', frame);
    for (const waiter of connectWaiters) waiter.resolve(frame);
    connectWaiters.clear();
    for (const frame of outbox.splice(0)) write(frame);
    advance();
  }

  /** Writes what waits, as far as the gateway has room for it in its line. */
  function advance(): void {
    if (state !== 'ready' || timers.has('pause')) return;
    for (const answer of unasked) {
      if (underWay.size >= MAX_UNDER_WAY) return;
      unasked.delete(answer);
      submit(answer);
    }
    if (underWay.size >= MAX_UNDER_WAY) return;
    for (const pending of [...questions, ...sends.values(), ...presences]) {
      if (underWay.has(pending)) continue;
      if ('contents' in pending.frame) {
        const refusal = refuseLength(pending.frame);
        if (refusal) {
          sends.delete(pending.frame.messageId);
          pending.reject(refusal);
          continue;
        }
      }
      underWay.add(pending);
      if ('timer' in pending) startTimer(pending);
      write(pending.frame);
      if (underWay.size >= MAX_UNDER_WAY) return;
    }
  }

  /** It has its reply, or none will come. */
  function settle(pending: AnswerState | PendingSend | PendingPresence | PendingQuestion): void {
    if (underWay.delete(pending)) advance();
  }

  /** The server takes nothing for a while. */
  function pause(retryAfterMs: number, retries: number): void {
    const until = Date.now() + retryDelayMs(retryAfterMs, retries);
    if (timers.has('pause') && until <= pausedUntil) return;
    pausedUntil = until;
    setTimer('pause', until - Date.now(), advance);
  }

  function retryDelayMs(retryAfterMs: number, retries: number): number {
    return Math.max(retryAfterMs, Math.min(maxMs, baseMs * 2 ** retries));
  }

  function scheduleHeartbeat(): void {
    const everyMs = session?.heartbeatMs;
    if (!everyMs || everyMs <= 0) return;
    setTimer('beat', everyMs, () => {
      heartbeat(Math.min(everyMs, SILENCE_MS));
      scheduleHeartbeat();
    });
  }

  /** Anything that arrives within the time shows that the server lives. */
  function heartbeat(withinMs: number): void {
    const mine = connection;
    write({ type: 'heartbeat' });
    if (!timers.has('silence')) setTimer('silence', withinMs, () => lose(mine, 1006, 'the server is silent'));
  }

  /** The connection is gone, or given up. */
  function lose(mine: number, code: number, reason: string): void {
    if (mine !== connection || state === 'closed') return;
    const wasReady = state === 'ready';
    dropSocket();
    clearTimers();
    session = null;
    unasked.clear();
    underWay.clear();
    for (const answer of states.values()) answer.connectionLost();
    for (const question of questions) stopTimer(question);
    if (code >= 4500 && code <= 4999) {
      closeForGood(
        new ClientError(closeReason(code), lastError?.message ?? (reason || `closed with code ${code}`), {
          closeCode: code,
        }),
        code,
        reason,
      );
      return;
    }
    failures++;
    urlIndex = (urlIndex + 1) % urls.length;
    const ceiling = Math.min(maxMs, baseMs * 2 ** Math.min(Math.floor((failures - 1) / urls.length), 20));
    const delayMs = Math.round(Math.max(ceiling / 2 + (Math.random() * ceiling) / 2, PATIENCE_MS[code] ?? 0));
    state = 'waiting';
    setTimer('retry', delayMs, open);
    if (wasReady) emit('disconnected', { code, reason, final: false });
    if (state === 'waiting')
      emit('reconnecting', { attempt: failures, delayMs, url: urls[urlIndex]!, code, reason });
  }

  function dropSocket(): void {
    const old = socket;
    socket = null;
    connection++;
    if (!old) return;
    old.onopen = null;
    old.onmessage = null;
    old.onclose = null;
    old.onerror = () => {}; // `ws` reports a close during the handshake as an error
    if (old.terminate) old.terminate();
    else old.close();
  }

  function closeForGood(error: ClientError, code: number, reason: string): void {
    state = 'closed';
    closeError = error;
    session = null;
    clearTimers();
    outbox.length = 0;
    unasked.clear();
    underWay.clear();
    for (const waiter of connectWaiters) waiter.reject(error);
    connectWaiters.clear();
    for (const pending of [...sends.values(), ...presences.splice(0)]) pending.reject(error);
    for (const question of questions.splice(0)) {
      stopTimer(question);
      question.reject(error);
    }
    sends.clear();
    for (const answer of [...states.values()]) {
      answer.fail(error);
      forget(answer);
      emitEnded(answer);
    }
    emit('disconnected', { code, reason, final: true });
  }

  function write(frame: ClientFrame): void {
    try {
      socket?.send(JSON.stringify(frame));
    } catch {
      // Not open any more: its close event follows, and what matters is sent again by the next connection.
    }
  }

  /** For frames that have no reply and that nothing else sends again. */
  function writeOrKeep(frame: ClientFrame): void {
    if (state === 'closed') throw closeError!;
    if (state === 'ready') {
      write(frame);
      return;
    }
    if (outbox.length >= MAX_KEPT)
      throw new ClientError('too_many_pending', 'Too many frames are waiting for a connection.', {
        temporary: true,
      });
    outbox.push(frame);
    start();
  }

  function start(): void {
    if (state === 'idle') open();
  }

  // ------------------------------------------------------------------------------------------------- frames

  function receive(data: unknown): void {
    clearTimeout(timers.get('silence'));
    timers.delete('silence');
    const frame = parseFrame(data);
    if (!frame) return;
    if (frame.type === 'ready') {
      if (state === 'connecting') becomeReady(frame);
      return;
    }
    switch (frame.type) {
      case 'start':
      case 'token':
      case 'done':
      case 'failed':
        takeLogFrame(frame);
        return;
      case 'accepted':
      case 'queued':
      case 'resumed':
        takeProgress(frame);
        return;
      case 'rejected':
        takeRejection(frame);
        return;
      case 'error':
        takeError(frame);
        return;
      case 'sent': {
        endSend(frame.messageId)?.resolve(frame);
        emit('sent', frame);
        return;
      }
      case 'message':
        takeMessage(frame);
        return;
      case 'presence': {
        // An answer may be late, or come twice: only the same question takes it. Older gateways do not name theirs.
        const index = presences.findIndex(({ frame: { userIds } }) =>
          frame.userIds
            ? String(frame.userIds) === String(userIds)
            : Object.keys(frame.online).every((user) => userIds.includes(user)),
        );
        if (index >= 0) endPresence(presences[index]!).resolve(frame.online);
        emit('presence', frame);
        return;
      }
      case 'notice':
        emit('notice', frame);
        return;
      case 'joined':
      case 'left':
      case 'members':
      case 'groups':
        takeAnswer(frame);
        return;
      case 'inbox':
        emit('inbox', frame);
        return;
      case 'heartbeat':
        emit('heartbeat', frame);
        return;
      default:
        frame satisfies never; // a newer server may say more than this client knows
    }
  }

  function takeLogFrame(frame: LogFrame): void {
    const answer = states.get(frame.messageId);
    if (!answer) return;
    const restarts = answer.restarts;
    const outcome = answer.take(frame);
    if (outcome === 'hole') resumeAnswer(answer);
    if (outcome !== 'taken') return;
    if (answer.ended) forget(answer);
    emit(frame.type, frame as never);
    if (answer.restarts > restarts) emit('restart', { messageId: frame.messageId, attempt: answer.attempt });
    if (answer.ended) emitEnded(answer);
  }

  function takeProgress(
    frame: ServerFrameOf<'accepted'> | ServerFrameOf<'queued'> | ServerFrameOf<'resumed'>,
  ): void {
    const answer = states.get(frame.messageId);
    if (!answer) return;
    const wasKnown = answer.known;
    answer.known = true;
    answer.retries = 0;
    if (frame.type === 'resumed') {
      answer.healed();
      if (!frame.recovered || frame.compacted) answer.expectReplay(frame.compacted);
      if (frame.status === 'running' || frame.status === 'queued') answer.status = frame.status;
      else if (frame.recovered) expectEnd(answer);
    } else {
      if (frame.type === 'accepted' && frame.duplicate) answer.expectReplay();
      if (answer.status === 'sending') answer.status = 'queued';
      if (answer.status === 'queued') answer.position = frame.position;
    }
    // A cancel that came before the server knew of the request was held back: it could have overtaken it.
    if (answer.cancelWanted && !wasKnown) write({ type: 'cancel', messageId: answer.messageId });
    if (frame.type !== 'queued') settle(answer);
    emit(frame.type, frame as never);
  }

  /** Its end must come now; if it does not, we asked after it: read the whole once. */
  function expectEnd(answer: AnswerState): void {
    const seen = answer.lastId;
    if (seen === '') return;
    setResumeTimer(answer, ALL_SEEN_MS, () => {
      if (answer.lastId !== seen) return;
      answer.expectReplay();
      resumeAnswer(answer);
    });
  }

  function setResumeTimer(answer: AnswerState, ms: number, run: () => void): void {
    clearTimeout(resumeTimers.get(answer.messageId));
    resumeTimers.set(
      answer.messageId,
      setTimeout(() => {
        resumeTimers.delete(answer.messageId);
        if (!answer.ended && state === 'ready') run();
      }, ms),
    );
  }

  function takeRejection(frame: ServerFrameOf<'rejected'>): void {
    const { code, messageId } = frame;
    const answer = states.get(messageId);
    if (answer) {
      underWay.delete(answer);
      handleRejected(answer, frame);
    }
    const pending = sends.get(messageId);
    if (pending && code === 'rate_limited' && pending.retries < MAX_RETRIES) {
      underWay.delete(pending);
      pause(frame.retryAfterMs ?? 0, pending.retries++);
    } else if (pending && code !== 'shutting_down') {
      endSend(messageId);
      pending.reject(rejectionOf(frame));
    }
    emit('rejected', frame);
    if (answer?.ended) emitEnded(answer);
    if (code === 'shutting_down' && (answer || pending)) moveOn('the node is shutting down');
    advance();
  }

  function handleRejected(answer: AnswerState, frame: ServerFrameOf<'rejected'>): void {
    const { code, temporary, retryAfterMs = 0 } = frame;
    if (code === 'shutting_down') return; // submitted again on the next connection
    if (code === 'unknown_message') {
      if (answer.cancelWanted) {
        answer.endUnsent();
        forget(answer);
        return;
      }
      if (answer.request && answer.resubmissions < MAX_RESUBMISSIONS) {
        answer.resubmissions++;
        answer.known = false;
        answer.expectReplay();
        submit(answer);
        return;
      }
    } else if (code === 'rate_limited' && answer.retries < MAX_RETRIES) {
      unasked.add(answer);
      pause(retryAfterMs, answer.retries++);
      return;
    } else if (temporary && (answer.known || !answer.request) && answer.retries < MAX_RETRIES) {
      // It exists, only reading it was refused for now.
      setResumeTimer(answer, retryDelayMs(retryAfterMs, answer.retries++), () => tell(answer));
      return;
    }
    answer.fail(rejectionOf(frame));
    forget(answer);
  }

  function takeError(frame: ServerFrameOf<'error'>): void {
    lastError = frame;
    // Where the server could read whose frame it was, that request was refused.
    const { messageId } = frame as { messageId?: unknown };
    const answer = typeof messageId === 'string' ? states.get(messageId) : undefined;
    if (answer && !answer.known) {
      answer.fail(new ClientError(frame.code, frame.message));
      forget(answer);
    }
    const pending = typeof messageId === 'string' ? endSend(messageId) : undefined;
    pending?.reject(new ClientError(frame.code, frame.message));
    if (frame.code === 'rate_limited' && messageId === undefined) {
      // It does not say which frame: questions about groups and presence may be asked twice.
      pause(frame.retryAfterMs ?? 0, 0);
      for (const asked of [...questions, ...presences]) underWay.delete(asked);
    }
    const asked = questions.find((question) => frame.message?.startsWith(`${question.frame.type}: `));
    if (asked) {
      endQuestion(asked);
      asked.reject(new ClientError(frame.code, frame.message));
    }
    emit('error', frame);
    if (answer?.ended) emitEnded(answer);
  }

  function takeAnswer(frame: ServerFrameOf<keyof typeof ANSWER_OF>): void {
    const { group } = frame as { group?: string };
    const asked = questions.find(
      ({ frame: question }) =>
        question.type === ANSWER_OF[frame.type] && (question as { group?: string }).group === group,
    );
    if (asked) {
      endQuestion(asked);
      asked.resolve(frame as never);
    }
    emit(frame.type, frame as never);
  }

  function endSend(messageId: string): PendingSend | undefined {
    const pending = sends.get(messageId);
    if (!pending) return undefined;
    sends.delete(messageId);
    settle(pending);
    return pending;
  }

  function endPresence(pending: PendingPresence): PendingPresence {
    presences.splice(presences.indexOf(pending), 1);
    settle(pending);
    return pending;
  }

  function endQuestion(question: PendingQuestion): void {
    stopTimer(question);
    questions.splice(questions.indexOf(question), 1);
    settle(question);
  }

  /** It runs while there is a connection, however often the question is written to it. */
  function startTimer(question: PendingQuestion): void {
    question.timer ??= setTimeout(() => {
      endQuestion(question);
      question.reject(new ClientError('timeout', 'No answer about the group.', { temporary: true }));
    }, QUESTION_TIMEOUT_MS);
  }

  function stopTimer(question: PendingQuestion): void {
    clearTimeout(question.timer);
    question.timer = undefined;
  }

  function ask<T>(frame: PendingQuestion['frame']): Promise<T> {
    const asked = new Promise<T>((resolve, reject) => {
      if (state === 'closed') throw closeError;
      const refusal = 'group' in frame ? refuseId('group', frame.group, 64) : null;
      if (refusal) throw refusal;
      if (questions.length >= MAX_PENDING)
        throw new ClientError('too_many_pending', 'Too many questions about groups are open.', {
          temporary: true,
        });
      const question: PendingQuestion = { frame, timer: undefined, resolve, reject };
      questions.push(question);
      start();
      advance();
    });
    asked.catch(() => {}); // nobody has to look at it
    return asked;
  }

  function takeMessage(frame: ServerFrameOf<'message'>): void {
    const key = `${frame.from} ${frame.messageId}`;
    inboxAfter = frame.id;
    if (seenMessages.has(key)) return;
    seenMessages.add(key);
    if (seenMessages.size > REMEMBERED_MESSAGES) seenMessages.delete(seenMessages.values().next().value!);
    emit('message', frame);
  }

  function emitEnded(answer: AnswerState): void {
    emit('ended', {
      messageId: answer.messageId,
      status: answer.status as 'done' | 'cancelled' | 'failed',
      ...(answer.error ? { error: answer.error } : {}),
    });
  }

  /** For what may end inside `chat`: whoever asks should hold the answer before hearing of its end. */
  function emitEndedSoon(answer: AnswerState): void {
    queueMicrotask(() => emitEnded(answer));
  }

  /** Leaves this node before it closes the connection by itself. */
  function moveOn(reason: string): void {
    lose(connection, 4000, reason);
  }

  // ------------------------------------------------------------------------------------------------ answers

  /** Tells the server about an answer, as soon as it has room. */
  function tell(answer: AnswerState): void {
    unasked.add(answer);
    advance();
  }

  /** Does so now, in the way that fits what the server knows. */
  function submit(answer: AnswerState): void {
    const { request, messageId } = answer;
    if (!request || answer.known || (answer.cancelWanted && answer.sent)) {
      resumeAnswer(answer);
      if (answer.cancelWanted) write({ type: 'cancel', messageId });
      return;
    }
    const refusal = refuseLength(request);
    if (refusal) {
      answer.fail(refusal);
      forget(answer);
      emitEndedSoon(answer);
      return;
    }
    answer.sent = true;
    underWay.add(answer);
    write(request);
  }

  /** The server hangs up on a frame that is too long, and with it on everything else. */
  function refuseLength(frame: ClientFrame): ClientError | null {
    const most = session?.limits?.maxFrameBytes;
    if (!most || new TextEncoder().encode(JSON.stringify(frame)).length <= most) return null;
    return new ClientError('payload_too_large', `The message is above ${most} bytes.`);
  }

  function resumeAnswer(answer: AnswerState): void {
    answer.sent = true;
    underWay.add(answer);
    const after = answer.lastId;
    write({ type: 'resume', messageId: answer.messageId, ...(after ? { after } : {}) });
  }

  function cancelAnswer(answer: AnswerState): Promise<AnswerResult> {
    if (answer.ended || answer.cancelWanted) return answer.done;
    answer.cancelWanted = true;
    if (!answer.sent && answer.request) {
      answer.endUnsent();
      forget(answer);
      emitEndedSoon(answer);
    } else if (state === 'ready' && answer.known && !unasked.has(answer)) {
      write({ type: 'cancel', messageId: answer.messageId });
    }
    return answer.done;
  }

  function forget(answer: AnswerState): void {
    if (states.get(answer.messageId) !== answer) return;
    states.delete(answer.messageId);
    answers.delete(answer.messageId);
    clearTimeout(resumeTimers.get(answer.messageId));
    resumeTimers.delete(answer.messageId);
    unasked.delete(answer);
    settle(answer);
  }

  function follow(
    answer: AnswerState,
    { signal, cancelOnBreak }: { signal?: AbortSignal; cancelOnBreak?: boolean },
  ): Answer {
    const cancel = () => cancelAnswer(answer);
    const read = () => answer.read(() => (cancelOnBreak ? void cancel() : undefined));
    const handle: Answer = {
      messageId: answer.messageId,
      done: answer.done,
      get text() {
        return answer.text;
      },
      get status() {
        return answer.status;
      },
      get position() {
        return answer.position;
      },
      get attempt() {
        return answer.attempt;
      },
      get lastId() {
        return answer.lastId;
      },
      get restarts() {
        return answer.restarts;
      },
      cancel,
      parts: read,
      async *[Symbol.asyncIterator]() {
        for await (const part of read()) if (part.type === 'text') yield part.text;
      },
    };
    const refusal =
      state === 'closed'
        ? closeError!
        : states.size >= (options.maxOpenAnswers ?? MAX_OPEN_ANSWERS)
          ? new ClientError('too_many_pending', 'Too many answers are open in this client.', {
              temporary: true,
            })
          : refuseId('messageId', answer.messageId, 128);
    if (refusal) {
      answer.fail(refusal);
      emitEndedSoon(answer);
      return handle;
    }
    states.set(answer.messageId, answer);
    answers.set(answer.messageId, handle);
    if (signal?.aborted) {
      cancel();
    } else if (signal) {
      signal.addEventListener('abort', cancel, { once: true });
      const release = () => signal.removeEventListener('abort', cancel);
      answer.done.then(release, release);
    }
    if (answer.ended) return handle;
    start();
    if (state === 'ready') tell(answer);
    return handle;
  }

  // ---------------------------------------------------------------------------------------------- interface

  return {
    get state() {
      return state;
    },
    get session() {
      return session;
    },
    get url() {
      return urls[urlIndex]!;
    },
    answers,

    connect({ timeoutMs } = {}) {
      if (state === 'closed') return Promise.reject(closeError);
      if (session) return Promise.resolve(session);
      return new Promise((resolve, reject) => {
        let timer: ReturnType<typeof setTimeout> | undefined;
        const waiter = {
          resolve: (frame: ServerFrameOf<'ready'>) => {
            clearTimeout(timer);
            resolve(frame);
          },
          reject: (error: ClientError) => {
            clearTimeout(timer);
            reject(error);
          },
        };
        connectWaiters.add(waiter);
        if (timeoutMs !== undefined)
          timer = setTimeout(() => {
            connectWaiters.delete(waiter);
            reject(new ClientError('timeout', `No connection within ${timeoutMs} ms.`, { temporary: true }));
          }, timeoutMs);
        start();
      });
    },

    chat(contents, { messageId = newId(), signal, cancelOnBreak, ...payload } = {}) {
      const open = answers.get(messageId);
      if (open) return open;
      const request: ClientFrameOf<'chat'> = { type: 'chat', messageId, contents, ...payload };
      return follow(new AnswerState(messageId, request), { signal, cancelOnBreak });
    },

    resume(messageId, after, { text, signal, cancelOnBreak } = {}) {
      const open = answers.get(messageId);
      if (open) return open;
      const answer = new AnswerState(messageId, null);
      const id = after ? parseId(after) : null;
      if (id) answer.continueAfter(id, text);
      return follow(answer, { signal, cancelOnBreak });
    },

    cancel(messageId) {
      const answer = states.get(messageId);
      if (answer) void cancelAnswer(answer);
      else writeOrKeep({ type: 'cancel', messageId });
    },

    send(to, contents, { messageId = newId() } = {}) {
      if (state === 'closed') return Promise.reject(closeError);
      const refusal =
        refuseId('messageId', messageId, 128) ??
        ('user' in to ? refuseId('user', String(to.user), 64) : refuseId('group', to.group, 64));
      if (refusal) return Promise.reject(refusal);
      if (sends.has(messageId))
        return Promise.reject(new ClientError('invalid_frame', 'This messageId is already being sent.'));
      if (sends.size >= MAX_PENDING)
        return Promise.reject(
          new ClientError('too_many_pending', 'Too many messages are not confirmed yet.', {
            temporary: true,
          }),
        );
      return new Promise((resolve, reject) => {
        const recipient = 'user' in to ? { user: String(to.user) } : { group: to.group };
        const frame: ClientFrameOf<'send'> = { type: 'send', messageId, to: recipient, contents };
        sends.set(messageId, { frame, retries: 0, resolve, reject });
        start();
        advance();
      });
    },

    ack(id) {
      const kept = outbox.findIndex((frame) => frame.type === 'ack');
      if (kept >= 0) outbox.splice(kept, 1); // the later one covers it
      writeOrKeep({ type: 'ack', id });
    },

    join: (group) => ask({ type: 'join', group }),
    leave: (group) => ask({ type: 'leave', group }),
    members: (group) => ask({ type: 'members', group }),
    groups: async () => (await ask<ServerFrameOf<'groups'>>({ type: 'groups' })).groups,

    presence(userIds, { timeoutMs = PRESENCE_TIMEOUT_MS } = {}) {
      if (state === 'closed') return Promise.reject(closeError);
      const refusal =
        userIds.length < 1 || userIds.length > MAX_PRESENCE
          ? new ClientError(
              'invalid_frame',
              `presence takes 1 to ${MAX_PRESENCE} users, not ${userIds.length}`,
            )
          : userIds.map((user) => refuseId('user', String(user), 64)).find((refused) => refused !== null);
      if (refusal) return Promise.reject(refusal);
      if (presences.length >= MAX_PENDING)
        return Promise.reject(
          new ClientError('too_many_pending', 'Too many presence queries are open.', { temporary: true }),
        );
      return new Promise((resolve, reject) => {
        const frame: ClientFrameOf<'presence'> = { type: 'presence', userIds: userIds.map(String) };
        const timer = setTimeout(() => {
          endPresence(pending);
          reject(new ClientError('timeout', 'No answer to the presence query.', { temporary: true }));
        }, timeoutMs);
        const pending: PendingPresence = {
          frame,
          resolve: (online) => {
            clearTimeout(timer);
            resolve(online);
          },
          reject: (error) => {
            clearTimeout(timer);
            reject(error);
          },
        };
        presences.push(pending);
        start();
        advance();
      });
    },

    on(event, listener) {
      const set = listeners.get(event) ?? new Set();
      listeners.set(event, set);
      set.add(listener as (value: never) => void);
      return () => {
        set.delete(listener as (value: never) => void);
      };
    },

    setUrls(next) {
      const current = urls[urlIndex]!;
      urls = readUrls(next, userId);
      urlIndex = Math.max(0, urls.indexOf(current));
    },

    wake() {
      if (state === 'waiting') open();
      else if (state === 'ready') {
        clearTimeout(timers.get('silence'));
        timers.delete('silence');
        heartbeat(WAKE_SILENCE_MS);
      }
    },

    async close() {
      if (state === 'closed') return;
      const old = socket;
      socket = null;
      connection++;
      closeForGood(new ClientError('closed', 'The client was closed.'), 1000, 'closed by the client');
      if (!old) return;
      await new Promise<void>((resolve) => {
        const timer = setTimeout(() => {
          old.terminate?.();
          resolve();
        }, CLOSE_MS);
        old.onopen = null;
        old.onmessage = null;
        old.onerror = () => {};
        old.onclose = () => {
          clearTimeout(timer);
          resolve();
        };
        old.close(1000, 'bye');
      });
    },
  };
}

// ------------------------------------------------------------------------------------------------ small things

function rejectionOf(frame: ServerFrameOf<'rejected'>): ClientError {
  const { temporary, retryAfterMs, position } = frame;
  return new ClientError(frame.code, frame.message, { temporary, retryAfterMs, position });
}

function closeReason(code: number): ClientErrorCode {
  switch (code) {
    case 4500:
      return 'invalid_frame';
    case 4501:
      return 'unauthorized';
    case 4502:
      return 'banned';
    case 4503:
      return 'invalid_frame';
    case 4504:
      return 'payload_too_large';
    default:
      return 'closed';
  }
}

/** Parses as far as this client relies on: the type, and the fields that it stores or compares. */
function parseFrame(data: unknown): ServerFrame | null {
  if (typeof data !== 'string') return null;
  let frame: Record<string, unknown>;
  try {
    frame = JSON.parse(data);
  } catch {
    return null;
  }
  if (typeof frame !== 'object' || frame === null) return null;
  switch (frame.type) {
    case 'ready':
    case 'heartbeat':
    case 'notice':
    case 'error':
    case 'inbox':
    case 'joined':
    case 'left':
    case 'members':
    case 'groups':
      break;
    case 'presence':
      if (typeof frame.online !== 'object' || frame.online === null) return null;
      break;
    case 'message':
      if (typeof frame.id !== 'string' || typeof frame.from !== 'string') return null;
      if (typeof frame.messageId !== 'string') return null;
      break;
    case 'token':
      if (typeof frame.text !== 'string' || typeof frame.messageId !== 'string') return null;
      break;
    default:
      if (typeof frame.messageId !== 'string') return null;
  }
  return frame as unknown as ServerFrame;
}

function readUrls(value: string | string[], userId: string): string[] {
  const list = Array.isArray(value) ? value : [value];
  if (list.length === 0) throw new ClientError('invalid_frame', 'url is missing');
  return list.map((text) => {
    let url: URL;
    try {
      url = new URL(text, (globalThis as { location?: { href: string } }).location?.href);
    } catch {
      throw new ClientError('invalid_frame', `url "${text}" is not a URL`);
    }
    if (url.protocol === 'http:') url.protocol = 'ws:';
    if (url.protocol === 'https:') url.protocol = 'wss:';
    if (url.protocol !== 'ws:' && url.protocol !== 'wss:')
      throw new ClientError('invalid_frame', `url "${text}" must begin with ws:// or wss://`);
    if (url.pathname === '/') url.pathname = '/ws';
    url.hash = '';
    url.searchParams.set('userId', userId);
    return url.href;
  });
}

async function findWebSocket(given: WebSocketConstructor | undefined): Promise<WebSocketConstructor> {
  if (given) return given;
  const own = (globalThis as { WebSocket?: unknown }).WebSocket;
  if (own) return own as WebSocketConstructor;
  // Not reached in browsers. The name is held in a variable so that bundlers leave it alone.
  const nodePackage = 'ws';
  const loaded = (await import(/* @vite-ignore */ nodePackage)) as { WebSocket: WebSocketConstructor };
  return loaded.WebSocket;
}

/** 96 random bits; `crypto.randomUUID` is missing on pages without TLS. */
function newId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** What the server would refuse without saying whose it was. */
function refuseId(name: string, id: string, most: number): ClientError | null {
  if (typeof id === 'string' && id.length <= most && ID_PATTERN.test(id)) return null;
  return new ClientError(
    'invalid_frame',
    `${name} must have 1 to ${most} characters of A-Z a-z 0-9 . _ : @ -`,
  );
}
