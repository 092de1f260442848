import { setTimeout as delay } from 'node:timers/promises';

/** Asks again until the answer is truthy; for facts that no event announces. The bound is for a hang, not a measure. */
export async function eventually<T>(
  what: string,
  ask: () => Promise<T> | T,
  timeoutMs = 20_000,
): Promise<NonNullable<T>> {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    const answer = await ask();
    if (answer) return answer as NonNullable<T>;
    if (Date.now() > deadline) throw new Error(`no ${what} within ${timeoutMs} ms`);
    await delay(25);
  }
}
