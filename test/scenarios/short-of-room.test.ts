import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import pino from 'pino';
import { startRedisServer } from '../../infra/redis-server.ts';
import { readWorkerConfig } from '../../worker/config.ts';
import { startWorker } from '../../worker/worker.ts';
import { startProxy } from '../faults/proxy.ts';
import { eventually } from '../helpers/eventually.ts';
import { startStack } from '../helpers/stack.ts';

/** A worker that has read more than it can run, and one that cannot tell Redis that it leaves. */

test('what a worker read without room for it goes to one that has room', { timeout: 60_000 }, async (t) => {
  const stack = await startStack(t, { gateways: 2, workers: 0, acl: false });
  const { look, keys } = stack;
  const [first, second] = await Promise.all(
    stack.gateways.map((gateway, index) => stack.client(20001 + index, gateway)),
  );
  const proxy = await startProxy(() => Number(new URL(stack.redisUrl).port), 100);
  t.after(() => proxy.stop());
  await stack.addWorker({ REDIS_URL: proxy.url, WORKER_CONCURRENCY: '1' });

  // It looks at each stream, and finds nothing; before its blocked read of both comes, there is something in both.
  const monitor = connect(Number(new URL(stack.redisUrl).port), '127.0.0.1');
  t.after(() => monitor.destroy());
  monitor.write('MONITOR\r\n');
  let looks = 0;
  for await (const line of createInterface({ input: monitor })) {
    if (!/"xreadgroup"/i.test(line)) continue;
    looks = line.includes('"BLOCK"') ? 0 : looks + 1;
    if (looks === 2) break;
  }
  monitor.destroy();
  const parameters = { tokens: 10, intervalMs: 500, seed: 1 };
  for (const client of [first!, second!])
    client.send({ type: 'chat', messageId: 'm', contents: 'hello', parameters });
  const held = async () => {
    const lists = await Promise.all(
      ['n1', 'n2'].map((node) => look.client.xpending(keys.requests(node), 'workers')),
    );
    return lists.every(([count]) => count === 1);
  };
  await eventually('both with the worker that can run one', held, 5_000);
  await stack.addWorker({ WORKER_CONCURRENCY: '1' });
  await Promise.all([first!.next('token', 'm'), second!.next('token', 'm', 10_000)]);
  for (const client of [first!, second!])
    assert.ok(!client.frames.some(({ type }) => type === 'done'), 'neither waited for the other');
  const answers = await Promise.all([first!, second!].map((client) => client.answer('m')));
  assert.deepEqual(
    answers.map(({ starts }) => starts),
    [1, 1],
  );
});

test('a delivery that a lost connection did not tell its worker of does not wait for the lease', async (t) => {
  const { look, keys, ...stack } = await startStack(t, {
    workers: 1,
    acl: false,
    workerEnv: { WORKER_CONCURRENCY: '1', LEASE_MS: '60000' },
  });
  const [first, second] = [await stack.client(20001), await stack.client(20002)];
  first.send({ type: 'chat', messageId: 'a', contents: 'x', parameters: { tokens: 100, intervalMs: 20 } });
  await first.next('token', 'a');
  second.send({ type: 'chat', messageId: 'b', contents: 'x' });
  await second.next('accepted', 'b');
  // It has no room and does not read: what it is given now, it does not hear of.
  const { worker } = (await stack.workers[0]!.logged(({ msg }) => msg === 'ready')) as { worker: string };
  await look.client.xreadgroup('GROUP', 'workers', worker, 'COUNT', 1, 'STREAMS', keys.requests('n1'), '>');
  for (const line of String(await look.client.call('client', 'list')).split('\n'))
    if (line.includes(`name=${worker}:commands`))
      await look.client.call('client', 'kill', 'id', /id=(\d+)/.exec(line)![1]!);
  assert.equal((await first.answer('a')).starts, 1);
  assert.equal((await second.answer('b')).starts, 1);
});

test('a worker leaves while Redis is away', { timeout: 60_000 }, async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-leave-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const server = await startRedisServer({ dir });
  const worker = await startWorker(
    readWorkerConfig({ REDIS_URL: server.url, DRAIN_MS: '1000' }),
    async function* () {
      yield 'nothing';
    },
    pino({ level: 'silent' }),
  );
  await server.kill('SIGKILL');
  const left = await Promise.race([worker.stop().then(() => true), delay(40_000, false, { ref: false })]);
  assert.ok(left, 'it still waits for Redis');
});
