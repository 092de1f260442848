import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import type { Command } from '../../shared/redis.ts';
import { eventually } from '../helpers/eventually.ts';
import { spawnProcess, startStack } from '../helpers/stack.ts';

/** Full queues, waiting clients, and processes that leave in order. */

const slow = { tokens: 400, intervalMs: 20 };

test('a full queue is answered with position and retry time, and keeps nothing', async (t) => {
  const stack = await startStack(t, { workers: 0, gatewayEnv: { QUEUE_LIMIT: '2', USER_ACTIVE_LIMIT: '2' } });
  const client = await stack.client(20001);
  for (const [index, id] of ['q1', 'q2'].entries()) {
    client.send({ type: 'chat', messageId: id, contents: 'x', parameters: { tokens: 3, intervalMs: 0 } });
    assert.equal((await client.next('accepted', id)).position, index);
  }
  client.send({ type: 'chat', messageId: 'q3', contents: 'x' });
  assert.equal((await client.next('rejected', 'q3')).code, 'too_many_active');
  const other = await stack.client(20002);
  other.send({ type: 'chat', messageId: 'q4', contents: 'x' });
  const rejected = await other.next('rejected', 'q4');
  assert.deepEqual([rejected.code, rejected.temporary, rejected.position], ['queue_full', true, 2]);
  assert.ok(rejected.retryAfterMs! > 0);
  assert.equal(await stack.look.client.exists(stack.keys.generation('20002', 'q4')), 0);
  other.send({ type: 'resume', messageId: 'q4' });
  assert.equal((await other.next('rejected', 'q4')).code, 'unknown_message');

  // Cancelling a queued request ends it and frees its place at once, without any worker.
  client.send({ type: 'cancel', messageId: 'q1' });
  const cancelled = await client.answer('q1');
  assert.deepEqual([cancelled.end.id, cancelled.text], ['1-0', '']);
  await eventually(
    'a free place',
    async () => (await stack.look.client.xlen(stack.keys.requests('n1'))) === 1,
  );
  assert.equal((await client.next('queued', 'q2')).position, 0);
  other.send({ type: 'chat', messageId: 'q4', contents: 'x', parameters: { tokens: 3, intervalMs: 0 } });
  assert.equal((await other.next('accepted', 'q4')).position, 1);
  await stack.addWorker();
  assert.equal((await client.answer('q2')).end.type, 'done');
  assert.equal((await other.answer('q4')).end.type, 'done');
});

test('a gateway that drains refuses new chats, closes 4000, leaves; its answers go on', async (t) => {
  const stack = await startStack(t, { gateways: 2, workers: 1 });
  const client = await stack.client(20001);
  client.send({
    type: 'chat',
    messageId: 'g1',
    contents: 'x',
    parameters: { tokens: 100, intervalMs: 20, seed: 3 },
  });
  await client.next('token', 'g1');
  const [first, second] = stack.gateways;
  first!.child.kill('SIGTERM');
  assert.equal((await client.closed).code, 4000);
  assert.equal(await first!.exited, 0);
  const again = await stack.client(20001, second);
  again.send({ type: 'resume', messageId: 'g1' });
  const answer = await again.answer('g1');
  assert.equal(answer.text.split(' ').length, 100);
  // Its id is free at once.
  const back = await stack.addGateway({ node: 'n1' });
  assert.equal((await fetch(`${back.http}/readyz`)).status, 200);
});

test('a worker that drains finishes what it runs', async (t) => {
  const stack = await startStack(t, { workers: 1 });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'w1', contents: 'x', parameters: { tokens: 60, intervalMs: 20 } });
  await client.next('token', 'w1');
  stack.workers[0]!.child.kill('SIGTERM');
  const answer = await client.answer('w1');
  assert.equal(answer.starts, 1);
  assert.equal(await stack.workers[0]!.exited, 0);
  const consumers = (await stack.look.client.xinfo(
    'CONSUMERS',
    stack.keys.requests('n1'),
    'workers',
  )) as unknown[];
  assert.equal(consumers.length, 0);
});

