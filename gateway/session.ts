import { randomBytes } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { ERRORS, type ErrorCode, RivuletError } from '../shared/errors.ts';
import type { GenerationStore } from '../shared/generation-store.ts';
import { compareInboxIds, parseInboxId } from '../shared/inbox.ts';
import type { Keys } from '../shared/keys.ts';
import {
  CLOSE,
  type ClientFrame,
  type ClientFrameOf,
  isOpenStatus,
  parseClientFrame,
  parseUserId,
  type ServerFrame,
} from '../shared/protocol.ts';
import { describeError, isConnectionError, type RedisConnection } from '../shared/redis.ts';
import type { RequestQueue } from '../shared/request-queue.ts';
import type { Tracing } from '../shared/tracing.ts';
import type { AdmissionDesk } from './admission.ts';
import { watchAnswer, watchOrEnd } from './answer-watch.ts';
import { type Authenticate, whenExpired } from './authenticate.ts';
import { cancelGeneration, cancelWhenBack } from './cancel.ts';
import { type Delivery, type Follower, GONE_LOOK_MS, type Subscription } from './delivery.ts';
import type { Mailbox, Mailboxes, MailboxOwner, Opened } from './mailboxes.ts';
import type { GatewayMetrics } from './metrics.ts';
import { nowMs } from './now-ms.ts';
import type { PeopleDesk } from './people-desk.ts';
import type { QueuePlaces } from './queue-places.ts';
import { type AddressLimit, type FrameRates, frameCost, type Rated } from './rate-limits.ts';

/**
 * One client. States: new → (init) binding → bound → closed. Knows nothing of uWS.
 *
 * Frames that need Redis are handled one after the other, in the order in which they came, so that a cancel never
 * overtakes its chat; the line is bounded. Heartbeats answer at once, in every state. Nothing is allocated for an
 * idle client but this object.
 */

const LINE_FRAMES = 64; // frames of one client that may wait for Redis
const LOOKS = 2; // for an answer that Redis does not know any more, by who comes back to it
export const STRIKES = 20; // frames that make no sense, in a row, until we hang up
export const REFUSALS = 1_000; // frames above the rate, in a row, until we hang up
const AWAY = 'The message store does not answer.';
/** A command whose answer is lost may have been carried out, or be carried out yet. */
const UNKNOWN_OUTCOME =
  'It is not known whether this was kept; sent again with the same messageId it counts once.';

export interface ClientConnection {
  send(text: string, soon?: boolean): void;
  close(code: number, reason: string): void;
  readonly open: boolean;
  readonly slow: boolean;
}

/** The close code that goes with a refused `init`. */
export function closeCodeFor(code: ErrorCode): number {
  if (code === 'invalid_frame') return CLOSE.badUserId;
  return code === 'internal' ? CLOSE.unavailable : CLOSE.unauthorized;
}

/** As how many refused frames one counts: what is refused has been read. One alone is never too much. */
export function refusalCost(text: string): number {
  return Math.min(frameCost(text.length), REFUSALS / 10);
}

/** A frame that could not be handled. An outage of Redis is told without a stack: it is nothing of ours. */
export function logFrameFailure(log: Logger, facts: { user: string; frame: string }, error: unknown): void {
  if (isConnectionError(error))
    log.warn({ ...facts, err: describeError(error) }, 'frame failed: redis is away');
  else log.error({ ...facts, err: error }, 'frame failed');
}

/** What all sessions of a gateway share. */
export interface SessionParts {
  node: string;
  keys: Keys;
  redis: RedisConnection;
  store: GenerationStore;
  queue: RequestQueue;
  desk: AdmissionDesk;
  places: QueuePlaces;
  delivery: Delivery;
  mailboxes: Mailboxes;
  people: PeopleDesk;
  authenticate: Authenticate;
  metrics: GatewayMetrics;
  tracing: Tracing | null;
  rates: FrameRates;
  addressLimit: AddressLimit;
  heartbeatMs: number;
  limits: { maxFrameBytes: number; userActive: number; queue: number; messageBytes: number };
  log: Logger;
}

