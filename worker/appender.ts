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
 * of latency, and saves a command per answer and turn.
 */
export interface Appender {
  /** Has this writer's text appended at the end of this event-loop turn. */
  schedule(writer: AnswerWriter): void;
  /** Publishes frames at the end of this turn, in order. */
  publish(node: string, frame: ReplyLines): void;
  /** Settles when nothing is on its way any more. */
  flushed(): Promise<void>;
  readonly tokens: number;
}

/** First frames of so many answers are published as their logs are made; more in one turn share an entry, a round trip later. */
const MOST_PUBLISHED = 4;
/** Answers whose appends travel together: what a turn has for more of them is published in parts, as Redis has them. */
const BATCH = 64;
const AWAY_MS = 20; // between looks whether Redis is back

interface Append {
  writer: AnswerWriter;
  seq: number;
  opening: boolean;
  asks: boolean;
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
  let outgoing = new Map<string, ReplyLines[]>();
  let scheduled = false;
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
      setTimeout(turn, AWAY_MS);
      return;
    }
    scheduled = false;
    const frames = outgoing;
    const writers = dirty;
    outgoing = new Map();
    dirty = [];
    let opening = 0;
    for (const writer of writers) if (!writer.hasLog) opening++;
    const publishes = !redis.isCluster && opening <= MOST_PUBLISHED;
    const published: Command[] = [];
    for (const [node, list] of frames) published.push(...publishCommands(keys, node, list));
    if (published.length > 0) send(published, []); // a lost publish is not repeated: gateways heal it from the log
    for (let from = 0; from < writers.length; from += BATCH)
      append(writers.slice(from, from + BATCH), publishes);
    settle();
  }

  function append(writers: AnswerWriter[], publishes: boolean) {
    const commands: Command[] = [];
    const appends: Append[] = [];
    const now = Date.now();
    for (const writer of writers) {
      const taken = writer.take(now);
      if (!taken) continue;
      const { seq, text, opening, asks } = taken;
      appends.push({ writer, seq, opening, asks });
      if (opening)
        commands.push(store.openFirstCommand(writer.attempt, text, publishes ? writer.firstFrames() : null));
      else commands.push(store.appendCommand(writer.logKey, writer.idOf(seq), text!));
      if (asks) commands.push(store.routesCommand(writer.attempt));
    }
    if (commands.length > 0) send(commands, appends);
  }

  function send(commands: Command[], appends: Append[]) {
    underWay++;
    const sent = redis.batch(commands);
    redis.flush(); // Redis gets to work while the rest is put together
    sent.then((replies) => {
      underWay--;
      let index = 0;
      for (const { writer, seq, opening, asks } of appends) {
        const [error, taken] = replies[index++]!;
        const [routesError, routes] = asks ? replies[index++]! : [null, undefined];
        if (error || routesError || taken === null) {
          writer.refused(seq, error ?? routesError);
          continue;
        }
        if (seq > 0) tokens++;
        const opened = opening ? store.readOpened(taken) : null; // it answers with the routes
        writer.stored(seq, opened ? opened.routes : (routes as string | null | undefined), opened?.published);
      }
      settle();
    });
  }

  function settle() {
    if (underWay > 0 || scheduled || dirty.length > 0 || outgoing.size > 0) return;
    for (const resolve of idle.splice(0)) resolve();
  }

  return {
    schedule(writer) {
      dirty.push(writer);
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
    get tokens() {
      return tokens;
    },
  };
}
