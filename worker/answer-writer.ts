import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { backoffMs } from '../shared/backoff.ts';
import { formatFrameId } from '../shared/frame-id.ts';
import {
  type Attempt,
  encodeFrame,
  encodeTerminal,
  encodeToken,
  type Finished,
  type GenerationStore,
  RECORD_TEXT_BYTES,
  ROUTES_MS,
  splitRoutes,
  type Terminal,
  tokenHead,
} from '../shared/generation-store.ts';
import { isConnectionError, PATIENT } from '../shared/redis.ts';
import { addressHead, encodeLines, type ReplyLines } from '../shared/reply-stream.ts';
import { byteLength } from '../shared/short-text.ts';
import type { Appender } from './appender.ts';

/**
 * Writes the answer of one attempt into its log. `push` never waits: text is kept, and appended at the end of the
 * event-loop turn when nothing of this answer is in flight; else it coalesces until the append returns, or until
 * `COALESCE_MS`.
 *
 * A first attempt may be written before Redis was asked for it (`expect`): what opens it is what is written first, at the
 * end of the turn (where many begin, of the next one). An answer that is complete by then begins and ends in one step, and
 * needs no log at all.
 *
 * States: (expected →) open → (an append failed) mending → open | fenced; open → ended. An expected one may turn out to
 * be stale: Redis says that it is no first attempt, and has written nothing of it. A refusal is read, not guessed: mending
 * asks Redis who owns the log, appends again what it lacks, makes the record again if that is gone too, and only then says
 * "fenced".
 * Memory: the attempt's whole text and its question, because a failover may take any of them.
 */

const COALESCE_MS = 20; // upper bound that an append in flight may hold text back; about one token's pace
const FRAME_UNITS = 16_384; // of one frame: what a slow client has at hand is whole frames
const MOST_IN_FLIGHT = 8; // whole frames of one answer on their way

export class AnswerWriter {
  readonly attempt: Attempt;
  readonly logKey: string;
  private readonly addressHead: string;
  private readonly tokenHead: string;
  /** Text of each token frame; frame `seq` is at `seq - 1`. */
  private readonly texts: string[] = [];
  /** Text that waits: whole frames, and what does not fill one yet. */
  private wholeFrames: string[] = [];
  private pending = '';
  /** The first half of a character whose second half comes with the next text. UTF-8 has nothing for half a character. */
  private half = '';
  private inFlight = 0;
  private publishedSeq = 0;
  /** The attempt has begun and has its log. Until then at most one append is in flight: the one that does that. */
  private opened = false;
  /** What would open it was sent, and its answer lost: clients may have been shown what a failover has forgotten. */
  private openedPerhaps = false;
  /** What is in flight was sent in a script: should Redis not know that any more, a later append would overtake it. */
  private alone = false;
  private startPublished = false;
  private routes: string[] = []; // as they were when they were last asked for
  private routesMs = Number.NEGATIVE_INFINITY;
  private scheduled = false;
  private mending: Promise<void> | null = null;
  private holdTimer: NodeJS.Timeout | undefined;
  private waiters: (() => void)[] = [];
  private units = 0;
  private bytes = 0;
  private ended = false;
  /** Nothing more is written: the attempt was replaced, or ended by somebody else, or is stale. */
  fenced = false;
  /** It was expected to be the first attempt, and is not. */
  stale = false;
  lastAppendMs = performance.now();

  private readonly parts: {
    store: GenerationStore;
    appender: Appender;
    logger: () => Logger;
    /** With the routes, what the record is made of again, should it be lost while the attempt runs. */
    payload: string;
    tries: number;
    trace: string;
    /** Called once, when `fenced` is set. */
    onFenced: () => void;
    /** Called when the log was compared with what was written, and completed. @param again the record was made again */
    onMended: (again: boolean) => void;
    /** The worker is leaving: a log that cannot be compared now is left to who comes after. */
    isLeaving: () => boolean;
  };

  constructor(attempt: Attempt, parts: AnswerWriter['parts']) {
    this.attempt = attempt;
    this.logKey = parts.store.logKey(attempt);
    this.addressHead = addressHead(attempt.user, attempt.messageId);
    this.tokenHead = tokenHead(attempt.messageId);
    this.parts = parts;
  }

  /** The answer is complete, or was given up: nothing more is appended. */
  get isEnded(): boolean {
    return this.ended;
  }

  /** Whether its log was ever made, as far as is known here. */
  get hasLog(): boolean {
    return this.opened;
  }

  /** Whether clients may have been shown some of it. */
  get mayBeShown(): boolean {
    return this.opened || this.openedPerhaps;
  }

  /** UTF-16 units of the text so far. */
  get length(): number {
    return this.units;
  }