export class Session implements Rated, Follower, MailboxOwner {
  readonly connection: ClientConnection;
  private readonly parts: SessionParts;
  private state: 'new' | 'binding' | 'bound' | 'closed' = 'new';
  userId = '';
  device = '';
  connectionId = '';
  private urlToken: string;
  private readonly address: string;
  private strikes = 0;
  private refusals = 0;
  rateMs = 0;
  private line: ClientFrame[] | null = null;
  /** What this connection follows, by message id; null while it follows nothing. */
  private following: Map<string, Subscription> | null = null;
  /** What it followed when it was closed with stops in line. */
  private left: Set<string> | null = null;
  private mailbox: Mailbox | null = null;
  private forgetExpiry: (() => void) | null = null;
  readonly openedMs = nowMs();

  constructor(connection: ClientConnection, urlToken: string, address: string, parts: SessionParts) {
    this.connection = connection;
    this.urlToken = urlToken;
    this.address = address;
    this.parts = parts;
  }

  get open(): boolean {
    return this.connection.open;
  }

  get slow(): boolean {
    return this.connection.slow;
  }

  get bound(): boolean {
    return this.state === 'bound';
  }

  /** It has never said who it is. */
  get silent(): boolean {
    return this.state === 'new';
  }

  onText(text: string): void {
    const waitMs = this.parts.rates.take(this, nowMs(), text.length);
    if (waitMs > 0) {
      this.refuse(text, waitMs);
      return;
    }
    this.refusals = 0;
    if (text === 'PING') {
      this.send({ type: 'heartbeat', time: Date.now() });
      return;
    }
    const parsed = parseClientFrame(text);
    if ('reason' in parsed) {
      this.parts.metrics.protocolErrors.inc();
      if ((parsed.type === 'chat' || parsed.type === 'send') && parsed.messageId && this.state === 'bound')
        this.reject(parsed.messageId, 'invalid_frame', parsed.reason);
      else this.sendError('invalid_frame', parsed.reason, parsed.messageId);
      if (++this.strikes >= STRIKES)
        this.connection.close(CLOSE.protocolViolation, `${STRIKES} frames in a row made no sense`);
      return;
    }
    this.strikes = 0;
    const { frame } = parsed;
    switch (frame.type) {
      case 'heartbeat':
        this.send({ type: 'heartbeat', time: Date.now() });
        return;
      case 'init':
        if (this.state !== 'new') this.sendError('invalid_frame', 'init was sent before');
        else if (frame.inboxAfter && !parseInboxId(frame.inboxAfter))
          this.sendError('invalid_frame', 'inboxAfter must be an inbox id');
        else void this.init(frame);
        return;
      default:
        if (this.state === 'new') {
          this.sendError('not_ready', 'send an init frame first');
          return;
        }
        this.enqueue(frame);
    }
  }

  /** A frame above the rate: answered, not handled. Who does not listen to the answers is cut off. */
  private refuse(text: string, retryAfterMs: number): void {
    this.refusals += refusalCost(text);
    if (this.refusals > REFUSALS) {
      this.connection.close(CLOSE.protocolViolation, 'too many frames, and no slower after being told');
      return;
    }
    this.parts.metrics.rateLimited.inc();
    const parsed = this.bound ? parseClientFrame(text) : null;
    const { message } = ERRORS.rate_limited;
    if (parsed && 'frame' in parsed && 'messageId' in parsed.frame)
      this.reject(parsed.frame.messageId, 'rate_limited', message, retryAfterMs);
    else this.send({ type: 'error', code: 'rate_limited', message, retryAfterMs });
  }

  onDrain(): void {
    if (this.following) this.parts.delivery.onDrain([...this.following.values()]);
    if (this.mailbox) this.parts.mailboxes.onDrain(this.mailbox);
  }