test('a worker whose drain time is up hands its requests back; the try does not count', async (t) => {
  const stack = await startStack(t, { workers: 1, workerEnv: { DRAIN_MS: '200', MAX_ATTEMPTS: '1' } });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'h1', contents: 'x', parameters: { tokens: 150, intervalMs: 20 } });
  await client.next('token', 'h1');
  stack.workers[0]!.child.kill('SIGTERM');
  assert.equal(await stack.workers[0]!.exited, 0);
  await stack.addWorker();
  const answer = await client.answer('h1');
  assert.equal(answer.end.type, 'done');
  assert.equal(answer.starts, 2);
});

test('serverless mode: a worker leaves with 0 after nothing to do', async (t) => {
  const stack = await startStack(t, { workers: 0 });
  const client = await stack.client(20001);
  client.send({
    type: 'chat',
    messageId: 's1',
    contents: 'x',
    parameters: { tokens: 5, intervalMs: 1, failAttempts: 1 },
  });
  await client.next('accepted', 's1');
  const worker = await stack.addWorker({ EXIT_WHEN_IDLE_MS: '500', RETRY_BASE_MS: '1500' });
  assert.equal((await client.answer('s1')).end.type, 'done');
  assert.equal(await worker.exited, 0);
});

test('a worker in serverless mode that retires finishes what it runs, however long that takes', async (t) => {
  const stack = await startStack(t, {
    workers: 1,
    workerEnv: { EXIT_WHEN_IDLE_MS: '60000', DRAIN_MS: '200' },
  });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'r1', contents: 'x', parameters: { tokens: 100, intervalMs: 20 } });
  await client.next('token', 'r1');
  stack.workers[0]!.child.kill('SIGUSR2');
  assert.equal((await client.answer('r1')).starts, 1);
  assert.equal(await stack.workers[0]!.exited, 0);
});

test('a worker that leaves begins nothing that a read under way brings it', async (t) => {
  const stack = await startStack(t, { workers: 1, workerEnv: { DRAIN_MS: '500' } });
  const client = await stack.client(20001);
  stack.workers[0]!.child.kill('SIGTERM'); // it waits for requests, for up to a second more
  await stack.workers[0]!.logged((line) => line.msg === 'stopping');
  client.send({ type: 'chat', messageId: 'l1', contents: 'x', parameters: { tokens: 100, intervalMs: 20 } });
  await client.next('accepted', 'l1');
  await stack.addWorker();
  const answer = await client.answer('l1');
  assert.deepEqual([answer.starts, answer.end.id!.split('-')[0]], [1, '1']);
});

test('a second signal leaves at once with 1', async (t) => {
  const stack = await startStack(t, { workers: 1 });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'z1', contents: 'x', parameters: slow });
  await client.next('token', 'z1');
  const worker = stack.workers[0]!;
  worker.child.kill('SIGTERM');
  await worker.logged((line) => line.msg === 'stopping');
  await delay(100);
  worker.child.kill('SIGTERM');
  assert.equal(await worker.exited, 1);
});

test('Ctrl-C under npm, which comes twice, is one signal', async (t) => {
  const stack = await startStack(t, { workers: 1 });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'z1', contents: 'x', parameters: { tokens: 30, intervalMs: 30 } });
  await client.next('token', 'z1');
  const worker = stack.workers[0]!;
  worker.child.kill('SIGINT');
  await worker.logged((line) => line.msg === 'stopping');
  worker.child.kill('SIGINT');
  assert.equal(await worker.exited, 0);
  const { end, starts } = await client.answer('z1');
  assert.deepEqual([end.type, starts], ['done', 1]);
});

test('a Redis that answers and takes no writes makes a gateway not ready, for as long as that lasts', async (t) => {
  const stack = await startStack(t, { workers: 1 });
  const { http } = stack.gateways[0]!;
  const ready = async () => (await fetch(`${http}/readyz`)).text();
  const client = await stack.client(20090);
  await stack.look.client.config('SET', 'min-replicas-to-write', '1');
  try {
    client.send({
      type: 'chat',
      messageId: 'w1',
      contents: 'hello',
      parameters: { tokens: 3, intervalMs: 1 },
    });
    const rejected = await client.next('rejected', 'w1');
    assert.deepEqual([rejected.code, rejected.temporary], ['internal', true]);
    await eventually(
      'not ready',
      async () => (await ready()) === 'not ready: Redis takes no writes\n',
      15_000,
    );
  } finally {
    await stack.look.client.config('SET', 'min-replicas-to-write', '0');
  }
  await eventually('ready', async () => (await ready()) === 'ready\n', 15_000);
});

