/**
 * The merging rule, the same for all systems of the bench and for the product (worker/answer-writer.ts): tokens of
 * one answer that come in one event-loop turn are one frame; while a frame of it is on its way to Redis the next
 * ones wait, at most 20 ms. Where many answers begin in one turn, their first frames leave a turn later. With `merge` off every token is a frame of its own.
 *
 * `send` returns a promise of the moment when Redis has the frame. `flushed` settles when nothing is left.
 */
const COALESCE_MS = 20;
const FEW = 4; // answers that begin in one turn

let beginning: (() => void)[] = [];

function flushFirst(flush: () => void): void {
  if (beginning.push(flush) === 1) setImmediate(endTurn);
}

function endTurn(): void {
  const flushes = beginning;
  beginning = [];
  if (flushes.length > FEW) setImmediate(flushAll, flushes);
  else flushAll(flushes);
}

function flushAll(flushes: (() => void)[]): void {
  for (const flush of flushes) flush();
}

export interface TokenMerger {
  push(text: string): void;
  flushed(): Promise<void>;
}

export function mergeTokens(merge: boolean, send: (text: string) => Promise<unknown>): TokenMerger {
  let pending = '';
  let inFlight = 0;
  let begun = false;
  let scheduled = false;
  let timer: NodeJS.Timeout | undefined;
  let wake: (() => void) | null = null;

  function answered() {
    inFlight--;
    if (pending !== '' && inFlight === 0) schedule();
    if (pending === '' && inFlight === 0 && wake) wake();
  }
  function flush() {
    scheduled = false;
    clearTimeout(timer);
    timer = undefined;
    if (pending === '') return;
    const text = pending;
    pending = '';
    inFlight++;
    send(text).then(answered, answered);
  }
  function schedule() {
    if (scheduled) return;
    scheduled = true;
    if (begun) setImmediate(flush);
    else flushFirst(flush);
    begun = true;
  }
  return {
    push(text) {
      if (!merge) {
        inFlight++;
        send(text).then(answered, answered);
        return;
      }
      pending += text;
      if (inFlight === 0) schedule();
      else timer ??= setTimeout(flush, COALESCE_MS);
    },
    async flushed() {
      if (pending === '' && inFlight === 0) return;
      flush();
      if (inFlight > 0)
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
    },
  };
}
