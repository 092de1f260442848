import type { Logger } from 'pino';
import { RivuletError } from '../shared/errors.ts';
import { compareFrameIds, parseFrameId } from '../shared/frame-id.ts';
import { type GenerationStore, type LogEntry, type Progress, ROUTES_MS } from '../shared/generation-store.ts';
import { isOpenStatus } from '../shared/protocol.ts';
import { takeAnswers } from '../shared/redis.ts';

/**
 * Brings the frames of generations to the connections that follow them: in order, once each, without gaps.
 *
 * A subscription is one connection that follows one generation. Its position is the id of the last frame sent. A
 * frame from the reply stream names the id before it: equal to the position → send; not above it → a double, drop;
 * else → a gap, read the log. States:
 *
 *   held     just made; frames wait (few) until the answer to the client's own frame has gone out
 *   live     frames are passed through as they come, unparsed
 *   reading  frames come from the log, a page at a time; what comes live meanwhile only says that there is more
 *   stalled  the client reads too slowly: nothing is pushed, nothing is kept; goes to reading when it drains
 *
 * Cost: one small object a subscription, no timer of its own but while Redis knows nothing of its generation. `heal` looks
 * after subscriptions that have been silent for a while, so that a lost last frame, or a generation that is gone, is
 * noticed.
 *
 * After a failover Redis may know less of an answer than its clients have seen, or nothing. Mostly its worker puts that
 * back, and goes on: it is waited for. But an attempt that nobody remembers may be opened once more, by another, and ids
 * no longer tell two texts apart. Signs of it are a record that was gone for a while, one that knows of fewer attempts than
 * were shown, and a second `start` in a log that is shorter than what was shown. Then the client is given the whole log,
 * after a `resumed` that tells it so.
 */

const HELD_FRAMES = 32;
const MOST_FOLLOWERS = 256; // of one generation: each of its frames is sent to all of them in one turn
const SILENT_MS = 2_000; // when a silent subscription is first compared with its log
const SILENT_MAX_MS = 16_000; // and at the most, after doubling
/** What Redis does not know any more may be put back by a worker that has still to reconnect. */
export const GONE_MS = 5_000;
export const GONE_LOOK_MS = 500;
const FIRST_PAGE = 64; // entries of a read, before anything is known of their size
const MOST_PAGE = 500;
const LEAST_PAGE = 8;
const PAGE_UNITS = 131_072; // what a page should hold at the most: half of what makes a client slow
const DOUBTFUL_MS = 8_000; // patience after 6 s of silence: then its request is looked for in its stream
const NOWHERE = '0-0'; // an id that no log has
const HEAL_BATCH = 500; // log tops that one round trip asks for

/** What delivery needs of whoever follows a generation. */
export interface Follower {
  /** @param soon goes before frames that only continue an answer */
  sendText(text: string, soon?: boolean): void;
  /** Its subscription has ended: a terminal frame was sent, or it was dropped. */
  onEnded(subscription: Subscription): void;
  readonly slow: boolean;
  readonly open: boolean;
}

/** Metrics and the trace of one answer; two calls in its whole life. */
export interface AnswerWatch {
  sawText: boolean;
  firstText(): void;
  ended(complete: boolean): void;
}

export interface Subscription {
  readonly follower: Follower;
  readonly user: string;
  readonly messageId: string;
  readonly key: string;
  /** Id of the last frame sent, or '' before any. */
  position: string;
  /** The node whose request stream carries it; for the queue position. */
  home: string;
  /** No attempt has been seen yet: the client is told its place in the queue. */
  waiting: boolean;
  toldPosition: number;
  /** Set for a chat that was asked here, until it ends: hears of the first token and of the end. */
  watch: AnswerWatch | null;
  missing: number;
  /** What the client has seen may be of an attempt that nobody remembers. */
  forgotten: boolean;
  /** Since when Redis has known nothing of it, by the clock that never jumps; 0 = it knows. */
  goneMs: number;
  /** It is looked for again soon. */
  looking: boolean;
  state: 'held' | 'live' | 'reading' | 'stalled' | 'ended';
  held: { before: string; id: string; end: boolean; frame: string }[];
  more: boolean;
  /** Entries that the next read of the log asks for, by the size of the last ones. */
  page: number;
  lastMs: number;
  patienceMs: number;
}

export type Delivery = ReturnType<typeof createDelivery>;