test('who left while Redis was away holds no place when it is back', async (t) => {
  const stack = await startStack(t, { workers: 0, gatewayEnv: { DEVICE_POLICY: '1' } });
  const { look, keys } = stack;
  const client = await stack.client('gone');
  await stack.redis.kill();
  client.close();
  await client.closed;
  await stack.gateways[0]!.logged(({ msg }) => msg === 'redis connection trouble');
  await delay(1_000); // the entry is to be removed in vain
  await stack.redis.restart();
  await eventually('no entry', async () => (await look.client.hlen(keys.connections('gone'))) === 0, 10_000);
  await stack.client('gone');
});

test('who comes back again and again costs no scan of the queue; a lost request is appended again, also if they left', async (t) => {
  const stack = await startStack(t, { workers: 0, gatewayEnv: { QUEUE_LIMIT: '5000' } });
  const { look, keys } = stack;
  const others = Array.from({ length: 1_000 }, (_, index): Command => {
    return ['xadd', keys.requests('n1'), '*', 'user', `other-${index}`, 'message', 'm'];
  });
  await look.batch(others);
  const client = await stack.client(20001);
  const chat = { type: 'chat', messageId: 'm', contents: 'x' };
  client.send(chat);
  await client.next('accepted', 'm');
  for (let round = 0; round < 50; round++) {
    client.send({ type: 'resume', messageId: 'm' });
    client.send(chat);
    const { position } = await client.next('accepted', 'm');
    assert.equal(position, 1_000);
  }
  assert.doesNotMatch(await look.client.info('commandstats'), /cmdstat_zscore/, 'find_queued.lua has run');

  await look.client.del(keys.requests('n1'));
  client.send({ type: 'resume', messageId: 'm' });
  await client.next('resumed', 'm');
  client.close();
  const [, fields] = await eventually(
    'the request',
    async () => (await look.client.xrange(keys.requests('n1'), '-', '+'))[0],
  );
  assert.deepEqual(fields.slice(0, 4), ['user', '20001', 'message', 'm']);
});

test('a question that comes again and cannot be let in does not end the stream of the first', async (t) => {
  const stack = await startStack(t, { workers: 1, acl: true });
  const acl = (...words: string[]) => stack.look.client.call('acl', ...words);
  const client = await stack.client(20091);
  const question = {
    type: 'chat',
    messageId: 'w1',
    contents: 'x',
    parameters: { tokens: 150, intervalMs: 20 },
  };
  client.send(question);
  await client.next('token', 'w1');
  await acl('SETUSER', 'gateway', '-evalsha', '-eval');
  client.send(question);
  assert.equal((await client.next('rejected', 'w1')).code, 'internal');
  await acl('SETUSER', 'gateway', '+evalsha', '+eval');
  const { text, end } = await client.answer('w1');
  assert.equal(end.type, 'done');
  assert.equal(text.split(' ').length, 150);
  await acl('LOG', 'RESET');
});

test('a wrong setting stops the start with its name', async () => {
  const cases: [string, Record<string, string>, RegExp][] = [
    ['gateway/main.ts', {}, /NODE_ID is required/],
    ['gateway/main.ts', { NODE_ID: 'n1', QUEUE_LIMIT: 'many' }, /QUEUE_LIMIT must be a whole number/],
    ['worker/main.ts', { LEASE_MS: '-1' }, /LEASE_MS/],
    ['worker/main.ts', { HANDLER: './nowhere.ts' }, /HANDLER/],
    ['worker/main.ts', { HANDLER: 'openai' }, /OPENAI_BASE_URL/],
  ];
  for (const [script, env, message] of cases) {
    const started = spawnProcess(script, env);
    assert.equal(await started.exited, 2, script);
    assert.match(started.logs.map((line) => line.msg).join('\n'), message);
  }
  const unreachable = spawnProcess('worker/main.ts', { REDIS_URL: 'redis://127.0.0.1:1' });
  await unreachable.logged((line) => /Redis at redis:\/\/127.0.0.1:1 does not answer/.test(line.msg ?? ''));
  assert.equal(await unreachable.exited, 1);
});
