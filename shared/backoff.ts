/**
 * Exponential backoff with full jitter in its upper half: between half of and the whole of
 * `baseMs * 2^(attempt-1)`, never above `maxMs`. See "Exponential Backoff And Jitter", AWS Architecture Blog.
 * @param attempt 1 for the first retry
 */
export function backoffMs(
  attempt: number,
  baseMs: number,
  maxMs: number,
  random: () => number = Math.random,
): number {
  const ceiling = Math.min(maxMs, baseMs * 2 ** Math.min(attempt - 1, 30));
  return Math.round(ceiling / 2 + (random() * ceiling) / 2);
}
