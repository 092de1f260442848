import type { GenerationStore } from '../shared/generation-store.ts';
import type { Keys } from '../shared/keys.ts';
import type { Command, RedisConnection } from '../shared/redis.ts';
import { publishCommands, type ReplyLines } from '../shared/reply-stream.ts';
import type { AnswerWriter } from './answer-writer.ts';

/**
 * Carries the appends of every answer of this worker. All answers that have text in one event-loop turn share one
 * round trip: for each `XADD log`, now and then `HGET routes`, or first the script that begins it. What the log took is then
 * published, all frames for a node in one entry of its reply stream.
 *
 * Publishing waits for the log (unlike a blind pipeline of both): a worker that was replaced never shows a client
 * a frame that the log refused, and a frame goes to the routes of the last ROUTES_MS, not to those of its beginning. It costs one round trip
 * of latency, and saves a command per answer and turn. Where few answers have text in a turn, the round trip is what
 * costs, for this worker and for Redis: there a script appends and publishes in one step.
 */
export interface Appender {
  /** Has this writer's text appended at the end of this event-loop turn. */
  schedule(writer: AnswerWriter): void;
  /** Publishes frames at the end of this turn, in order. */
  publish(node: string, frame: ReplyLines): void;
  /** Settles when nothing is on its way any more. */
  flushed(): Promise<void>;
  /** Waits for Redis no longer. */
  close(): void;
  /** Counts a token frame that was written with the end of its answer. */
  count(): void;
  readonly tokens: number;
}

/**
 * First frames of so many answers are published as their logs are made; more in one turn share an entry, a round trip
 * later. And where more than these begin in a turn, they wait for the next one: an answer that is complete by then begins
 * and ends in one step, and never has a log. Under load that is no later for anybody.
 */
const MOST_PUBLISHED = 4;
/** Answers whose appends travel together: what a turn has for more of them is published in parts, as Redis has them. */
const BATCH = 64;
/** In a turn with no more answers than this, what they append is published by the script that appends it. */
const MOST_TOGETHER = 16;
const TOGETHER_UNITS = 16_384; // of their frames, so that they fit into one entry
const AWAY_MS = 20; // between looks whether Redis is back

interface Append {
  writer: AnswerWriter;
  seq: number;
}

/** What one script appends and publishes. */
interface Together {
  appends: Append[];
  logs: { log: string; id: string; text: string }[];
  frames: ReplyLines[];
  units: number;
}

