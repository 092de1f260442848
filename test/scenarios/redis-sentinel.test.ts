import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { Redis } from 'ioredis';
import { createClient } from '../../shared/client.ts';
import { createRedis } from '../../shared/redis.ts';
import { startSentinelSet } from '../faults/sentinel.ts';
import { eventually } from '../helpers/eventually.ts';
import { startStack } from '../helpers/stack.ts';

test('Sentinel, by the URL alone: the master dies while answers stream', { timeout: 90_000 }, async (t) => {
  const sentinels = await startSentinelSet();
  t.after(() => sentinels.stop());
  const stack = await startStack(t, { redisUrl: sentinels.url, env: { LEASE_MS: '5000' } });
  const clients = Array.from({ length: 8 }, (_, index) =>
    createClient({ url: stack.gateways[0]!.url, userId: 80_000 + index, reconnectBaseMs: 50 }),
  );
  t.after(() => Promise.all(clients.map((client) => client.close())));
  const answers = clients.map((client, index) =>
    client.chat('tell me', { parameters: { tokens: 250, intervalMs: 20, seed: index } }),
  );
  await eventually('text everywhere', () => answers.every((answer) => answer.text.length > 20));
  const before = await sentinels.master();
  await sentinels.servers[before].kill('SIGKILL');
  const started = Date.now();
  await eventually('failover', async () => (await sentinels.master()) !== before);
  t.diagnostic(`the sentinels named the replica after ${Date.now() - started} ms`);
  for (const answer of answers) assert.equal((await answer.done).text.split(' ').length, 250);
});

test('while no sentinel answers, commands fail in time instead of waiting for one', {
  timeout: 90_000,
}, async (t) => {
  const sentinels = await startSentinelSet();
  t.after(() => sentinels.stop());
  const redis = createRedis({ url: sentinels.url, name: 'test', hot: true });
  t.after(() => redis.close());
  await redis.connected();
  assert.equal(await sentinels.master(), 0);
  sentinels.signalSentinels('SIGSTOP');
  const direct = new Redis(sentinels.servers[0].port);
  t.after(() => direct.disconnect());
  await direct.call('client', 'kill', 'type', 'normal', 'skipme', 'yes');
  await eventually('the loss', async () => !redis.isReady());
  const commands = [redis.client.get('k'), redis.send(['ping']), redis.script('settle_chat', ['k'], ['x'])];
  const told = Promise.all(commands.map((command) => assert.rejects(command)));
  assert.equal(
    await Promise.race([told.then(() => 'told'), delay(10_000, 'still waiting', { ref: false })]),
    'told',
  );
  sentinels.signalSentinels('SIGCONT');
  await eventually(
    'a connection',
    () =>
      redis.send(['ping']).then(
        () => true,
        () => false,
      ),
    30_000,
  );
});

test('a sentinel that has not heard of the failover is not believed', { timeout: 90_000 }, async (t) => {
  const sentinels = await startSentinelSet({ deaf: true, password: 'a&b+c' });
  t.after(() => sentinels.stop());
  const before = await sentinels.master();
  const [old, next] = before === 0 ? sentinels.servers : sentinels.servers.toReversed();
  await old!.kill('SIGKILL');
  await eventually('failover', async () => (await sentinels.master()) !== before);
  await old!.restart(); // says that it is the master until the others demote it, eight seconds later

  const redis = createRedis({ url: sentinels.url, name: 'test', hot: true });
  t.after(() => redis.close());
  await redis.connected();
  const info = String(await redis.send(['info', 'server']));
  const direct = new Redis(old!.port);
  t.after(() => direct.disconnect());
  const asked = await direct.info('replication');
  assert.match(asked, /role:master/, 'the old one still takes writes');
  assert.equal(Number(/tcp_port:(\d+)/.exec(info)![1]), next!.port);
});
