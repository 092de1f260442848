import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { GenerationStore } from '../shared/generation-store.ts';
import { type RedisConnection, takeAnswers } from '../shared/redis.ts';
import type { RequestQueue } from '../shared/request-queue.ts';
import type { RunningRequest } from './run-request.ts';

/**
 * Keeps what runs here ours, and learns when it is not. Loops over the running requests:
 * every third of the lease the claims are extended, few at a time, for entries that Redis still counts as ours; again
 * soon where that failed, and all at once as soon as Redis is back. And every `WATCH_MS` the records of answers without
 * a recent append are read, so that a cancel stops a model that has not said a word yet. A third loop ends what takes
 * longer than GENERATION_TIMEOUT_MS, so that no answer needs a timer.
 */

const EXTEND_BATCH = 32; // of Redis' time, under half a millisecond
const WATCH_MS = 1_000; // the design's bound for a cancel before the first token
const AGAIN_MS = 1_000; // after a step that failed

export function keepLeases(parts: {
  worker: string;
  leaseMs: number;
  timeoutMs: number;
  running: () => Iterable<RunningRequest>;
  redis: RedisConnection;
  queue: RequestQueue;
  store: GenerationStore;
  log: Logger;
  signal: AbortSignal;
}): Promise<void> {
  const { worker, leaseMs, queue, store, redis, log, signal } = parts;

  async function extend(isBack: () => boolean): Promise<void> {
    const byNode = new Map<string, RunningRequest[]>();
    for (const running of parts.running()) {
      const { node } = running.request;
      byNode.set(node, [...(byNode.get(node) ?? []), running]);
    }
    const batches = [...byNode].flatMap(([node, list]) =>
      Array.from({ length: Math.ceil(list.length / EXTEND_BATCH) }, (_, index) => ({
        node,
        list: list.slice(index * EXTEND_BATCH, (index + 1) * EXTEND_BATCH),
      })),
    );
    const pauseMs = leaseMs / 6 / batches.length; // all of them within half of the time until the next round
    const extending: Promise<void>[] = [];
    const failures: unknown[] = [];
    for (const [index, { node, list }] of batches.entries()) {
      if (index > 0 && !isBack()) await pause(pauseMs);
      // Not awaited here: in a Cluster a node whose server is away must not hold up those behind it.
      extending.push(extendSome(node, list).catch((error) => void failures.push(error)));
    }
    await Promise.all(extending);
    if (failures.length > 0) throw failures[0];
  }

  async function extendSome(node: string, list: RunningRequest[]): Promise<void> {
    const beats = list.filter(
      (running) => running.writer && !running.writer.fenced && !running.writer.isEnded,
    );
    const [lost] = await Promise.all([
      queue.extend(
        node,
        worker,
        list.map((running) => running.request.entry),
      ),
      redis.batch(beats.map((running) => store.beatCommand(running.writer!.attempt))),
    ]);
    for (const running of list) {
      if (!lost.includes(running.request.entry) || running.writer?.isEnded) continue; // acknowledged meanwhile
      // The claim is gone (deleted stream, destroyed group, or claimed by another). The log decides who goes on.
      log.warn({ entry: running.request.entry, node }, 'claim lost; comparing with the log');
      running.writer?.check();
    }
  }

  async function expire(): Promise<void> {
    const now = performance.now();
    for (const running of parts.running()) if (now - running.startedMs > parts.timeoutMs) running.expire();
  }

  async function watch(): Promise<void> {
    const now = performance.now();
    // One that has ended, or was given up, knows for itself what became of it.
    const quiet = [...parts.running()].filter(
      ({ writer }) => writer && !writer.fenced && !writer.isEnded && now - writer.lastAppendMs >= WATCH_MS,
    );
    if (quiet.length === 0) return;
    const records = await store.inspectAll(quiet.map((running) => running.request));
    const failure = takeAnswers(records, (record, index) => {
      const running = quiet[index]!;
      const ours =
        record?.status === 'running' &&
        record.attempt === running.attempt &&
        record.owner === running.writer!.attempt.owner;
      if (ours || running.writer!.fenced || running.writer!.isEnded) return;
      if (record === null || record.attempt < running.attempt) running.writer!.check();
      else running.lose();
    });
    if (failure) throw failure;
  }

  const pauses = new Set<AbortController>();
  let wakes = 0;
  const wake = () => {
    wakes++;
    for (const pausing of pauses) pausing.abort();
  };
  const unsubscribe = redis.onReconnect(wake);
  signal.addEventListener('abort', wake);

  async function pause(ms: number): Promise<void> {
    const pausing = new AbortController();
    pauses.add(pausing);
    await delay(ms, undefined, { signal: pausing.signal }).catch(() => {});
    pauses.delete(pausing);
  }

  /** Each step is told whether Redis has come back since the last one began: then leases may be about to run out. */
  async function every(
    ms: number,
    step: (isBack: () => boolean) => Promise<void>,
    name: string,
  ): Promise<void> {
    let seen = 0;
    for (let pauseMs = ms; !signal.aborted; ) {
      if (wakes === seen) await pause(pauseMs); // else it came back during the last step, perhaps too late for that
      if (signal.aborted) return;
      pauseMs = ms;
      const before = seen;
      seen = wakes;
      await step(() => wakes > before).catch((error: Error) => {
        log.warn({ err: error.message, step: name }, 'lease step failed; again soon');
        pauseMs = Math.min(ms, AGAIN_MS);
      });
    }
  }

  const timeoutLookMs = Math.min(WATCH_MS, Math.max(50, parts.timeoutMs / 10));
  return Promise.all([
    every(leaseMs / 3, extend, 'extend'),
    every(WATCH_MS, watch, 'watch'),
    every(timeoutLookMs, expire, 'expire'),
  ]).then(unsubscribe);
}
