import assert from 'node:assert/strict';
import { test } from 'node:test';
import { getHeapSpaceStatistics } from 'node:v8';
import { createLogger } from '../../shared/logger.ts';
import { LazyAbort } from '../../worker/lazy-abort.ts';
import { RunContext } from '../../worker/run-context.ts';

const log = createLogger('silent', {});
const facts = { attempt: 2, partial: 'so far', trace: '00-1' };

test('a handler may take its context apart, or pass on a copy', () => {
  const abort = new LazyAbort();
  const context = new RunContext(abort, () => log, facts);
  const copy = { ...context, attempt: 3 };
  const { signal, ...rest } = context;
  assert.deepEqual(rest, { ...facts, log });
  assert.deepEqual([copy.attempt, copy.partial, copy.log], [3, 'so far', log]);
  assert.ok(signal instanceof AbortSignal);
  assert.equal(copy.signal, signal);
  const reason = new Error('stop');
  abort.abort(reason);
  abort.abort(new Error('later'));
  assert.equal(signal.reason, reason);
});

test('a signal that is asked for late is aborted already', () => {
  const abort = new LazyAbort();
  let told = 0;
  abort.onAbort = () => told++;
  const reason = new Error('stop');
  abort.abort(reason);
  abort.abort(reason);
  assert.equal(told, 1);
  const { signal } = new RunContext(abort, () => log, facts);
  assert.deepEqual([signal.aborted, signal.reason], [true, reason]);
});

test('contexts keep nothing alive: all share one hidden class', () => {
  // One of its own lies in the old space from the start, and what its getters see survives until that is collected.
  const oldSpaceBytes = () =>
    getHeapSpaceStatistics().find(({ space_name: name }) => name === 'old_space')!.space_used_size;
  const grown = Array.from({ length: 6 }, () => {
    const before = oldSpaceBytes();
    for (let index = 0; index < 3_000; index++) new RunContext(new LazyAbort(), () => log, facts);
    return oldSpaceBytes() - before;
  });
  const bytes = grown.slice(1).sort((a, b) => a - b)[2]!; // the first one is compiled; the old space may be collected
  assert.ok(bytes < 50_000, `${bytes} bytes in the old space`);
});
