import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { type TestContext, test } from 'node:test';
import { createWorkerPool } from '../../infra/worker-pool.ts';
import { createLogger } from '../../shared/logger.ts';
import { eventually } from '../helpers/eventually.ts';

/** The pool with real processes that find no Redis: what the registry says of them comes from here. */
const createPool = (env: NodeJS.ProcessEnv = {}) =>
  createWorkerPool({
    env: Object.assign(env, process.env, { REDIS_URL: 'redis://127.0.0.1:1', LOG_LEVEL: 'silent' }),
    leaseMs: 30_000,
    drainMs: 120_000,
    log: createLogger('silent', {}),
  });

/** A clock that goes on by itself no more. */
function stopClock(t: TestContext): { pass(ms: number): void } {
  let nowMs = 1_000_000;
  t.mock.method(performance, 'now', () => nowMs);
  return {
    pass(ms) {
      nowMs += ms;
    },
  };
}

/** A pool with one worker that does nothing, like one with a handler in an endless loop; the clock is ours. */
function startHung(t: TestContext) {
  const clock = stopClock(t);
  const pool = createPool();
  t.after(() => {
    for (const left of pool.pids) process.kill(left, 'SIGKILL');
    return pool.stop();
  });
  pool.adjust(1, new Map(), true);
  const [pid] = pool.pids as [number];
  process.kill(pid, 'SIGSTOP');
  return { pool, pid, clock };
}

test('a worker that hangs is killed and replaced', { timeout: 20_000 }, async (t) => {
  const { pool, pid, clock } = startHung(t);
  const look = (running: Map<number, number>, isCurrent = true) => {
    clock.pass(1_000);
    pool.adjust(1, running, isCurrent);
  };
  for (let second = 0; second < 60; second++) look(new Map()); // still starting
  const there = new Map([[pid, 1]]);
  look(there);
  for (let second = 0; second < 25; second++) look(new Map());
  look(there); // it was only slow
  clock.pass(600_000); // Redis was away
  for (let second = 0; second < 60; second++) look(new Map(), false); // it refuses writes
  for (let second = 0; second < 25; second++) look(new Map());
  await new Promise((resolve) => setTimeout(resolve, 50));
  assert.deepEqual(pool.pids, [pid]);
  for (let second = 0; second < 10; second++) look(new Map());
  await eventually('end of the hung one', () => pool.size === 0);
  look(new Map());
  assert.equal(pool.size, 1);
  assert.notEqual(pool.pids[0], pid);
});

test('a worker that hangs before it is up is killed and replaced', { timeout: 20_000 }, async (t) => {
  const { pool, pid, clock } = startHung(t);
  const look = (seconds: number, isCurrent = true) => {
    for (let second = 0; second < seconds; second++) {
      clock.pass(1_000);
      pool.adjust(1, new Map(), isCurrent);
    }
  };
  look(60);
  assert.equal(pool.misses(new Map()), false, 'it may still be starting');
  look(60, false); // nobody can register while Redis is away
  assert.equal(pool.misses(new Map()), true);
  look(25);
  await new Promise((resolve) => setTimeout(resolve, 50));
  assert.deepEqual(pool.pids, [pid]);
  look(10);
  await eventually('end of the hung one', () => pool.size === 0);
  look(2); // a start that failed holds the next one back for a second
  assert.equal(pool.size, 1);
  assert.notEqual(pool.pids[0], pid);
});

test('a worker without its autoscaler has its DRAIN_MS', async (t) => {
  const pool = createPool();
  t.after(() => pool.stop());
  pool.adjust(1, new Map(), true);
  const processes = execFileSync('ps', ['-A', '-o', 'ppid=,args='], { encoding: 'utf8' });
  const guard = new RegExp(` ${pool.pids[0]} (\\d+)$`, 'm').exec(processes);
  assert.ok(Number(guard?.[1]) > 120, `killed after ${guard?.[1]} s`);
});

test('workers that end soon after they were up are started again after a growing pause', async (t) => {
  const clock = stopClock(t);
  const pool = createPool();
  t.after(() => pool.stop());
  /** How long the next start was held back, once the worker has ended so long after it was started. */
  const pauseAfter = async (livedMs: number) => {
    const pid = pool.pids[0]!;
    pool.adjust(1, new Map([[pid, 0]]), true);
    clock.pass(livedMs);
    process.kill(pid, 'SIGKILL');
    await eventually('its end', () => pool.size === 0);
    for (let pausedMs = 0; ; pausedMs += 500) {
      pool.adjust(1, new Map(), true);
      if (pool.size > 0) return pausedMs;
      clock.pass(500);
    }
  };
  pool.adjust(1, new Map(), true);
  const pauses: number[] = [];
  for (const livedMs of [1_500, 1_500, 1_500, 1_500, 60_000, 1_500]) pauses.push(await pauseAfter(livedMs));
  assert.deepEqual(pauses, [1_000, 2_000, 4_000, 8_000, 0, 1_000]);
});

test('a worker that the system does not let start is tried again; a program that is not there is not', async (t) => {
  const clock = stopClock(t);
  const env: NodeJS.ProcessEnv = {};
  const pool = createPool(env);
  t.after(() => pool.stop());
  let failure: Error | null = null;
  pool.failed.catch((error) => {
    failure = error;
  });
  env.HUGE = 'x'.repeat(200_000); // refused by the kernel, as when it has no memory left
  pool.adjust(1, new Map(), true);
  delete env.HUGE;
  pool.adjust(1, new Map(), true);
  assert.deepEqual([pool.size, failure], [0, null]);
  clock.pass(1_000);
  pool.adjust(1, new Map(), true);
  assert.equal(pool.size, 1);

  const program = process.execPath;
  t.after(() => {
    process.execPath = program;
  });
  process.execPath = '/nowhere/node';
  pool.adjust(2, new Map(), true);
  await eventually('the failure', () => failure);
});
