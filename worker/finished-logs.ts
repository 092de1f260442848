import { setTimeout as delay } from 'node:timers/promises';
import type { Keys } from '../shared/keys.ts';
import type { RedisConnection } from '../shared/redis.ts';

/**
 * Sees that logs go when they are due. Redis deletes an expired key when it is looked at, or when it comes upon it by
 * chance, and leaves up to a tenth of all keys for later; a log takes 4.7 KB at the least. So whoever ended an answer
 * looks at its log once it has expired. Where nobody does (the worker is gone, the list is full) chance has to do.
 */

const KEPT = 100_000;
const BATCH = 32; // of Redis' time, well under a millisecond
const STEP_MS = 10;
const LATE_MS = 10; // clocks differ by a little

export interface FinishedLogs {
  /** Its answer has ended just now. */
  add(user: string, messageId: string): void;
  readonly ended: Promise<void>;
}

export function watchFinishedLogs(parts: {
  redis: RedisConnection;
  keys: Keys;
  /** How long a log stays after the end, ms. */
  afterMs: number;
  signal: AbortSignal;
}): FinishedLogs {
  const { redis, keys, afterMs, signal } = parts;
  const logs: { key: string; due: number }[] = []; // in the order in which they are due

  async function look(): Promise<void> {
    while (!signal.aborted) {
      const waitMs = (logs[0]?.due ?? Number.POSITIVE_INFINITY) - performance.now();
      await delay(Math.max(STEP_MS, Math.min(1_000, waitMs)), undefined, { signal }).catch(() => {});
      const now = performance.now();
      const due = logs.slice(0, BATCH).filter((log) => log.due <= now);
      logs.splice(0, due.length);
      if (due.length > 0) await redis.batch(due.map(({ key }) => ['exists', key]));
    }
  }

  return {
    add(user, messageId) {
      if (logs.length < KEPT)
        logs.push({ key: keys.log(user, messageId), due: performance.now() + afterMs + LATE_MS });
    },
    ended: look(),
  };
}
