import { type ErrorCode, RivuletError } from './errors.ts';
import type { Keys } from './keys.ts';
import {
  type ChatPayload,
  type FinishReason,
  type GenerationStatus,
  isOpenStatus,
  type LogFrame,
  type Usage,
} from './protocol.ts';
import { type Command, PATIENT, type RedisConnection, retrying } from './redis.ts';
import { publishArguments, type ReplyLines } from './reply-stream.ts';
import { GROUP, REQUEST_PAYLOAD_BYTES } from './request-queue.ts';
import { quote } from './short-text.ts';

/**
 * Records and logs of generations: *the log is the lock*.
 *
 * A log is a stream whose entry ids are frame ids, `<attempt>-<seq>`. Entry shapes, one field each:
 * `start <attempt>` · `token <text>` · `done <JSON>` · `failed <JSON>`.
 * States of a record: queued → running → done | failed | cancelled, and running → queued at a retry.
 * `begin` opens an attempt. The first attempt of a request that came with its payload is opened by what its worker has
 * to write first: its log (`openFirstCommand`), or all of it (`finish`). Appends say NOMKSTREAM and an explicit id, so
 * Redis itself refuses a worker that has been replaced. Every step here is one script, and safe to repeat, but for
 * `openFirstCommand`.
 */

/** An open record lives this long without an attempt; then it is given up with everything it holds. */
const OPEN_RECORD_MS = 24 * 3_600_000;
const PAGE = 500; // entries a range read may return
const ATTACH_PAGE = 64; // the first ones of a resume: a thousand may come at once, and an entry may have 48 KB
/**
 * UTF-8 text that a record takes. A longer one stays a log for as long as it is kept: it gains little, and a client
 * that reads slowly should not get it in one piece.
 */
export const RECORD_TEXT_BYTES = 65_536;

/**
 * A worker asks at most so often who wants an answer's frames. What a gateway misses in this time it sees as a gap with
 * the next frame, or when it looks again after its attach.
 */
export const ROUTES_MS = 150;

export interface LogEntry {
  id: string;
  /** The frame as it goes to clients, JSON. */
  frame: string;
  terminal: boolean;
}

/** What a worker knows of the record of its attempt. */
export interface LostRecord {
  /** JSON. */
  payload: string;
  tries: number;
  trace: string;
  /** The nodes that wanted its frames when they were last asked for; none = not known. */
  routes: string[];
}

export type Admitted =
  /** `queued` is there when the request was appended in the same step. */
  | { state: 'created'; queued?: { position: number; full: boolean } }
  | { state: 'joined'; status: GenerationStatus; node: string }
  | {
      state: 'refused';
      code: 'too_many_active' | 'conversation_busy' | 'quota_exhausted';
      retryAfterMs?: number;
    };

export type Attached =
  | { state: 'unknown' }
  | {
      state: 'attached';
      status: GenerationStatus;
      recovered: boolean;
      /** What clients are told: it ended a while ago, and its tokens are one now. */
      compacted: boolean;
      /** The record holds all of it: nothing follows these entries. */
      whole: boolean;
      /** The node whose request stream carries it; empty when it has ended long ago. */
      node: string;
      entries: LogEntry[];
      /** There may be more entries after the last of these. */
      more: boolean;
    };

export interface Progress {
  /** The id at the top of its log, '' where it has none. */
  top: string;
  /** How many attempts its record knows of. */
  attempt: number;
}

export interface GenerationRecord {
  status: GenerationStatus;
  attempt: number;
  owner: string;
  node: string;
}

export type Begun =
  | { state: 'missing' | 'terminal' }
  /** Another entry of the same request is being worked on; `leaseMs` is left of that. */
  | { state: 'duplicate'; leaseMs: number }
  | {
      state: 'run' | 'exhausted';
      attempt: number;
      tries: number;
      /** JSON of a `ChatPayload`. */
      payload: string;
      routes: string[];
      /** The id in the log before this attempt's `start`, or empty. */
      before: string;
      /** Of the request; '' while traces are off. */
      trace: string;
    };

export type Terminal =
  | { type: 'done'; finishReason: FinishReason; length: number; usage?: Usage }
  | { type: 'failed'; code: ErrorCode; message: string; temporary: boolean };

