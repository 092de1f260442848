import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { createClient } from '../../shared/client.ts';
import { eventually } from '../helpers/eventually.ts';
import { type RedisCluster, startRedisCluster } from '../helpers/redis-cluster.ts';
import { type Stack, startStack } from '../helpers/stack.ts';

/**
 * A real Redis Cluster, chosen by REDIS_URL alone: the scenarios of the single server run again on it, then a slot
 * moves and a master dies while answers stream.
 */

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
let cluster: RedisCluster;
before(async () => {
  cluster = await startRedisCluster();
});
after(() => cluster.stop());

/** Scenario files that know nothing of the engine; each is a main job or messages between people. */
const SCENARIOS = readdirSync(`${ROOT}test/scenarios`).filter((file) =>
  /^(chat|people-(door|http|messages))\.test\.ts$/.test(file),
);

for (const file of SCENARIOS)
  test(`${file} on the cluster`, { timeout: 120_000 }, async () => {
    for (const { redis } of cluster.nodes.slice(0, 3)) await redis.client.call('flushall');
    const { NODE_TEST_CONTEXT: _, ...env } = process.env;
    const child = spawn(process.execPath, ['--import', 'tsx', '--test', `test/scenarios/${file}`], {
      cwd: ROOT,
      env: { ...env, TEST_REDIS_URL: cluster.url },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    let output = '';
    child.stdout.on('data', (chunk) => {
      output += chunk;
    });
    const code = await new Promise((resolve) => child.on('close', resolve));
    assert.equal(code, 0, output.slice(-6_000));
    assert.match(output, /# pass [1-9]/);
  });

async function streamThrough(
  t: { after(step: () => unknown): void },
  stack: Stack,
  users: number[],
  meanwhile: () => Promise<void>,
): Promise<void> {
  const clients = users.map((userId) => {
    const client = createClient({ url: stack.gateways[userId % 2]!.url, userId, reconnectBaseMs: 50 });
    t.after(() => client.close());
    return client;
  });
  await Promise.all(clients.map((client) => client.connect()));
  const answers = clients.map((client, index) =>
    client.chat('tell me', { messageId: 'm', parameters: { tokens: 300, intervalMs: 20, seed: index } }),
  );
  await eventually('text everywhere', () => answers.every((answer) => answer.text.length > 20));
  await meanwhile();
  for (const [index, answer] of answers.entries()) {
    const { text, finishReason, attempt } = await answer.done;
    const what = `user ${users[index]}: ${finishReason}, attempt ${attempt}, ${answer.restarts} restarts`;
    assert.equal(text.split(' ').length, 300, what);
  }
}

test('a slot moves and a master dies while answers stream', { timeout: 120_000 }, async (t) => {
  const stack = await startStack(t, {
    gateways: 2,
    workers: 2,
    redisUrl: cluster.url,
    acl: true,
    env: { LEASE_MS: '3000' },
  });
  const users = Array.from({ length: 12 }, (_, index) => 70_000 + index);

  await streamThrough(t, stack, users, async () => {
    // The logs of one user, and the request stream of one node, each to another master.
    for (const key of [stack.keys.log('70000', 'm'), stack.keys.requests('n1'), stack.keys.replies('n2')]) {
      const slot = await cluster.slotOf(key);
      const from = await cluster.masterOf(slot);
      const to = cluster.nodes.find((node) => node !== from && cluster.nodes.indexOf(node) < 3)!;
      assert.ok((await cluster.moveSlot(slot, to)) > 0, `no key moved with ${key}`);
      assert.equal(await cluster.masterOf(slot), to);
    }
  });

  const later = users.map((user) => user + 100);
  await streamThrough(t, stack, later, async () => {
    const slot = await cluster.slotOf(stack.keys.replies('n1'));
    const master = await cluster.masterOf(slot);
    await master.server.kill('SIGKILL');
    const started = Date.now();
    await eventually('failover', async () => (await cluster.masterOf(slot)) !== master);
    t.diagnostic(`a replica took over after ${Date.now() - started} ms`);
  });
  for (const { http } of stack.gateways)
    await eventually('ready again', async () => (await fetch(`${http}/readyz`)).status === 200);
});
