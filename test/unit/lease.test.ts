import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import pino from 'pino';
import { createKeys } from '../../shared/keys.ts';
import type { RedisConnection } from '../../shared/redis.ts';
import { createRequestQueue } from '../../shared/request-queue.ts';
import { keepLeases } from '../../worker/lease.ts';
import type { RunningRequest } from '../../worker/run-request.ts';
import { startSweeper } from '../../worker/sweeper.ts';
import { eventually } from '../helpers/eventually.ts';

/** What keeps a request with its worker, and takes it from one that is gone, when parts of Redis are away. */

const log = pino({ level: 'silent' });

function pretendToRun(node: string, writer: object | null): RunningRequest {
  const request = { node, entry: '1-1', user: 'u', messageId: 'm', trace: '', payload: '', deliveries: 1 };
  return {
    request,
    since: Date.now(),
    startedMs: performance.now(),
    attempt: 1,
    writer,
  } as unknown as RunningRequest;
}

/** Starts the loops with what a test needs of their parts. `end` resolves when they have ended. */
function keep(parts: object) {
  const stop = new AbortController();
  let listener = () => {};
  const ended = keepLeases({
    worker: 'w',
    leaseMs: 3_600_000,
    timeoutMs: 3_600_000,
    running: () => ['n1', 'n2'].map((node) => pretendToRun(node, null)),
    redis: {
      onReconnect(wanted: () => void) {
        listener = wanted;
        return () => {};
      },
      batch: async () => [],
    },
    queue: {},
    store: {},
    log,
    signal: stop.signal,
    ...parts,
  } as unknown as Parameters<typeof keepLeases>[0]);
  return {
    reconnect: () => listener(),
    end() {
      stop.abort();
      return ended;
    },
  };
}

test('a node whose server is silent does not hold up the leases of the others', async () => {
  let answer = () => {};
  const extended: string[] = [];
  const leases = keep({
    leaseMs: 30,
    queue: {
      async extend(node: string) {
        extended.push(node);
        if (node === 'n1') await new Promise<void>((resolve) => (answer = resolve));
        return [];
      },
    },
  });
  await eventually('the other node', () => extended.includes('n2'));
  const ended = leases.end();
  answer();
  await ended;
});

test('leases are not extended with a long patience: the loop comes back anyway', async () => {
  let asked = 0;
  const redis = {
    async script() {
      asked++;
      throw new Error('Connection is closed.');
    },
  };
  const queue = createRequestQueue({ redis: redis as unknown as RedisConnection, keys: createKeys('chat:') });
  await assert.rejects(queue.extend('n1', 'w', ['1-1']));
  assert.equal(asked, 1);
});

test('leases are extended as soon as Redis is back, those of one node also when another fails', async () => {
  const extended: string[] = [];
  const leases = keep({
    queue: {
      async extend(node: string) {
        extended.push(node);
        if (node === 'n1') throw new Error('away');
        return [];
      },
    },
  });
  leases.reconnect();
  // The pause between two batches is a twelfth of an hour here.
  await eventually('both batches', () => extended.length === 2);
  assert.deepEqual(extended, ['n1', 'n2']);
  await leases.end();
});

test('when Redis comes back during a round, the rest goes at once, and all of it again', async () => {
  const extended: string[] = [];
  const leases = keep({
    queue: {
      async extend(node: string) {
        extended.push(node);
        if (extended.length === 1) leases.reconnect();
        return [];
      },
    },
  });
  leases.reconnect();
  await eventually('two rounds', () => extended.length === 4);
  assert.deepEqual(extended, ['n1', 'n2', 'n1', 'n2']);
  await leases.end();
});

test('an answer is not called lost that has ended here, or of which Redis does not tell', async () => {
  const lost: string[] = [];
  const quiet = { fenced: false, lastAppendMs: -60_000 };
  const check = () => void lost.push('checked');
  const running = ['unknown', 'ended', 'open'].map((name) => ({
    ...pretendToRun('n1', { ...quiet, isEnded: name === 'ended', check }),
    request: { user: name },
    lose: () => void lost.push(name),
  }));
  const leases = keep({
    running: () => running,
    store: {
      inspectAll: async (list: { user: string }[]) =>
        list.map(({ user }) =>
          user === 'unknown' ? new Error('away') : { status: 'done', attempt: 1, owner: 'w' },
        ),
    },
  });
  await eventually('a look', () => lost.length > 0);
  await leases.end();
  assert.deepEqual([...new Set(lost)], ['open']);
});

test('a step of the clock neither ends an answer nor hides for how long it has been silent', async (t) => {
  const seen: string[] = [];
  const writer = { fenced: false, isEnded: false, lastAppendMs: performance.now() };
  const running = { ...pretendToRun('n1', writer), expire: () => void seen.push('expired') };
  t.mock.timers.enable({ apis: ['Date'], now: Date.now() + 7_200_000 });
  const leases = keep({
    running: () => [running],
    timeoutMs: 600_000,
    store: {
      async inspectAll() {
        seen.push('looked at');
        return [{ status: 'running', attempt: 1, owner: 'w' }];
      },
    },
  });
  await eventually('a look', () => seen.length > 0);
  t.mock.timers.setTime(0);
  await delay(1_500);
  await leases.end();
  assert.deepEqual([...new Set(seen)], ['looked at']);
  assert.ok(seen.length > 1);
});

test('a node whose server is away does not hold up the retries of the others', async () => {
  const stop = new AbortController();
  const promoted: string[] = [];
  const ended = startSweeper({
    worker: 'w',
    config: { LEASE_MS: 3_600_000, MAX_ATTEMPTS: 5 },
    queue: {
      async promoteDue(node: string) {
        if (node === 'n1') throw new Error('away');
        promoted.push(node);
        return { moved: 0, nextMs: -1 };
      },
    },
    registry: {},
    nodes: () => ['n1', 'n2'],
    room: () => 1,
    held: () => [],
    start() {},
    onTakeovers() {},
    log,
    signal: stop.signal,
  } as unknown as Parameters<typeof startSweeper>[0]);
  await eventually('the other node', () => promoted.length > 0);
  stop.abort();
  await Promise.race([ended, delay(1_000)]);
  assert.deepEqual([...new Set(promoted)], ['n2']);
});