  onClose(): void {
    this.state = 'closed';
    this.parts.addressLimit.leave(this.address);
    this.forgetExpiry?.();
    // Nobody waits for an answer any more, but who pressed stop before leaving has stopped: `work` sees to that.
    this.line = this.line?.filter(({ type }) => type === 'cancel') ?? null;
    if (this.line && this.following) this.left = new Set(this.following.keys());
    if (this.following)
      for (const subscription of [...this.following.values()]) this.parts.delivery.drop(subscription);
    this.following = null;
    if (this.mailbox) this.parts.mailboxes.close(this.mailbox);
    this.mailbox = null;
  }

  /** Called by delivery when a subscription has ended. */
  onEnded(subscription: Subscription): void {
    if (this.following?.get(subscription.messageId) !== subscription) return;
    this.following.delete(subscription.messageId);
    if (this.following.size === 0) this.following = null;
  }

  private async init(frame: ClientFrameOf<'init'>): Promise<void> {
    const { connection, parts } = this;
    this.state = 'binding';
    let claimed: string | null = null;
    if (frame.userId !== undefined && frame.userId !== null) {
      const parsed = parseUserId(frame.userId);
      if ('reason' in parsed) {
        this.sendError('invalid_frame', parsed.reason);
        connection.close(CLOSE.badUserId, parsed.reason);
        return;
      }
      claimed = parsed.userId;
    }
    try {
      const identity = await parts.authenticate(claimed, frame.token ?? this.urlToken);
      if (!connection.open) return;
      this.urlToken = '';
      this.userId = identity.userId;
      this.device = frame.device ?? 'default';
      this.connectionId = `${parts.node}-${randomBytes(6).toString('base64url')}`;
      if (identity.expiresMs !== null)
        this.forgetExpiry = whenExpired(identity.expiresMs, () =>
          connection.close(CLOSE.unauthorized, 'the token has expired'),
        );
    } catch (error) {
      if (!connection.open) return;
      const refusal = error instanceof RivuletError ? error : new RivuletError('internal');
      if (refusal !== error) parts.log.error({ err: error }, 'credentials not checked');
      this.sendError(refusal.code, refusal.message);
      connection.close(closeCodeFor(refusal.code), refusal.message);
      return;
    }
    const opened = await this.enter(parseInboxId(frame.inboxAfter ?? '') ?? '');
    if (!opened) return;
    this.state = 'bound';
    this.send({
      type: 'ready',
      userId: this.userId,
      connectionId: this.connectionId,
      node: parts.node,
      heartbeatMs: parts.heartbeatMs,
      limits: parts.limits,
    });
    opened.start();
    this.work();
  }

  /** Binds the user to this connection: the door, presence, the inbox. Null when the connection is closed now. */
  private async enter(inboxAfter: string): Promise<Extract<Opened, { state: 'bound' }> | null> {
    const { connection, parts } = this;
    let entered: Awaited<ReturnType<Mailboxes['open']>>;
    try {
      entered = await parts.mailboxes.open(this, inboxAfter);
    } catch (error) {
      parts.log.warn({ err: (error as Error).message, user: this.userId }, 'user not bound');
      this.sendError('internal', ERRORS.internal.message);
      connection.close(CLOSE.unavailable, 'try again');
      return null;
    }
    const { mailbox, opened } = entered;
    if (opened.state === 'refused') {
      this.sendError(opened.code, opened.message);
      connection.close(opened.close, opened.message);
      return null;
    }
    if (!connection.open) {
      parts.mailboxes.close(mailbox);
      return null;
    }
    this.mailbox = mailbox;
    return opened;
  }

  closeWith(code: number, reason: string): void {
    this.connection.close(code, reason);
  }

  private working = false;