export function createAppender({
  redis,
  keys,
  store,
}: {
  redis: RedisConnection;
  keys: Keys;
  store: GenerationStore;
}): Appender {
  let dirty: AnswerWriter[] = [];
  /** What came in this turn for answers that have not begun. */
  let fresh: AnswerWriter[] = [];
  let outgoing = new Map<string, ReplyLines[]>();
  let scheduled = false;
  let closed = false;
  let underWay = 0;
  let tokens = 0;
  const idle: (() => void)[] = [];

  function wake() {
    if (scheduled) return;
    scheduled = true;
    setImmediate(turn);
  }

  function turn() {
    // While Redis is away nothing is lined up: it would be appended before the logs are compared with what was
    // written, on a server that may have lost what came before.
    if (!redis.isReady()) {
      if (!closed) setTimeout(turn, AWAY_MS);
      return;
    }
    scheduled = false;
    const frames = outgoing;
    const writers = dirty;
    outgoing = new Map();
    dirty = [];
    if (fresh.length > MOST_PUBLISHED) {
      dirty = fresh;
      wake();
    } else writers.push(...fresh);
    fresh = [];
    let opening = 0;
    for (const writer of writers) if (!writer.hasLog) opening++;
    const publishes = !redis.isCluster && opening <= MOST_PUBLISHED;
    const published: Command[] = [];
    for (const [node, list] of frames) published.push(...publishCommands(keys, node, list));
    // A lost publish is not repeated: gateways heal it from the log.
    if (published.length > 0) settles(redis.outcomes(published), () => {});
    redis.flush(); // Redis gets to work while the rest is put together
    const together = !redis.isCluster && writers.length <= MOST_TOGETHER;
    // In a Cluster each goes alone anyway, and a server that does not answer must not hold up those of the others.
    const most = redis.isCluster ? 1 : BATCH;
    for (let from = 0; from < writers.length; from += most)
      append(writers.slice(from, from + most), publishes, together);
    settle();
  }

  function append(writers: AnswerWriter[], publishes: boolean, together: boolean) {
    const now = performance.now();
    const asking: AnswerWriter[] = [];
    const openings: Append[] = [];
    const opens: Command[] = [];
    const appends: Append[] = [];
    const commands: Command[] = [];
    const scripts = new Map<string, Together>();
    for (const writer of writers) {
      const taken = writer.take();
      if (!taken) continue;
      if (writer.asksRoutes(now)) asking.push(writer);
      const { seq, text, opening } = taken;
      if (opening) {
        openings.push({ writer, seq });
        opens.push(store.openFirstCommand(writer.attempt, text, publishes ? writer.firstFrames() : null));
        continue;
      }
      const node = together ? writer.loneRoute(seq) : null;
      if (node !== null && joins(scripts, node, writer, seq, text!)) continue;
      appends.push({ writer, seq });
      commands.push(store.appendCommand(writer.logKey, writer.idOf(seq), text!));
    }
    askRoutes(asking); // before the appends, so that these are published to who is named
    if (opens.length > 0)
      settles(redis.batch(opens), (replies, now) => {
        openings.forEach(({ writer, seq }, index) => {
          const [error, reply] = replies[index]!;
          const opened = error ? null : store.readOpened(reply);
          if (!opened) {
            writer.refused(seq, error);
            return;
          }
          writer.routed(opened.routes);
          stored(writer, seq, opened.published ? opened.routes : null, now);
        });
      });
    if (commands.length > 0)
      settles(redis.outcomes(commands), (outcomes, now) => {
        for (let index = 0; index < appends.length; index++) {
          const { writer, seq } = appends[index]!;
          const outcome = outcomes[index]!;
          if (outcome === true) stored(writer, seq, null, now);
          else writer.refused(seq, outcome || null);
        }
      });
    for (const [node, script] of scripts) sendTogether(node, script);
    redis.flush();
  }

  function askRoutes(writers: AnswerWriter[]) {
    if (writers.length === 0) return;
    settles(redis.batch(writers.map((writer) => store.routesCommand(writer.attempt))), (replies) => {
      writers.forEach((writer, index) => {
        const [error, routes] = replies[index]!;
        if (!error) writer.routed(routes as string | null);
      });
    });
  }

  /** Adds to what is stored and published for a node in one step; false when that would get too large. */
  function joins(
    scripts: Map<string, Together>,
    node: string,
    writer: AnswerWriter,
    seq: number,
    text: string,
  ): boolean {
    const script = scripts.get(node) ?? { appends: [], logs: [], frames: [], units: 0 };
    const frame = writer.textLines(seq);
    if (script.units + frame.length > TOGETHER_UNITS) return false;
    writer.goAlone();
    script.units += frame.length;
    script.appends.push({ writer, seq });
    script.logs.push({ log: writer.logKey, id: writer.idOf(seq), text });
    script.frames.push(frame);
    scripts.set(node, script);
    return true;
  }

  function sendTogether(node: string, { appends, logs, frames }: Together) {
    settles(redis.batch([store.appendAndPublishCommand(node, logs, frames)]), ([only], now) => {
      const [error, reply] = only!;
      const { published, taken } = error ? { published: false, taken: [] } : store.readAppended(reply);
      appends.forEach(({ writer, seq }, index) => {
        const one = error ?? taken[index]!;
        if (one === 1) stored(writer, seq, published ? node : null, now);
        else writer.refused(seq, one);
      });
    });
  }

  function stored(writer: AnswerWriter, seq: number, publishedTo: string | null, now: number) {
    if (seq > 0) tokens++;
    writer.stored(seq, publishedTo, now);
  }

  /** @param sent never rejects */
  function settles<T>(sent: Promise<T>, then: (answer: T, now: number) => void) {
    underWay++;
    void sent.then((answer) => {
      underWay--;
      then(answer, performance.now());
      settle();
    });
  }

  function settle() {
    if (underWay > 0 || scheduled || dirty.length > 0 || outgoing.size > 0) return;
    for (const resolve of idle.splice(0)) resolve();
  }

  return {
    schedule(writer) {
      if (writer.hasLog) dirty.push(writer);
      else fresh.push(writer);
      wake();
    },
    publish(node, frame) {
      const list = outgoing.get(node);
      if (list) list.push(frame);
      else outgoing.set(node, [frame]);
      wake();
    },
    flushed() {
      return new Promise((resolve) => {
        idle.push(resolve);
        wake();
      });
    },
    close() {
      closed = true;
    },
    count() {
      tokens++;
    },
    get tokens() {
      return tokens;
    },
  };
}
