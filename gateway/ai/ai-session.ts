import type { Logger } from 'pino';
import { ERRORS, type ErrorCode, RivuletError } from '../../shared/errors.ts';
import { CLOSE, parseUserId } from '../../shared/protocol.ts';
import { type Authenticate, readBearer, whenExpired } from '../authenticate.ts';
import type { GatewayMetrics } from '../metrics.ts';
import type { AddressLimit, FrameRates, Rated } from '../rate-limits.ts';
import {
  type ClientConnection,
  closeCodeFor,
  logFrameFailure,
  REFUSALS,
  refusalCost,
  STRIKES,
} from '../session.ts';
import type { AiDesk, AiStream, Sink } from './ai-desk.ts';
import type { AiDoor, AiGuest } from './ai-door.ts';
import { type AiFrameOf, conversationOf, parseAiFrame, readQuestion } from './questions.ts';

/**
 * One client of the AI SDK's WebSocketChatTransport. States: new → (first frame) bound → closed.
 *
 * Every frame of ours carries the request id that it answers: the client closes its socket on anything else, so
 * that heartbeats are pings of the WebSocket protocol. Frames are handled in the order in which they came. Every
 * request numbers its chunks from 0, and every resume replays from the start, as the client asks.
 *
 * `abort` means stop, and ends the generation. But the client also aborts a resume that another one replaces (React
 * mounts twice while developing), so a resume's abort waits for a moment whether one follows.
 */

const LINE_FRAMES = 64; // frames of one client that may wait for Redis
const MOST_REQUESTS = 64; // answers that one client reads at the same time
const MOST_UNCONFIRMED = 64; // answers whose end a client has not confirmed; older ones are replayed to who resumes them
const ABORT_GRACE_MS = 300; // a replacing resume comes in the same turn of the client; this covers a slow network's spread

export interface AiConnection extends ClientConnection {
  ping(payload: string): void;
}

export interface AiSessionParts {
  aiDesk: AiDesk;
  door: AiDoor;
  authenticate: Authenticate;
  metrics: GatewayMetrics;
  rates: FrameRates;
  addressLimit: AddressLimit;
  maxFrameBytes: number;
  log: Logger;
}

interface Request {
  id: string;
  kind: 'send' | 'resume';
  /** The question or the chat. */
  about: string;
  sequence: number;
  stream: AiStream | null;
}

interface PendingAbort {
  chat: string;
  timer: NodeJS.Timeout;
  run(): Promise<void>;
}

export class AiSession implements Rated, AiGuest {
  userId = '';
  rateMs = 0;
  readonly openedMs = performance.now();
  private readonly connection: AiConnection;
  private readonly parts: AiSessionParts;
  private readonly claims: { userId: string | null; token: string; address: string };
  private readonly requests = new Map<string, Request>();
  private readonly aborts = new Set<PendingAbort>();
  /** Answers whose end was sent, by the payload of the ping behind it. */
  private readonly unconfirmed = new Map<string, AiStream>();
  private pings = 0;
  private refusals = 0;
  private strikes = 0;
  private line: AiFrameOf<'send' | 'resume' | 'abort'>[] = [];
  private working = false;
  private isClosed = false;
  private forgetExpiry: (() => void) | null = null;

  constructor(
    connection: AiConnection,
    claims: { userId: string | null; token: string; address: string },
    parts: AiSessionParts,
  ) {
    this.connection = connection;
    this.claims = claims;
    this.parts = parts;
  }

  get bound(): boolean {
    return this.userId !== '';
  }

  /** It has never said who it is. */
  get silent(): boolean {
    return !this.bound && !this.working;
  }

  onText(text: string): void {
    const waitMs = this.parts.rates.take(this, performance.now(), text.length);
    const parsed = parseAiFrame(text);
    if (waitMs > 0) {
      this.parts.metrics.rateLimited.inc();
      this.refusals += refusalCost(text);
      if (this.refusals > REFUSALS)
        this.connection.close(CLOSE.protocolViolation, 'too many frames, and no slower after being told');
      else if ('frame' in parsed && parsed.frame.type === 'abort') this.enqueue(parsed.frame);
      else if ('frame' in parsed) this.fail(parsed.frame.requestId, 'rate_limited');
      return;
    }
    this.refusals = 0;
    if ('frame' in parsed) {
      this.strikes = 0;
      this.enqueue(parsed.frame);
      return;
    }
    this.parts.metrics.protocolErrors.inc();
    if (parsed.requestId === undefined) {
      this.connection.close(CLOSE.protocolViolation, parsed.reason);
      return;
    }
    this.fail(parsed.requestId, 'invalid_frame', parsed.reason);
    if (++this.strikes >= STRIKES)
      this.connection.close(CLOSE.protocolViolation, `${STRIKES} frames in a row made no sense`);
  }