  private enqueue(frame: ClientFrame): void {
    this.line ??= [];
    if (frame.type === 'ack' && this.joinAck(frame)) return;
    if (this.line.length >= LINE_FRAMES) {
      const message = `at most ${LINE_FRAMES} frames may wait for an answer`;
      if ('messageId' in frame) this.reject(frame.messageId, 'rate_limited', message);
      else this.sendError('rate_limited', message);
      return;
    }
    this.line.push(frame);
    this.work();
  }

  /** An inbox that is read at once brings an ack for each message: those that wait are one, of the latest. */
  private joinAck(frame: ClientFrameOf<'ack'>): boolean {
    const id = parseInboxId(frame.id);
    const waiting = this.line?.find((other) => other.type === 'ack');
    if (!id || !waiting) return false;
    const before = parseInboxId(waiting.id);
    if (before && compareInboxIds(id, before) > 0) waiting.id = frame.id;
    return before !== null;
  }

  /** Handles the frames in line; runs at most once at a time. */
  private work(): void {
    if (this.working || this.state !== 'bound' || !this.line) return;
    this.working = true;
    void (async () => {
      while (this.line && this.line.length > 0) {
        const frame = this.line.shift()!;
        try {
          await this.handle(frame);
        } catch (error) {
          this.fail(frame, error);
        }
      }
      this.line = null;
      this.working = false;
    })();
  }

  private fail(frame: ClientFrame, error: unknown): void {
    const { log } = this.parts;
    const facts = { user: this.userId, frame: frame.type };
    if (error instanceof RivuletError && error.code !== 'internal')
      log.debug({ ...facts, err: error.message }, 'frame refused');
    else logFrameFailure(log, facts, error);
    const code: ErrorCode = error instanceof RivuletError ? error.code : 'internal';
    const keeps = frame.type === 'chat' || frame.type === 'send';
    const away = keeps ? `${AWAY} ${UNKNOWN_OUTCOME}` : AWAY;
    const { message } = isConnectionError(error)
      ? { message: away }
      : error instanceof RivuletError
        ? error
        : ERRORS.internal;
    if ('messageId' in frame) this.reject(frame.messageId, code, message);
    else this.sendError(code, message);
  }

  private async handle(frame: ClientFrame): Promise<void> {
    switch (frame.type) {
      case 'chat':
        return this.chat(frame);
      case 'resume':
        return this.resume(frame);
      case 'cancel':
        return this.cancel(frame);
      case 'send':
      case 'ack':
      case 'join':
      case 'leave':
      case 'members':
      case 'groups':
      case 'presence': {
        const answer = await this.parts.people.handle(this.userId, this.device, frame);
        if (answer) this.send(answer);
        return;
      }
      case 'init':
      case 'heartbeat':
        return;
      default:
        frame satisfies never;
    }
  }

  private async chat(frame: ClientFrameOf<'chat'>): Promise<void> {
    const { desk, delivery, metrics } = this.parts;
    const { messageId } = frame;
    const started = performance.now();
    // What this connection follows already goes on until the question has been let in: it may be refused this time.
    let subscription = this.following?.has(messageId) ? null : this.follow(messageId);
    const watch = watchAnswer(this.userId, frame, started, this.parts);
    let admission: Awaited<ReturnType<AdmissionDesk['admit']>>;
    try {
      admission = await desk.admit(this.userId, frame, watch.trace);
    } catch (error) {
      watch.refused('internal');
      if (subscription) delivery.drop(subscription);
      throw error;
    }
    metrics.admission.observe((performance.now() - started) / 1000);
    if (admission.state === 'rejected') {
      if (subscription) delivery.drop(subscription);
      metrics.rejected.inc({ code: admission.code });
      watch.refused(admission.code);
      const { state, ...rejection } = admission;
      this.send({ type: 'rejected', messageId, ...rejection });
      return;
    }
    const { position } = admission;
    if (!subscription) {
      if (!this.connection.open) {
        watch.joined();
        return;
      }
      subscription = this.follow(messageId);
    }
    subscription.home = admission.home;
    if (admission.state === 'created') {
      metrics.admitted.inc();
      watchOrEnd(subscription, watch);
      this.send({ type: 'accepted', messageId, position, duplicate: false });
      subscription.waiting = true;
      subscription.toldPosition = position;
      delivery.release(subscription, '', [], false);
      return;
    }
    metrics.joined.inc();
    watch.joined();
    this.send({ type: 'accepted', messageId, position, duplicate: true });
    subscription.toldPosition = position;
    await this.attach(subscription, '');
  }