export type Finished =
  | { state: 'ended'; routes: string[]; acknowledged: boolean }
  | { state: 'fenced' }
  /** It had not begun, and is no first attempt. */
  | { state: 'stale' }
  | { state: 'behind' };

export type Cancelled =
  | { state: 'unknown' }
  | { state: 'ended'; status: GenerationStatus }
  | { state: 'cancelled'; id: string; before: string; frame: string; routes: string[]; node: string };

/** A running attempt, as its worker names it. */
export interface Attempt {
  user: string;
  messageId: string;
  attempt: number;
  /** Who runs it: one run of one worker. What the same worker began again after a failover is somebody else's. */
  owner: string;
  /** Its request: the node's stream, and the entry there. */
  node: string;
  entry: string;
}

export type GenerationStore = ReturnType<typeof createGenerationStore>;

export function createGenerationStore({
  redis,
  keys,
  retentionMs,
  compactAfterMs = retentionMs,
}: {
  redis: RedisConnection;
  keys: Keys;
  /** How long a finished generation is kept. */
  retentionMs: number;
  /** How long its log is: then the record answers for it, in one piece. */
  compactAfterMs?: number;
}) {
  const { client } = redis;
  const logMs = Math.min(compactAfterMs, retentionMs);

  return {
    /**
     * Makes the record or joins it. Safe to repeat. On a single server a new request is appended in the same step,
     * and a full queue leaves nothing behind; in a Cluster the record and the queue live in different slots.
     */
    async admit(options: {
      user: string;
      messageId: string;
      node: string;
      payload: ChatPayload;
      userActiveLimit: number;
      /** Conversations a day for a user without a number of their own; 0 = any number. */
      quotaPerDay: number;
      queueLimit: number;
      trace?: string;
    }): Promise<Admitted> {
      const { user, messageId } = options;
      const recordKeys = [keys.generation(user, messageId), keys.active(user)];
      const doorKeys = [keys.quota(user), keys.access(user)];
      const record = [
        messageId,
        options.node,
        encodePayload(options.payload),
        options.payload.conversationId ?? '',
        options.userActiveLimit,
        OPEN_RECORD_MS,
        keys.generation(user, ''),
        options.quotaPerDay,
        options.trace ?? '',
      ];
      let admitted: unknown;
      let queued: [position: number, length?: number] | undefined;
      if (redis.isCluster) admitted = await redis.script('admit', [...recordKeys, ...doorKeys], record);
      else
        [admitted, queued] = (await redis.script(
          'admit_and_enqueue',
          [...recordKeys, ...doorKeys, keys.requests(options.node), keys.retries(options.node)],
          [...record, options.queueLimit, user, REQUEST_PAYLOAD_BYTES],
        )) as [unknown, [number, number?]?];
      const [state, status, node] = admitted as [string, GenerationStatus?, string?];
      switch (state) {
        case 'created':
          if (!queued) return { state };
          return { state, queued: { position: queued[0] < 0 ? queued[1]! : queued[0], full: queued[0] < 0 } };
        case 'joined':
          return { state, status: status!, node: node! };
        case 'too_many_active':
        case 'conversation_busy':
          return { state: 'refused', code: state };
        case 'quota_exhausted':
          return { state: 'refused', code: state, retryAfterMs: Number(status) };
        default:
          throw new Error(`admit.lua answered ${state}`);
      }
    },

    /** Takes a record back that could not be queued. */
    async forget(user: string, messageId: string): Promise<void> {
      await retrying(() =>
        redis.script(
          'forget',
          [keys.generation(user, messageId), keys.active(user), keys.quota(user)],
          [messageId],
        ),
      );
    },

    /** Routes a generation to a node and reads its log after an id ('' = all), first page. */
    async attach(user: string, messageId: string, node: string, after: string): Promise<Attached> {
      const reply = (await retrying(() =>
        redis.script(
          'attach',
          [keys.generation(user, messageId), keys.log(user, messageId)],
          [node, after, ATTACH_PAGE, retentionMs - logMs],
        ),
      )) as [string, ...unknown[]];
      if (reply[0] === 'unknown') return { state: 'unknown' };
      if (reply[0] === 'whole') {
        const [, status, attempt, text, last, terminal, fresh] = reply as [
          string,
          GenerationStatus,
          string,
          string,
          string,
          string,
          number,
        ];
        const entries = readWhole(messageId, attempt, text, last, terminal);
        const seen = entries.findIndex(({ id }) => id === after); // -1 replays all of it
        return {
          state: 'attached',
          status,
          recovered: after === '' || seen >= 0,
          compacted: fresh === 0,
          whole: true,
          node: '',
          entries: entries.slice(seen + 1),
          more: false,
        };
      }
      const [, status, recovered, home, entries] = reply as [
        string,
        GenerationStatus,
        number,
        string,
        RawEntry[],
      ];
      return {
        state: 'attached',
        status,
        recovered: recovered === 1,
        compacted: false,
        whole: false,
        node: home,
        entries: entries.map((entry) => readEntry(messageId, entry)),
        more: entries.length === ATTACH_PAGE,
      };
    },

    /** A page of the log after an id ('' = from the start). */
    async readLog(
      user: string,
      messageId: string,
      after: string,
      most = PAGE,
    ): Promise<{ entries: LogEntry[]; more: boolean }> {
      const from = after === '' ? '-' : `(${after}`;
      const page = await retrying(() => client.xrange(keys.log(user, messageId), from, '+', 'COUNT', most));
      return { entries: page.map((entry) => readEntry(messageId, entry)), more: page.length === most };
    },

    /** Says whose request stream carries it from now on. False when it is not open any more. */
    async moveHome(user: string, messageId: string, node: string): Promise<boolean> {
      const moved = await retrying(() =>
        redis.script('move_home', [keys.generation(user, messageId)], [node]),
      );
      return moved === 1;
    },

    /** How far each generation has come; null when there is nothing to wait for, an error where that is not known. */
    async progress(generations: { user: string; messageId: string }[]): Promise<(Progress | null | Error)[]> {
      const replies = await redis.batch(
        generations.flatMap(({ user, messageId }): Command[] => [
          ['xrevrange', keys.log(user, messageId), '+', '-', 'COUNT', 1],
          ['hmget', keys.generation(user, messageId), 'status', 'attempt'],
        ]),
      );
      return generations.map((_, index) => {
        const [logError, entries] = replies[index * 2]!;
        const [recordError, record] = replies[index * 2 + 1]!;
        const error = logError ?? recordError;
        if (error) return error;
        const [status, attempt] = record as [GenerationStatus | null, string];
        if (status === null) return null;
        const top = (entries as RawEntry[])[0]?.[0] ?? '';
        return top !== '' || isOpenStatus(status) ? { top, attempt: Number(attempt) } : null;
      });
    },

    /** What the record says; null when there is none. */
    async inspect(generation: { user: string; messageId: string }): Promise<GenerationRecord | null> {
      return readRecord(await redis.send(recordCommand(keys, generation)));
    },

    /** The same for many at once; an error where it is not known. */
    async inspectAll(
      generations: { user: string; messageId: string }[],
    ): Promise<(GenerationRecord | null | Error)[]> {
      const replies = await redis.batch(generations.map((generation) => recordCommand(keys, generation)));
      return replies.map(([error, value]) => error ?? readRecord(value));
    },

    /** Opens the next attempt, one for each owner. Safe to repeat. */
    async begin(options: {
      user: string;
      messageId: string;
      node: string;
      entry: string;
      owner: string;
      maxTries: number;
      leaseMs: number;
      /** Also while somebody else is working on it. */
      above?: boolean;
    }): Promise<Begun> {
      const { user, messageId } = options;
      const reply = (await retrying(
        () =>
          redis.script(
            'begin',
            [keys.generation(user, messageId), keys.log(user, messageId)],
            [
              carrierOf(options),
              options.owner,
              options.maxTries,
              options.leaseMs,
              OPEN_RECORD_MS,
              options.above ? 1 : 0,
            ],
          ),
        PATIENT,
      )) as [string, number, number, string, string, string, string];
      switch (reply[0]) {
        case 'missing':
        case 'terminal':
          return { state: reply[0] };
        case 'duplicate':
          return { state: 'duplicate', leaseMs: reply[1] };
        case 'run':
        case 'exhausted':
          return {
            state: reply[0],
            attempt: reply[1],
            tries: reply[2],
            payload: reply[3] || '{"contents":""}',
            routes: splitRoutes(reply[4]),
            before: reply[5],
            trace: reply[6],
          };
        default:
          throw new Error(`begin.lua answered ${reply[0]}`);
      }
    },

    /**
     * The command that opens a first attempt that nobody asked for yet, and makes its log, with its first text if there is
     * any. Read its answer with `readOpened`. If that is lost, `restore` finds out; it must not be repeated.
     * @param publish on a single server: the node that is likely to want the frames, and the frames
     */
    openFirstCommand(
      attempt: Attempt,
      text: string | null,
      publish: { node: string; frames: ReplyLines[] } | null = null,
    ): Command {
      const { user, messageId, owner } = attempt;
      const recordKeys = [keys.generation(user, messageId), keys.log(user, messageId)];
      const log = [carrierOf(attempt), owner, OPEN_RECORD_MS, text === null ? 0 : 1, text ?? ''];
      if (!publish) return redis.scriptCommand('open_first', recordKeys, log);
      const { key, rest } = publishArguments(keys, publish.node, publish.frames);
      return redis.scriptCommand('open_first', [...recordKeys, key], [...log, publish.node, ...rest]);
    },

    /** Null when it is no first attempt; nothing has changed then. `published`: the frames went out with it. */
    readOpened(reply: unknown): { routes: string; published: boolean } | null {
      if (reply === null) return null;
      const [routes, published] = reply as [string, number];
      return { routes, published: published === 1 };
    },

    /** The command that appends one token frame to the log under a key; answers null when the log is gone. */
    appendCommand(log: string, id: string, text: string): Command {
      return ['xadd', log, 'NOMKSTREAM', id, 'token', text];
    },

    /**
     * The command that appends a text to each of these logs and publishes their frames to the one node that wants them, on
     * a single server. Read its answer with `readAppended`.
     * @param frames few enough for one entry
     */
    appendAndPublishCommand(
      node: string,
      appends: readonly { log: string; id: string; text: string }[],
      frames: readonly ReplyLines[],
    ): Command {
      const { key, rest } = publishArguments(keys, node, frames);
      return redis.scriptCommand(
        'append_and_publish',
        [key, ...appends.map(({ log }) => log)],
        [rest.length, ...rest, ...appends.flatMap(({ id, text }) => [id, text])],
      );
    },

    /** For each log what `appendCommand` would have answered, and whether the frames went out with it. */
    readAppended(reply: unknown): { published: boolean; taken: (Error | null | 1)[] } {
      const [published, ...taken] = reply as [number, ...(Error | null | 1)[]];
      return { published: published === 1, taken };
    },

    /** The key of its log. */
    logKey({ user, messageId }: Attempt): string {
      return keys.log(user, messageId);
    },

    /** The command that asks which nodes want its frames. */
    routesCommand({ user, messageId }: Attempt): Command {
      return ['hget', keys.generation(user, messageId), 'routes'];
    },

    /**
     * Appends again what the log lacks of `texts` (seq 1 on).
     * @param lost what a record that is gone is made of again, if it cannot have ended; null leaves it alone
     * @returns `missing`: it is gone, and was left alone; `again`: it was made again
     */
    async restore(
      attempt: Attempt,
      texts: string[],
      lost: LostRecord | null = null,
    ): Promise<{ state: 'restored'; routes: string[]; again: boolean } | { state: 'fenced' | 'missing' }> {
      const { user, messageId, node } = attempt;
      const reply = (await redis.script(
        'restore',
        [keys.generation(user, messageId), keys.log(user, messageId), keys.active(user)],
        [
          attempt.attempt,
          attempt.owner,
          carrierOf(attempt),
          OPEN_RECORD_MS,
          retentionMs,
          lost?.payload ?? '',
          messageId,
          node,
          lost?.routes.join(',') || node,
          lost?.tries ?? 0,
          lost ? ((JSON.parse(lost.payload) as ChatPayload).conversationId ?? '') : '',
          lost?.trace ?? '',
          ...texts.flatMap((text, index) => [index + 1, text]),
        ],
      )) as [string, string?, number?];
      if (reply[0] === 'restored')
        return { state: 'restored', routes: splitRoutes(reply[1]!), again: reply[2] === 1 };
      return { state: reply[0] as 'fenced' | 'missing' };
    },

    /**
     * Ends a generation. Safe to repeat. On a single server its request is acknowledged in the same step; whether that
     * was done is in the answer.
     * @param last text that was not appended yet, under its seq
     * @param seq of the terminal frame
     * @param begun false for a first attempt that nobody asked for yet: it begins and ends in this step, without a log
     * @param textBefore all text before `last`; null when the whole is more than RECORD_TEXT_BYTES
     */
    async finish(
      attempt: Attempt,
      last: { seq: number; text: string } | null,
      seq: number,
      terminal: Terminal,
      { begun, textBefore }: { begun: boolean; textBefore: string | null },
    ): Promise<Finished> {
      const { user, messageId } = attempt;
      const { type, ...rest } = terminal;
      const recordKeys = [
        keys.generation(user, messageId),
        keys.log(user, messageId),
        keys.active(user),
        keys.quota(user),
      ];
      const end = [
        attempt.attempt,
        attempt.owner,
        messageId,
        type,
        seq > 1 ? `${attempt.attempt}-${seq - 1}` : '',
        last ? last.text : '',
        `${attempt.attempt}-${seq}`,
        type,
        JSON.stringify(rest),
        retentionMs,
        begun ? 0 : 1,
        logMs,
        textBefore === null ? 0 : 1,
        textBefore ?? '',
      ];
      const together = !redis.isCluster;
      const reply = (await (together
        ? redis.script(
            'finish_and_ack',
            [...recordKeys, keys.requests(attempt.node)],
            [...end, GROUP, attempt.entry],
          )
        : redis.script('finish', recordKeys, end))) as [string, string?];
      switch (reply[0]) {
        case 'ended':
          return {
            state: 'ended',
            routes: splitRoutes(reply[1] ?? ''),
            acknowledged: together,
          };
        case 'behind':
          return { state: 'behind' };
        case 'stale':
          return { state: 'stale' };
        default:
          return { state: 'fenced' };
      }
    },

    /** Gives an attempt up for a later one. False when it is not ours any more. */
    async release(attempt: Attempt, countsAsTry: boolean): Promise<boolean> {
      const released = await retrying(
        () =>
          redis.script(
            'release',
            [keys.generation(attempt.user, attempt.messageId)],
            [attempt.attempt, attempt.owner, countsAsTry ? 1 : 0],
          ),
        PATIENT,
      );
      return released === 1;
    },

    /** The command that says that an attempt is alive. */
    beatCommand(attempt: Attempt): Command {
      return redis.scriptCommand(
        'beat',
        [keys.generation(attempt.user, attempt.messageId)],
        [attempt.attempt, attempt.owner, OPEN_RECORD_MS],
      );
    },

    async cancel(user: string, messageId: string): Promise<Cancelled> {
      const reply = (await retrying(() =>
        redis.script(
          'cancel',
          [keys.generation(user, messageId), keys.log(user, messageId), keys.active(user)],
          [messageId, retentionMs, logMs, RECORD_TEXT_BYTES],
        ),
      )) as [string, ...unknown[]];
      if (reply[0] === 'unknown') return { state: 'unknown' };
      if (reply[0] === 'ended') return { state: 'ended', status: reply[1] as GenerationStatus };
      const [, id, before, length, routes, node] = reply as [string, string, string, number, string, string];
      const frame = encodeFrame({ type: 'done', messageId, id, finishReason: 'cancelled', length });
      return { state: 'cancelled', id, before, frame, routes: splitRoutes(routes), node };
    },

    /**
     * Opens a failed generation again for a dead letter; `lastAttempt` is used where the record has expired. Safe to
     * repeat: one that is open already stays as it is.
     */
    async replay(options: {
      user: string;
      messageId: string;
      node: string;
      payload: ChatPayload;
      lastAttempt: number;
    }): Promise<{ state: 'reopened' | 'open'; node: string } | { state: 'ended'; status: GenerationStatus }> {
      const { user, messageId, payload } = options;
      const [state, value] = (await retrying(() =>
        redis.script(
          'replay',
          [keys.generation(user, messageId), keys.log(user, messageId), keys.active(user)],
          [
            messageId,
            options.node,
            JSON.stringify(payload),
            payload.conversationId ?? '',
            OPEN_RECORD_MS,
            options.lastAttempt,
          ],
        ),
      )) as ['reopened' | 'open' | 'ended', string];
      return state === 'ended' ? { state, status: value as GenerationStatus } : { state, node: value };
    },

    /** The text of an attempt so far, for a handler that continues from it. */
    async readText(user: string, messageId: string, attempt: number): Promise<string> {
      let text = '';
      for (let from = `${attempt}-0`; ; ) {
        const page = await retrying(() =>
          client.xrange(keys.log(user, messageId), from, `${attempt}-18446744073709551615`, 'COUNT', PAGE),
        );
        for (const [id, fields] of page) {
          if (fields[0] === 'token') text += fields[1];
          from = `(${id}`;
        }
        if (page.length < PAGE) return text;
      }
    },
  };
}

