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
  let logs: { key: string; due: number }[] = [];
  let next = 0;

  async function look(): Promise<void> {
    while (!signal.aborted) {
      const waitMs = (logs[next]?.due ?? Number.POSITIVE_INFINITY) - Date.now();
      await delay(Math.max(STEP_MS, Math.min(1_000, waitMs)), undefined, { signal }).catch(() => {});
      const due: string[] = [];
      for (const now = Date.now(); due.length < BATCH && next < logs.length; next++) {
        const { key, due: at } = logs[next]!;
        if (at > now) break;
        due.push(key);
      }
      if (due.length > 0) await redis.batch(due.map((key) => ['exists', key]));
      if (next > 1_024 && next * 2 > logs.length) {
        logs = logs.slice(next);
        next = 0;
      }
    }
  }

  return {
    add(user, messageId) {
      if (logs.length - next < KEPT)
        logs.push({ key: keys.log(user, messageId), due: Date.now() + afterMs + LATE_MS });
    },
    ended: look(),
  };
}