  onDrain(): void {
    const streams: AiStream[] = [];
    for (const { stream } of this.requests.values()) if (stream) streams.push(stream);
    this.parts.aiDesk.drain(streams);
  }

  onPong(payload: string): void {
    const stream = this.unconfirmed.get(payload);
    if (!stream) return;
    this.unconfirmed.delete(payload);
    this.settle(stream);
  }

  onClose(): void {
    this.isClosed = true;
    this.forgetExpiry?.();
    if (this.bound) this.parts.door.leave(this);
    this.parts.addressLimit.leave(this.claims.address);
    // Nobody reads an answer any more, but who pressed stop before leaving has stopped: `work` sees to that, by `requests`.
    this.line = this.bound ? this.line.filter(({ type }) => type === 'abort') : [];
    for (const { stream } of this.requests.values()) if (stream) this.parts.aiDesk.leave(stream);
    this.unconfirmed.clear();
    for (const abort of [...this.aborts]) abort.run(); // stop was pressed before the page went
  }

  closeWith(code: number, reason: string): void {
    this.connection.close(code, reason);
  }

  private enqueue(frame: AiFrameOf<'send' | 'resume' | 'abort'>): void {
    if (this.line.length >= LINE_FRAMES) {
      this.fail(frame.requestId, 'rate_limited', `at most ${LINE_FRAMES} frames may wait for an answer`);
      return;
    }
    this.line.push(frame);
    if (!this.working) void this.work();
  }

  private async work(): Promise<void> {
    this.working = true;
    for (let frame = this.line.shift(); frame; frame = this.line.shift()) {
      try {
        if (this.bound || (await this.bind(frame))) await this.handle(frame);
      } catch (error) {
        if (error instanceof RivuletError) {
          this.fail(frame.requestId, error.code, error.message);
          if (error.code === 'banned' || error.code === 'locked')
            this.connection.close(CLOSE.banned, error.message);
        } else {
          logFrameFailure(this.parts.log, { user: this.userId, frame: frame.type }, error);
          this.fail(frame.requestId, 'internal');
        }
      }
    }
    this.working = false;
  }

  /** Who it is, from the handshake, else from the frame's headers and body. */
  private async bind(frame: AiFrameOf<'send' | 'resume' | 'abort'>): Promise<boolean> {
    const { connection, claims } = this;
    const headers = frame.type === 'abort' ? {} : (frame.headers ?? {});
    const body = frame.type === 'abort' ? {} : (frame.body ?? {});
    try {
      const claimed = readClaim(claims.userId ?? body.userId);
      const token = claims.token || readBearer(headers.authorization ?? '');
      const identity = await this.parts.authenticate(claimed, token);
      if (this.isClosed) return false;
      this.userId = identity.userId;
      this.parts.door.enter(this);
      if (identity.expiresMs !== null)
        this.forgetExpiry = whenExpired(identity.expiresMs, () =>
          connection.close(CLOSE.unauthorized, 'the token has expired'),
        );
      return true;
    } catch (error) {
      if (!(error instanceof RivuletError)) throw error;
      this.fail(frame.requestId, error.code, error.message);
      connection.close(closeCodeFor(error.code), error.message);
      return false;
    }
  }

  private async handle(frame: AiFrameOf<'send' | 'resume' | 'abort'>): Promise<void> {
    switch (frame.type) {
      case 'send':
        return this.ask(frame);
      case 'resume':
        return this.resume(frame);
      case 'abort':
        return this.abort(frame);
      default:
        frame satisfies never;
    }
  }

  private async ask(frame: AiFrameOf<'send'>): Promise<void> {
    const { aiDesk, maxFrameBytes } = this.parts;
    for (const abort of [...this.aborts]) if (abort.chat === conversationOf(frame.id)) await abort.run();
    const read = readQuestion({ ...frame.body, ...frame }, maxFrameBytes);
    if ('code' in read) throw new RivuletError(read.code, read.message);
    const request = this.open(frame.requestId, 'send', read.question.messageId);
    if (request) await this.follow(request, aiDesk.ask(this.userId, read.question, this.sink(request), true));
  }