type RawEntry = [id: string, fields: string[]];

function recordCommand(keys: Keys, { user, messageId }: { user: string; messageId: string }): Command {
  return ['hmget', keys.generation(user, messageId), 'status', 'attempt', 'owner', 'node'];
}

function readRecord(reply: unknown): GenerationRecord | null {
  const [status, attempt, owner, node] = reply as (string | null)[];
  if (!status) return null;
  return {
    status: status as GenerationStatus,
    attempt: Number(attempt),
    owner: owner ?? '',
    node: node ?? '',
  };
}

/** A log entry as the frame that clients get. */
function readEntry(messageId: string, [id, fields]: RawEntry): LogEntry {
  const [kind, value] = fields as [string, string];
  switch (kind) {
    case 'token':
      return { id, frame: encodeToken(tokenHead(messageId), id, value), terminal: false };
    case 'start':
      return {
        id,
        frame: encodeFrame({ type: 'start', messageId, id, attempt: Number(value) }),
        terminal: false,
      };
    default:
      return { id, frame: encodeTerminal(messageId, id, kind, value), terminal: true };
  }
}

function readWhole(
  messageId: string,
  attempt: string,
  text: string,
  last: string,
  terminal: string,
): LogEntry[] {
  const [id, kind, json] = terminal.split(/ (\w+) (.*)/s) as [string, string, string];
  const entries: LogEntry[] = [];
  if (attempt !== '0') entries.push(readEntry(messageId, [`${attempt}-0`, ['start', attempt]]));
  if (last !== '') entries.push(readEntry(messageId, [last, ['token', text]]));
  entries.push(readEntry(messageId, [id, [kind, json]]));
  return entries;
}

