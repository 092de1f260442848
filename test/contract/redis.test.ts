import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { setTimeout as delay, setImmediate as nextTurn } from 'node:timers/promises';
import { startRedisServer } from '../../infra/redis-server.ts';
import { ConfigError } from '../../shared/config.ts';
import { createRedis, isConnectionError, type RedisConnection, retrying } from '../../shared/redis.ts';
import { eventually } from '../helpers/eventually.ts';
import { freePortAndAt } from '../helpers/free-port.ts';

/** What `shared/redis.ts` makes of a real server in trouble. */

async function startServer(t: TestContext, args: string[] = [], port = 0) {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-redis-'));
  const server = await startRedisServer({ dir, args, port });
  t.after(async () => {
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  });
  return server;
}

async function connect(t: TestContext, url: string, options = {}): Promise<RedisConnection> {
  const redis = createRedis({ url, name: 'test', ...options });
  t.after(() => redis.close());
  await redis.connected();
  return redis;
}

/** A Cluster of one master that has all slots. */
async function startOneNodeCluster(t: TestContext) {
  const args = ['--cluster-enabled', 'yes', '--cluster-announce-ip', '127.0.0.1'];
  const server = await startServer(t, args, await freePortAndAt(10_000)); // the bus has the other
  const { client: admin } = await connect(t, server.url);
  await admin.call('cluster', 'ADDSLOTSRANGE', 0, 16_383);
  await eventually('a cluster that is ok', async () =>
    /cluster_state:ok/.test((await admin.call('cluster', 'INFO')) as string),
  );
  return { admin, cluster: await connect(t, server.url.replace('redis', 'redis+cluster')) };
}

test('a Cluster that is down for longer than ioredis has patience: a repeat may cure it', async (t) => {
  const { admin, cluster } = await startOneNodeCluster(t);
  await admin.call('cluster', 'DELSLOTS', 3);
  const error = await cluster.send(['set', 'key', 'value']).catch((reason) => reason);
  assert.match(String(error), /Too many Cluster redirections.*CLUSTERDOWN/);
  assert.ok(isConnectionError(error));
  const written = retrying(() => cluster.send(['set', 'key', 'value']));
  setTimeout(() => admin.call('cluster', 'ADDSLOTS', 3), 3_000);
  assert.equal(await written, 'OK');
});

test('a command may have more arguments than a call', async (t) => {
  const { admin, cluster } = await startOneNodeCluster(t);
  const server = await startServer(t);
  const names = Array.from({ length: 200_000 }, (_, index) => `{one}${index}`);
  for (const redis of [cluster, await connect(t, server.url), await connect(t, server.url, { hot: true })]) {
    assert.equal(await redis.send(['exists', ...names]), 0);
    assert.deepEqual(await redis.batch([['exists', ...names]]), [[null, 0]]);
  }
  assert.equal(await admin.dbsize(), 0);
});

test('a server that is busy with a script: a repeat may cure it', async (t) => {
  const server = await startServer(t, ['--busy-reply-threshold', '50']);
  const redis = await connect(t, server.url);
  const { client: other } = await connect(t, server.url);
  const script = other.eval('while true do end', 0).catch((reason) => reason);
  const error = await eventually('a refusal', () =>
    redis.send(['set', 'key', 'value']).then(
      () => null,
      (reason) => reason,
    ),
  );
  assert.match(error.message, /^BUSY /);
  const written = retrying(() => redis.send(['set', 'key', 'value']));
  setTimeout(() => redis.client.script('KILL'), 500);
  assert.equal(await written, 'OK');
  await script;
});

for (const hot of [false, true])
  test(`a database that cannot be selected is not taken for database 0${hot ? ', on hot connections' : ''}`, async (t) => {
    const server = await startServer(t);
    const { client: admin } = await connect(t, server.url);
    const refused = (url: string) =>
      assert.rejects(
        connect(t, url, { hot }),
        (error) => error instanceof ConfigError && /REDIS_URL/.test(error.message),
      );
    await refused(`${server.url}/99`);
    await admin.call('ACL', 'SETUSER', 'other', 'on', '>secret', '~*', '&*', '+@all', '-select');
    const url = `${server.url.replace('//', '//other:secret@')}/3`;
    await refused(url);

    // The right is taken away later, and given again.
    await admin.call('ACL', 'SETUSER', 'other', '+select');
    const redis = await connect(t, url, { hot });
    await redis.send(['set', 'before', '']);
    await admin.call('ACL', 'SETUSER', 'other', '-select');
    await admin.client('KILL', 'USER', 'other');
    const started = performance.now();
    while (performance.now() - started < 1_000) {
      await Promise.allSettled([redis.send(['set', 'meanwhile', '']), redis.client.set('meanwhile', '')]);
      await delay(10);
    }
    assert.equal(redis.isReady(), false);
    assert.equal(await admin.dbsize(), 0);
    await admin.call('ACL', 'SETUSER', 'other', '+select');
    await eventually('the connection', () => redis.isReady());
    await redis.send(['set', 'after', '']);
    assert.deepEqual((await redis.client.keys('*')).sort(), ['after', 'before']);
    assert.equal(await admin.dbsize(), 0);
  });

/** Holds everything in this process up, as a handler can that computes. */
function stall(ms: number): void {
  const until = performance.now() + ms;
  while (performance.now() < until);
}

test('a process that stood still reads what came meanwhile, and keeps its connections', async (t) => {
  const server = await startServer(t);
  const { client: other } = await connect(t, server.url);
  await other.xgroup('CREATE', 'requests', 'workers', '0', 'MKSTREAM');
  const redis = await connect(t, server.url, { hot: true });
  let reconnects = 0;
  redis.onReconnect(() => reconnects++);
  const reader = [
    'xreadgroup',
    'GROUP',
    'workers',
    'me',
    'BLOCK',
    1_000,
    'STREAMS',
    'requests',
    '>',
  ] as const;
  const read = redis.blocked(1_000, [...reader]);
  await delay(100);
  await nextTurn(); // what is due comes before what is received now
  void other.xadd('requests', '1-0', 'field', 'value');
  stall(5_000); // longer than a blocked read may be silent
  assert.deepEqual(await read, [['requests', [['1-0', ['field', 'value']]]]]);

  process.kill(server.pid, 'SIGSTOP');
  await delay(600); // pings are under way
  await nextTurn();
  process.kill(server.pid, 'SIGCONT');
  stall(4_000);
  await delay(1_000);
  assert.equal(reconnects, 0);
});