export function createDelivery(parts: {
  store: GenerationStore;
  node: string;
  log: Logger;
  counters: { healed(): void; slow(): void; doubled(): void };
}) {
  const { store, node, log, counters } = parts;
  const generations = new Map<string, Subscription[]>();
  let stopped = false;

  function send(subscription: Subscription, id: string, end: boolean, frame: string): void {
    subscription.follower.sendText(frame, subscription.position === '');
    subscription.position = id;
    subscription.waiting = false;
    subscription.lastMs = performance.now();
    subscription.patienceMs = SILENT_MS;
    if (subscription.watch) tell(subscription.watch, id, end);
    if (end) remove(subscription);
  }

  function tell(watch: AnswerWatch, id: string, end: boolean): void {
    if (!end && !watch.sawText && !id.endsWith('-0')) {
      watch.sawText = true;
      watch.firstText();
    }
    if (end) watch.ended(true);
  }

  function remove(subscription: Subscription): void {
    if (subscription.state === 'ended') return;
    subscription.state = 'ended';
    subscription.watch?.ended(false); // after a terminal frame it has heard already, and does nothing
    subscription.watch = null;
    const list = generations.get(subscription.key);
    if (list) {
      const rest = list.filter((other) => other !== subscription);
      if (rest.length > 0) generations.set(subscription.key, rest);
      else generations.delete(subscription.key);
    }
    subscription.follower.onEnded(subscription);
  }

  function take(subscription: Subscription, before: string, id: string, end: boolean, frame: string): void {
    switch (subscription.state) {
      case 'live':
        if (subscription.position === before) {
          if (subscription.follower.slow) stall(subscription);
          else send(subscription, id, end, frame);
        } else if (compareFrameIds(id, subscription.position) <= 0) {
          counters.doubled();
          if (subscription.forgotten) void read(subscription);
          else if (id.endsWith('-0') && attemptOf(id) === attemptOf(subscription.position))
            void doubt(subscription);
        } else {
          counters.healed();
          void read(subscription);
        }
        return;
      case 'held':
        if (subscription.held.length < HELD_FRAMES) subscription.held.push({ before, id, end, frame });
        return;
      case 'reading':
        subscription.more = true;
        return;
      case 'stalled':
      case 'ended':
        return;
      default:
        subscription.state satisfies never;
    }
  }

  function stall(subscription: Subscription): void {
    subscription.state = 'stalled';
    counters.slow();
  }

  /** Sends entries while the client keeps up. False when it stalled or ended. */
  function sendEntries(subscription: Subscription, entries: LogEntry[]): boolean {
    let units = 0;
    for (const { frame } of entries) units += frame.length;
    const fitting = Math.floor((PAGE_UNITS * entries.length) / Math.max(1, units));
    if (entries.length > 0) subscription.page = Math.max(LEAST_PAGE, Math.min(MOST_PAGE, fitting));
    for (const entry of entries) {
      if (compareFrameIds(entry.id, subscription.position) <= 0) continue;
      if (subscription.follower.slow) {
        stall(subscription);
        return false;
      }
      send(subscription, entry.id, entry.terminal, entry.frame);
      if (entry.terminal) return false; // nothing follows an end, whatever the log holds
    }
    return isOpen(subscription);
  }

  /** Not a bare comparison: the state changes while `read` waits. */
  function isOpen(subscription: Subscription): boolean {
    return subscription.state !== 'ended' && !stopped;
  }

  /** @param unrouted its worker may not know that this node wants the frames: they stayed away */
  async function read(subscription: Subscription, unrouted = false): Promise<void> {
    subscription.state = 'reading';
    let asks = unrouted;
    try {
      const mistrusted = subscription.forgotten || subscription.goneMs > 0;
      if (mistrusted && !(await stillThere(subscription, true))) return;
      for (;;) {
        subscription.more = false;
        const { user, messageId, position } = subscription;
        const page = await store.readLog(user, messageId, position, subscription.page);
        if (!isOpen(subscription)) return;
        subscription.lastMs = performance.now();
        if (!sendEntries(subscription, page.entries)) return;
        if (page.entries.length === 0 || (asks && !page.more)) {
          if (!(await stillThere(subscription))) return;
          asks = false;
        }
        if (!page.more && !subscription.more) break;
      }
      subscription.state = 'live';
    } catch (error) {
      log.warn(
        { err: (error as Error).message, messageId: subscription.messageId },
        'log cannot be read; again soon',
      );
      if (isOpen(subscription)) subscription.state = 'live'; // the next frame, or `heal`, comes back here
      if (subscription.goneMs > 0) subscription.goneMs = performance.now(); // Redis has not said so all that time
    }
    if (subscription.goneMs > 0 && isOpen(subscription)) lookSoon(subscription);
  }

  /** What Redis knows nothing of is looked for again until it is there or counts as lost. */
  function lookSoon(subscription: Subscription): void {
    if (subscription.looking) return;
    subscription.looking = true;
    const look = () => {
      subscription.looking = false;
      if (subscription.state === 'live' && !stopped) void read(subscription);
    };
    setTimeout(look, GONE_LOOK_MS * (0.5 + Math.random())).unref();
  }

  /** The attempt that the client has seen starts once more: published twice, or another one of the same number. */
  async function doubt(subscription: Subscription): Promise<void> {
    const { position } = subscription;
    const [progress] = await store.progress([subscription]);
    if (!progress || progress instanceof Error || compareFrameIds(progress.top, position) >= 0) return;
    subscription.forgotten = true;
    if (subscription.state === 'live') void read(subscription);
  }

  /** After an attach: reads what a worker wrote before it knew of this node, if nothing has come since. */
  function lookAgain(subscription: Subscription): void {
    const { user, messageId, position } = subscription;
    const look = async () => {
      if (subscription.state !== 'live' || subscription.position !== position) return;
      const { entries } = await store.readLog(user, messageId, position, 1);
      if (entries.length > 0 && subscription.state === 'live') void read(subscription, true);
    };
    setTimeout(() => look().catch(() => {}), 2 * ROUTES_MS).unref(); // on an error, `heal` sees to it
  }

  /**
   * Asks for the frames once more, and whether there is anything to ask for: the log may have expired after the end, or be
   * gone altogether. The record too may be gone, but whoever works on the answer makes it again: it counts as lost only
   * after `GONE_MS`.
   * @param anew the client is given all of the last attempt again
   */
  async function stillThere(subscription: Subscription, anew = false): Promise<boolean> {
    const { user, messageId, position } = subscription;
    const attached = await store.attach(user, messageId, node, anew ? NOWHERE : position);
    if (!isOpen(subscription)) return false;
    if (attached.state === 'unknown') {
      const now = performance.now();
      if (subscription.goneMs === 0) subscription.goneMs = now;
      if (now - subscription.goneMs < GONE_MS) return true;
      lose(subscription);
      return false;
    }
    subscription.goneMs = 0;
    const ended = !isOpenStatus(attached.status);
    if (anew) subscription.forgotten = false;
    if (ended && !attached.whole && attached.entries.length === 0) {
      lose(subscription); // its log is gone, and with it the end that we have not seen
      return false;
    }
    // What this client has of it may be in the middle of a text that is whole now, or be of another one: it replays.
    if (!attached.recovered && (anew || ended)) {
      subscription.follower.sendText(
        JSON.stringify({
          type: 'resumed',
          messageId,
          recovered: false,
          compacted: attached.compacted,
          status: attached.status,
        }),
      );
      subscription.position = '';
    }
    if (!attached.whole) return sendEntries(subscription, attached.entries);
    for (const entry of attached.entries) send(subscription, entry.id, entry.terminal, entry.frame);
    remove(subscription);
    return false;
  }

  function attemptOf(id: string): number {
    return parseFrameId(id)?.attempt ?? 0; // '': none yet
  }

  /** Its record or its log is gone (flushed, deleted, expired): say so, with a terminal frame above what was seen. */
  function lose(subscription: Subscription): void {
    const attempt = attemptOf(subscription.position) + 1;
    log.error(
      { user: subscription.user, messageId: subscription.messageId },
      'generation is gone from Redis',
    );
    subscription.follower.sendText(
      JSON.stringify({
        type: 'failed',
        messageId: subscription.messageId,
        id: `${attempt}-0`,
        code: 'internal',
        message: 'This answer was lost with the server memory that held it. Ask again.',
        temporary: true,
      }),
    );
    remove(subscription);
  }

  return {
    /**
     * Follows a generation, held until `release`. A connection that follows it already starts anew.
     * @throws RivuletError too_many_active
     */
    hold(follower: Follower, user: string, messageId: string): Subscription {
      const key = `${user} ${messageId}`;
      const list = generations.get(key) ?? [];
      const old = list.find((other) => other.follower === follower);
      if (old) remove(old);
      else if (list.length >= MOST_FOLLOWERS)
        throw new RivuletError(
          'too_many_active',
          `At most ${MOST_FOLLOWERS} may follow one answer on a node.`,
        );
      const subscription: Subscription = {
        follower,
        user,
        messageId,
        key,
        position: '',
        home: '',
        waiting: false,
        watch: null,
        toldPosition: -1,
        missing: 0,
        forgotten: false,
        goneMs: 0,
        looking: false,
        state: 'held',
        held: [],
        more: false,
        page: FIRST_PAGE,
        lastMs: performance.now(),
        patienceMs: SILENT_MS,
      };
      generations.set(key, [...(generations.get(key) ?? []), subscription]);
      return subscription;
    },

    /**
     * Sends what an attach read, then what was held, then goes live.
     * @param more the log has more pages after these entries
     * @param whole nothing follows them, now or later
     */
    release(
      subscription: Subscription,
      position: string,
      entries: LogEntry[],
      more: boolean,
      whole = false,
    ): void {
      if (subscription.state !== 'held') return;
      const { held } = subscription;
      subscription.held = [];
      subscription.state = 'live';
      if (whole) {
        for (const entry of entries) send(subscription, entry.id, entry.terminal, entry.frame);
        remove(subscription);
        return;
      }
      subscription.position = position;
      if (!sendEntries(subscription, entries)) return;
      if (more || held.length === HELD_FRAMES) {
        void read(subscription);
        return;
      }
      for (const { before, id, end, frame } of held) take(subscription, before, id, end, frame);
      if (subscription.position !== '') lookAgain(subscription);
    },

    drop: remove,
    lose,

    /** Whether anybody follows it here. */
    isFollowed(user: string, messageId: string): boolean {
      return generations.has(`${user} ${messageId}`);
    },

    /** One pair of a reply entry; see shared/reply-stream.ts for the address. */
    onFrame(address: string, frame: string): void {
      const a = address.indexOf(' ');
      const b = address.indexOf(' ', a + 1);
      const list = generations.get(address.slice(0, b));
      if (!list) return;
      const c = address.indexOf(' ', b + 1);
      const d = address.indexOf(' ', c + 1);
      const before = address.slice(b + 1, c);
      const id = address.slice(c + 1, d);
      const end = address.charCodeAt(d + 1) === 101; // 'e'
      for (const subscription of list) take(subscription, before === '-' ? '' : before, id, end, frame);
    },

    /** The client has read what was buffered for it. */
    onDrain(subscriptions: Iterable<Subscription>): void {
      for (const subscription of subscriptions)
        if (subscription.state === 'stalled' && !subscription.follower.slow) void read(subscription);
    },

    /**
     * Subscriptions whose request should be in a queue: those that wait for their turn, and those that have been
     * silent for long, whose request may have been lost with its stream and its worker.
     */
    *watchingQueue(): Iterable<Subscription> {
      for (const list of generations.values())
        for (const one of list)
          if (one.state === 'live' && (one.waiting || one.patienceMs >= DOUBTFUL_MS)) yield one;
    },

    /**
     * Compares silent subscriptions with their logs; with `all`, every live one (after the tail was broken).
     * @throws why some could not be compared, once all the others were
     */
    async heal(
      readProgress: (batch: Subscription[]) => Promise<(Progress | null | Error)[]>,
      all = false,
    ): Promise<void> {
      const now = performance.now();
      const silent: Subscription[] = [];
      for (const list of generations.values())
        for (const one of list) {
          if (one.state === 'stalled' && !one.follower.slow) void read(one);
          if (one.state !== 'live' || (!all && now - one.lastMs < one.patienceMs)) continue;
          silent.push(one);
        }
      let failure: Error | null = null;
      for (let from = 0; from < silent.length && !stopped; from += HEAL_BATCH) {
        const batch = silent.slice(from, from + HEAL_BATCH);
        const shown = batch.map(({ position }) => position); // more may come while we ask
        const failed = takeAnswers(await readProgress(batch), (progress, index) => {
          const subscription = batch[index]!;
          if (subscription.state !== 'live') return;
          subscription.lastMs = performance.now();
          subscription.patienceMs = Math.min(subscription.patienceMs * 2, SILENT_MAX_MS);
          if (progress === null) {
            void read(subscription);
            return;
          }
          const { top, attempt } = progress;
          const wasForgotten = subscription.forgotten;
          subscription.forgotten = attempt < attemptOf(shown[index]!);
          if (wasForgotten && subscription.forgotten) {
            void read(subscription); // its worker has had the time to put back what is missing
          } else if (top !== '' && compareFrameIds(top, subscription.position) > 0) {
            counters.healed();
            void read(subscription, true);
          }
        });
        failure = failed ?? failure;
      }
      if (failure) throw failure;
    },

    get size(): number {
      return generations.size;
    },

    stop(): void {
      stopped = true;
      generations.clear();
    },
  };
}