export function encodeFrame(frame: LogFrame): string {
  return JSON.stringify(frame);
}

/** What the token frames of a generation begin with; made once for all of them. */
export function tokenHead(messageId: string): string {
  return `{"type":"token","messageId":"${messageId}","id":"`;
}

/** A token frame. Ids hold nothing that JSON would escape, so only the text is encoded. */
export function encodeToken(head: string, id: string, text: string): string {
  return `${head}${id}","text":${quote(text)}}`;
}

/** A terminal frame from its type and its other fields as a JSON object. */
export function encodeTerminal(messageId: string, id: string, type: string, json: string): string {
  return `{"type":"${type}","messageId":"${messageId}","id":"${id}",${json.slice(1)}`;
}

/** Names a request: entry ids are unique only within their stream, and one message may be in two. */
function carrierOf({ node, entry }: { node: string; entry: string }): string {
  return `${node} ${entry}`;
}

/** @throws RivuletError invalid_frame when it is nested too deeply */
export function encodePayload(payload: ChatPayload): string {
  try {
    return JSON.stringify(payload);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the stack: JSON.parse goes deeper
    throw new RivuletError('invalid_frame', 'parameters are nested too deeply');
  }
}

/** Nodes from a record's `routes`. */
export function splitRoutes(routes: string): string[] {
  return routes === '' ? [] : routes.split(',');
}