  private async resume(frame: ClientFrameOf<'resume'>): Promise<void> {
    this.parts.metrics.resumed.inc();
    await this.attach(this.follow(frame.messageId), frame.after ?? '');
  }

  /** Reads what is there, answers `resumed`, and goes on live. */
  private async attach(subscription: Subscription, after: string): Promise<void> {
    const { store, delivery, node, places } = this.parts;
    const { messageId } = subscription;
    let attached: Awaited<ReturnType<GenerationStore['attach']>>;
    try {
      attached = await store.attach(this.userId, messageId, node, after);
      // Who has seen some of it may come while its worker is about to make it again.
      for (let look = 0; look < LOOKS && attached.state === 'unknown' && after !== ''; look++) {
        await delay(GONE_LOOK_MS);
        if (subscription.state === 'ended') return;
        attached = await store.attach(this.userId, messageId, node, after);
      }
      if (attached.state === 'attached' && isOpenStatus(attached.status)) {
        subscription.home = attached.node;
        places.doubt(attached.node, this.userId, messageId);
      }
    } catch (error) {
      delivery.drop(subscription);
      throw error;
    }
    if (subscription.state === 'ended') return;
    if (attached.state === 'unknown') {
      delivery.drop(subscription);
      this.reject(messageId, 'unknown_message');
      return;
    }
    const { status, recovered, compacted, whole, entries, more } = attached;
    this.send({ type: 'resumed', messageId, recovered, compacted, status });
    subscription.waiting = status === 'queued' && entries.length === 0;
    delivery.release(subscription, recovered ? after : '', entries, more, whole);
    if (isOpenStatus(status) || entries.length > 0 || more) return;
    if (after !== '' && recovered)
      delivery.drop(subscription); // had seen all of it
    else delivery.lose(subscription); // its log was deleted
  }

  private async cancel(frame: ClientFrameOf<'cancel'>): Promise<void> {
    const { messageId } = frame;
    const mayComeBack = this.following?.has(messageId) || this.left?.has(messageId);
    if (await cancelGeneration(this.parts, this.userId, messageId)) return;
    if (!mayComeBack) {
      this.reject(messageId, 'unknown_message');
      return;
    }
    // Not in line: the frames behind it do not wait for that.
    cancelWhenBack(this.parts, this.userId, messageId).then(
      (cancelled) => {
        if (!cancelled) this.reject(messageId, 'unknown_message');
      },
      (error) => this.fail(frame, error),
    );
  }

  private follow(messageId: string): Subscription {
    const subscription = this.parts.delivery.hold(this, this.userId, messageId);
    this.following ??= new Map();
    this.following.set(messageId, subscription);
    return subscription;
  }

  private reject(
    messageId: string,
    code: ErrorCode,
    message: string = ERRORS[code].message,
    retryAfterMs?: number,
  ): void {
    const { temporary } = ERRORS[code];
    this.send({ type: 'rejected', messageId, code, message, temporary, retryAfterMs });
  }

  private sendError(code: ErrorCode, message: string, messageId?: string): void {
    this.send({ type: 'error', code, message, messageId });
  }

  send(frame: ServerFrame): void {
    this.connection.send(JSON.stringify(frame));
  }

  sendText(text: string, soon = false): void {
    this.connection.send(text, soon);
  }
}
