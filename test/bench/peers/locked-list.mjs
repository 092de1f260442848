import { setTimeout as delay } from 'node:timers/promises';

/**
 * Where such systems start: a Redis list, a lock around every enqueue so that the queue's length can be checked
 * first, and a worker that takes what is there and looks again after a second when there was nothing.
 */
const LIST = 'list:requests';
const LOCK = 'list:lock';
const POLL_MS = 1_000;

export function createLockedList(redis) {
  return async (data) => {
    for (;;) {
      if (await redis.set(LOCK, '1', 'PX', 5_000, 'NX')) break;
      await delay(5 + Math.random() * 10);
    }
    if ((await redis.llen(LIST)) < 1_000_000) await redis.lpush(LIST, JSON.stringify(data));
    await redis.del(LOCK);
  };
}

export async function pollList(redis, concurrency, answer) {
  let running = 0;
  for (;;) {
    const text = running < concurrency ? await redis.rpop(LIST) : null;
    if (!text) {
      await delay(POLL_MS);
      continue;
    }
    running++;
    void answer(JSON.parse(text)).finally(() => running--);
  }
}