  /** Whether the text so far has more than so many bytes. Counted only when it may: a UTF-16 unit takes three at most. */
  exceeds(bytes: number): boolean {
    if (this.bytes + this.pending.length * 3 <= bytes) return false;
    return this.bytes + Buffer.byteLength(this.pending) > bytes;
  }

  /** As much of a text as the answer may still have, in whole characters, and one more, so that it exceeds. */
  fitting(text: string, bytes: number): string {
    const room = bytes - this.bytes - Buffer.byteLength(this.pending);
    if (Buffer.byteLength(text) <= room) return text;
    const bytesKept = Buffer.from(text).subarray(0, Math.max(0, room));
    const kept = new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytesKept, { stream: true });
    return kept + String.fromCodePoint(text.codePointAt(kept.length)!);
  }

  /** The attempt has begun, and its start is in the log, after the entry `before`. */
  started(routes: string[], before: string): void {
    this.opened = true;
    this.routes = routes;
    this.routesMs = performance.now();
    this.publishStart(routes, before);
  }

  /** It is likely to be the first attempt, and `node` to be who wants it. */
  expect(node: string): void {
    this.routes = [node];
    this.schedule();
  }

  private publishStart(routes: string[], before: string): void {
    if (this.startPublished) return;
    this.startPublished = true;
    this.publish(routes, this.startLines(before));
  }

  idOf(seq: number): string {
    return formatFrameId(this.attempt.attempt, seq);
  }

  private startLines(before: string): ReplyLines {
    const { messageId, attempt } = this.attempt;
    const id = this.idOf(0);
    return encodeLines(
      this.addressHead,
      before,
      id,
      's',
      encodeFrame({ type: 'start', messageId, id, attempt }),
    );
  }

  textLines(seq: number): ReplyLines {
    const id = this.idOf(seq);
    const frame = encodeToken(this.tokenHead, id, this.texts[seq - 1]!);
    return encodeLines(this.addressHead, this.idOf(seq - 1), id, 't', frame);
  }

  push(text: string): void {
    if (text === '' || this.fenced || this.ended) return;
    this.units += text.length;
    this.pending += this.whole(text);
    if (this.pending.length > FRAME_UNITS) this.cut();
    if (this.canTake()) this.schedule();
    else this.holdTimer ??= setTimeout(() => this.schedule(), COALESCE_MS);
  }

  /** The text with the half character that waited for it, without the one at its own end, and with none between. */
  private whole(text: string): string {
    const joined = this.half + text;
    this.half = isHighSurrogate(joined, joined.length - 1) ? joined.at(-1)! : '';
    return (this.half === '' ? joined : joined.slice(0, -1)).toWellFormed(); // as the log would have it: all see the same
  }

  /** Moves what fills frames out of `pending`; never between the halves of a character. */
  private cut(): void {
    while (this.pending.length > FRAME_UNITS) {
      const end = isHighSurrogate(this.pending, FRAME_UNITS - 1) ? FRAME_UNITS - 1 : FRAME_UNITS;
      const frame = this.pending.slice(0, end);
      this.pending = this.pending.slice(end);
      this.wholeFrames.push(frame);
      this.bytes += Buffer.byteLength(frame);
    }
  }

  private get hasText(): boolean {
    return this.wholeFrames.length > 0 || this.pending !== '';
  }

  /** What is in flight must not be overtaken. */
  private get mustWait(): boolean {
    return this.inFlight > 0 && (!this.opened || this.alone);
  }

  /** Whether there is text to append now: whole frames follow each other, less than that waits for the one before. */
  private canTake(): boolean {
    if (this.mustWait) return false;
    return this.wholeFrames.length > 0
      ? this.inFlight < MOST_IN_FLIGHT
      : this.pending !== '' && this.inFlight === 0;
  }

  private dropText(): void {
    this.wholeFrames = [];
    this.pending = '';
  }

  /**
   * Ends the answer, and acknowledges its request where that is one step; null when `fenced`.
   */
  async finish(terminal: Terminal): Promise<Extract<Finished, { state: 'ended' }> | null> {
    const { store, logger } = this.parts;
    while (!this.fenced && this.wholeFrames.length > 0) {
      if (this.canTake()) this.schedule();
      await this.changed();
    }
    this.ended = true;
    clearTimeout(this.holdTimer);
    this.pending += this.half.toWellFormed();
    this.half = '';
    const { messageId } = this.attempt;
    const { type, ...rest } = terminal;
    const json = JSON.stringify(rest);
    const deadline = performance.now() + PATIENT.deadlineMs;
    for (let round = 1; ; round++) {
      while (!this.fenced && (this.inFlight > 0 || this.mending)) await this.changed();
      if (this.fenced) return null;
      const text = this.pending;
      const last = text === '' ? null : { seq: this.texts.length + 1, text };
      const seq = this.texts.length + (last ? 2 : 1);
      try {
        const finished = await store.finish(this.attempt, last, seq, terminal, {
          begun: this.opened,
          textBefore: this.exceeds(RECORD_TEXT_BYTES) ? null : this.texts.join(''),
        });
        if (finished.state === 'stale') {
          this.stale = true;
          this.setFenced();
          return null;
        }
        if (finished.state !== 'ended') {
          await this.mend(finished.state === 'behind' ? 'the log lacks frames' : 'the end was refused');
          continue;
        }
        if (last) {
          this.pending = '';
          this.texts.push(text);
          this.parts.appender.count();
        }
        this.publishStart(finished.routes, '');
        this.publishTexts(finished.routes);
        const id = this.idOf(seq);
        const frame = encodeTerminal(messageId, id, type, json);
        this.publish(finished.routes, encodeLines(this.addressHead, this.idOf(seq - 1), id, 'e', frame));
        return finished;
      } catch (error) {
        // Safe to repeat: `finish` knows its own terminal frame.
        if (!isConnectionError(error) || performance.now() > deadline) throw error;
        logger().warn({ err: (error as Error).message }, 'redis is away; the end of this answer waits');
        await delay(backoffMs(round, 50, 1_000));
      }
    }
  }

  /** Waits until it has begun and everything pushed so far is in the log. False when fenced. */
  async settled(): Promise<boolean> {
    while (!this.fenced && (this.inFlight > 0 || this.mending || this.hasText || !this.opened)) {
      if (this.inFlight === 0 && !this.mending) this.schedule();
      await this.changed();
    }
    return !this.fenced;
  }

  /**
   * Gives the attempt up so that another may be opened, once everything that was said is in the log.
   * @param countsTry whether it was one of the tries that a request has
   * @returns false when fenced
   */
  async release(countsTry: boolean): Promise<boolean> {
    await this.settled();
    this.ended = true;
    clearTimeout(this.holdTimer);
    while (!this.fenced) {
      if (await this.parts.store.release(this.attempt, countsTry)) return true;
      await this.mend('the release was refused');
    }
    return false;
  }

  /** Compares the log with what was written, after a reconnect. */
  check(): void {
    const written = this.opened || this.inFlight > 0;
    if (written && !this.ended && !this.fenced) void this.mend('the connection was lost');
  }

  setFenced(): void {
    if (this.fenced) return;
    this.fenced = true;
    this.dropText();
    clearTimeout(this.holdTimer);
    this.parts.onFenced();
    this.notify();
  }

  // What the appender calls.

  /**
   * What to append next, or null. `opening` begins the attempt and makes its log, with the first text if there is any
   * (`seq` 0: none). Nothing else of this answer is sent meanwhile: were the log made late, a later frame could get in
   * without the first.
   */
  take(): { seq: number; text: string | null; opening: boolean } | null {
    this.scheduled = false;
    if (this.fenced || this.mending || this.ended) return null;
    const opening = !this.opened;
    if (this.mustWait || (!opening && !this.hasText)) return null;
    const text = this.hasText ? this.takeText() : null;
    this.inFlight++;
    if (this.wholeFrames.length > 0 && this.canTake()) this.schedule();
    return { seq: this.texts.length, text, opening };
  }

  /** Asked after `take`: whether it is time to ask who wants its frames. Then `routed` is called with the answer. */
  asksRoutes(now: number): boolean {
    if (now - this.routesMs < ROUTES_MS) return false;
    this.routesMs = now;
    return this.opened; // what opens it answers with them
  }

  /** @param routes null: the record is gone */
  routed(routes: string | null): void {
    if (routes === null) {
      this.check();
      return;
    }
    const known = this.routes;
    this.routes = splitRoutes(routes);
    // What was stored before this was known has gone to the others only. It shows a new node that it lacks something.
    if (this.inFlight > 0 || this.publishedSeq === 0) return;
    for (const node of this.routes)
      if (!known.includes(node)) this.parts.appender.publish(node, this.textLines(this.publishedSeq));
  }

  private takeText(): string {
    let text = this.wholeFrames.shift();
    if (text === undefined) {
      text = this.pending;
      this.pending = '';
      this.bytes += byteLength(text);
    }
    this.texts.push(text);
    return text;
  }

  /** The frames that a log is made with, for the one node that wants them; null when there are more of these. */
  firstFrames(): { node: string; frames: ReplyLines[] } | null {
    if (this.routes.length !== 1) return null;
    const frames = [this.startLines(''), ...this.texts.map((_, index) => this.textLines(index + 1))];
    return { node: this.routes[0]!, frames };
  }

  /** The one node that wants the frame `seq`, which was just taken, when all before it are out; else null. */
  loneRoute(seq: number): string | null {
    const { routes } = this;
    const isNext = this.startPublished && this.publishedSeq === seq - 1 && this.inFlight === 1;
    return isNext && routes.length === 1 && this.wholeFrames.length === 0 ? routes[0]! : null;
  }

  /** What was just taken goes with a script: nothing else of this answer is sent meanwhile. */
  goAlone(): void {
    this.alone = true;
  }

  /** @param publishedTo the node that the frames were sent to in the same step */
  stored(seq: number, publishedTo: string | null, now: number): void {
    this.inFlight--;
    this.alone = false;
    this.opened = true;
    this.lastAppendMs = now;
    if (publishedTo !== null) {
      this.startPublished = true;
      this.publishedSeq = seq;
    }
    if (!this.mending && !this.fenced) {
      this.publishStart(this.routes, '');
      this.publishTexts(this.routes, seq);
      if (publishedTo !== null && seq > 0)
        for (const node of this.routes)
          if (node !== publishedTo) this.parts.appender.publish(node, this.textLines(seq));
    }
    if (this.canTake()) this.schedule();
    this.notify();
  }

  /** @param error null: the log is gone, or this is no first attempt */
  refused(seq: number, error: Error | null): void {
    this.inFlight--;
    this.alone = false;
    if (!this.opened && error === null) {
      this.stale = true;
      this.setFenced();
      return;
    }
    if (!this.opened) this.openedPerhaps = true;
    this.parts.logger().debug({ seq, err: error?.message }, 'append refused');
    void this.mend(error?.message ?? 'the log is gone');
    this.notify();
  }

  private schedule(): void {
    clearTimeout(this.holdTimer);
    this.holdTimer = undefined;
    if (this.scheduled || this.mending || this.fenced || this.ended) return;
    this.scheduled = true;
    this.parts.appender.schedule(this);
  }

  /** Publishes stored frames that were not published yet, up to `upTo`. */
  private publishTexts(routes: string[], upTo = this.texts.length): void {
    for (let seq = this.publishedSeq + 1; seq <= upTo; seq++) this.publish(routes, this.textLines(seq));
    this.publishedSeq = Math.max(this.publishedSeq, upTo);
  }

  private publish(routes: string[], frame: ReplyLines): void {
    for (const node of routes) this.parts.appender.publish(node, frame);
  }

  private mend(reason: string): Promise<void> {
    this.mending ??= this.compareAndRestore(reason).finally(() => {
      this.mending = null;
      if (this.canTake()) this.schedule();
      this.notify();
    });
    return this.mending;
  }

  private async compareAndRestore(reason: string): Promise<void> {
    const { store, logger, isLeaving } = this.parts;
    while (this.inFlight > 0 && !this.fenced) await this.changed(); // their answers come first: rejected or not
    const deadline = performance.now() + PATIENT.deadlineMs;
    for (let round = 1; !this.fenced; round++) {
      try {
        let restored = await store.restore(this.attempt, this.texts);
        // Only one that is known to have begun was open after its request was appended.
        if (restored.state === 'missing' && this.opened) restored = await this.makeAgain();
        if (restored.state === 'restored') {
          this.lastAppendMs = performance.now();
          this.opened = true;
          this.publishStart(restored.routes, '');
          this.publishTexts(restored.routes);
          this.parts.onMended(restored.again);
          logger().info({ reason, frames: this.texts.length }, 'log compared with what was written');
          return;
        }
        logger().info({ reason, state: restored.state }, 'attempt lost');
        this.stale = !this.mayBeShown;
        this.setFenced();
        return;
      } catch (error) {
        if (!isConnectionError(error) || performance.now() > deadline || isLeaving()) {
          logger().error({ err: error }, 'the log cannot be compared; giving the attempt up');
          this.setFenced();
          return;
        }
        await delay(backoffMs(round, 50, 1_000));
      }
    }
  }

  private makeAgain(): ReturnType<GenerationStore['restore']> {
    const { store, payload, tries, trace } = this.parts;
    return store.restore(this.attempt, this.texts, { payload, tries, trace, routes: this.routes });
  }

  private changed(): Promise<void> {
    return new Promise((resolve) => this.waiters.push(resolve));
  }

  private notify(): void {
    for (const resolve of this.waiters.splice(0)) resolve();
  }
}

function isHighSurrogate(text: string, index: number): boolean {
  const unit = text.charCodeAt(index);
  return unit >= 0xd800 && unit < 0xdc00;
}