  private async resume(frame: AiFrameOf<'resume'>): Promise<void> {
    if (frame.lastSequence !== undefined)
      throw new RivuletError(
        'invalid_frame',
        'lastSequence is not supported: a resume replays from the start',
      );
    const chat = conversationOf(frame.id);
    for (const abort of this.aborts) {
      if (abort.chat !== chat) continue;
      clearTimeout(abort.timer);
      this.aborts.delete(abort);
    }
    // What was sent to the end on this very socket has reached the client before its next frame's answer.
    for (const [payload, stream] of this.unconfirmed) {
      if (stream.chat !== chat) continue;
      this.unconfirmed.delete(payload);
      await this.parts.aiDesk.settle(stream.user, stream.chat, stream.messageId);
    }
    const request = this.open(frame.requestId, 'resume', chat);
    if (!request) return;
    const stream = await this.follow(
      request,
      this.parts.aiDesk.resume(this.userId, frame.id, this.sink(request), true),
    );
    if (!stream) this.send({ type: 'no-active', requestId: request.id });
  }

  private open(id: string, kind: Request['kind'], about: string): Request | null {
    const underWay = this.requests.get(id);
    if (underWay?.about === about) return null; // the same again: it is being answered
    if (underWay) throw new RivuletError('invalid_frame', `requestId ${id} has another answer under way`);
    if (this.requests.size >= MOST_REQUESTS)
      throw new RivuletError('too_many_active', `at most ${MOST_REQUESTS} answers on one connection`);
    const request: Request = { id, kind, about, sequence: 0, stream: null };
    this.requests.set(id, request);
    return request;
  }

  private async follow(request: Request, opening: Promise<AiStream | null>): Promise<AiStream | null> {
    let stream: AiStream | null = null;
    try {
      stream = await opening;
    } finally {
      if (!stream) this.requests.delete(request.id);
    }
    if (!stream) return null;
    request.stream = stream;
    if (this.isClosed) this.parts.aiDesk.leave(stream);
    else if (request.sequence < 0) this.ended(request, stream); // it was all there
    return stream;
  }

  /** Writes one request's frames. */
  private sink(request: Request): Sink {
    const { connection } = this;
    const { id } = request;
    let isStarted = false;
    return {
      chunk: (chunk) => {
        if (request.kind === 'resume' && !isStarted) this.send({ type: 'start', requestId: id });
        isStarted = true;
        this.send({ type: 'chunk', requestId: id, sequence: request.sequence++, chunk });
      },
      end: () => {
        request.sequence = -1;
        this.send({ type: 'end', requestId: id });
        if (request.stream) this.ended(request, request.stream);
      },
      isOpen: () => connection.open,
      isSlow: () => connection.slow,
    };
  }

  /** Its end was sent. The answer to a ping behind it says that it has arrived. */
  private ended(request: Request, stream: AiStream): void {
    if (!this.requests.delete(request.id)) return;
    const payload = String(++this.pings);
    this.unconfirmed.set(payload, stream);
    if (this.unconfirmed.size > MOST_UNCONFIRMED)
      this.unconfirmed.delete(this.unconfirmed.keys().next().value!);
    setImmediate(() => this.connection.ping(payload)); // once this turn has sent all it has
  }

  private settle(stream: AiStream): void {
    this.parts.aiDesk
      .settle(stream.user, stream.chat, stream.messageId)
      .catch((error: Error) => this.parts.log.warn({ err: error.message }, 'a chat was not settled'));
  }

  private async abort(frame: AiFrameOf<'abort'>): Promise<void> {
    const request = this.requests.get(frame.requestId);
    if (!request?.stream) return; // it has ended, or never was
    const { stream } = request;
    this.requests.delete(request.id);
    this.parts.aiDesk.leave(stream);
    const cancel = async () => {
      await this.parts.aiDesk.cancel(stream.user, stream.chat, stream.messageId, true);
    };
    if (request.kind === 'send') return cancel();
    const pending: PendingAbort = {
      chat: stream.chat,
      timer: setTimeout(() => pending.run(), ABORT_GRACE_MS),
      run: () => {
        clearTimeout(pending.timer);
        if (!this.aborts.delete(pending)) return Promise.resolve();
        return cancel().catch((error: Error) =>
          this.parts.log.warn({ err: error.message, user: stream.user }, 'a stop came to nothing'),
        );
      },
    };
    this.aborts.add(pending);
    if (this.isClosed) await pending.run(); // no other resume will follow
  }

  private fail(requestId: string, code: ErrorCode, message: string = ERRORS[code].message): void {
    this.send({ type: 'error', requestId, errorText: message });
  }

  private send(frame: object): void {
    this.connection.send(JSON.stringify(frame));
  }
}

/** @throws RivuletError invalid_frame */
export function readClaim(userId: unknown): string | null {
  if (userId === undefined || userId === null) return null;
  const parsed = parseUserId(userId);
  if ('reason' in parsed) throw new RivuletError('invalid_frame', parsed.reason);
  return parsed.userId;
}
