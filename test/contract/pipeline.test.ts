import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { promisify } from 'node:util';
import { type RedisServer, startRedisServer } from '../../infra/redis-server.ts';
import { createKeys } from '../../shared/keys.ts';
import { readPipeline } from '../../shared/pipeline.ts';
import { createRedis, type RedisConnection } from '../../shared/redis.ts';

const keys = createKeys('chat:');
const NOW = Date.now();
let dir: string;
let server: RedisServer;
let redis: RedisConnection;

before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'rivulet-pipeline-'));
  server = await startRedisServer({ dir });
  redis = createRedis({ url: server.url, name: 'pipeline-test' });
  await redis.connected();
});

after(async () => {
  await redis?.close();
  await server?.stop();
  await rm(dir, { recursive: true, force: true });
});

test('an empty Redis has no nodes and no workers', async () => {
  assert.deepEqual(await readPipeline(redis.client, keys, NOW), { time: NOW, nodes: [], workers: [] });
});

test('counts what waits, runs, retries and died, per node; missing streams are zero', async () => {
  const { client } = redis;
  await client.hset(keys.nodes(), {
    n2: JSON.stringify({ instance: 'i2', until: NOW - 1, startedAt: 1, url: null, connections: 0 }),
    n1: JSON.stringify({
      instance: 'i1',
      until: NOW + 60_000,
      startedAt: 1,
      url: 'http://127.0.0.1:8080',
      connections: 3,
    }),
    n3: 'not JSON',
  });
  await client.hset(
    keys.workers(),
    'w1',
    JSON.stringify({
      until: NOW + 60_000,
      concurrency: 16,
      running: [{ user: 'u1', messageId: 'm1', attempt: 2, since: NOW - 1500 }],
      runningCount: 1,
      tokens: 42,
      done: 7,
      failed: 1,
      host: 'here',
      pid: 99,
    }),
  );
  await client.hset(keys.workers(), 'w2', '{}');

  await client.xgroup('CREATE', keys.requests('n1'), 'workers', '0', 'MKSTREAM');
  for (let i = 0; i < 5; i++) await client.xadd(keys.requests('n1'), '*', 'user', 'u1', 'messageId', `m${i}`);
  await client.xreadgroup('GROUP', 'workers', 'w1', 'COUNT', 3, 'STREAMS', keys.requests('n1'), '>');
  // Acked and deleted in one step, as workers do: the length stays exact where XINFO's lag does not.
  const first = (await client.xrange(keys.requests('n1'), '-', '+', 'COUNT', 1))[0]![0];
  await client.xack(keys.requests('n1'), 'workers', first);
  await client.xdel(keys.requests('n1'), first);

  await client.zadd(keys.retries('n1'), 1, 'a', 2, 'b');
  await client.xadd(keys.dead('n1'), '*', 'reason', 'x');
  for (let i = 0; i < 4; i++) await client.xadd(keys.replies('n1'), 'MAXLEN', '=', 2, '*', 'frame', '{}');

  const snapshot = await readPipeline(redis.client, keys, NOW);
  const none = { waiting: 0, running: 0, retries: 0, dead: 0, replied: 0, replyLength: 0, connections: 0 };
  assert.deepEqual(snapshot.nodes, [
    {
      node: 'n1',
      alive: true,
      url: 'http://127.0.0.1:8080',
      waiting: 2,
      running: 2,
      retries: 2,
      dead: 1,
      replied: 4,
      replyLength: 2,
      connections: 3,
    },
    { node: 'n2', alive: false, url: null, ...none },
    { node: 'n3', alive: false, url: null, ...none },
  ]);
  assert.deepEqual(snapshot.workers, [
    {
      worker: 'w1',
      alive: true,
      concurrency: 16,
      running: [{ user: 'u1', messageId: 'm1', attempt: 2, sinceMs: 1500 }],
      runningCount: 1,
      tokens: 42,
      done: 7,
      failed: 1,
      host: 'here',
      pid: 99,
    },
    {
      worker: 'w2',
      alive: false,
      concurrency: 0,
      running: [],
      runningCount: 0,
      tokens: 0,
      done: 0,
      failed: 0,
      host: '',
      pid: 0,
    },
  ]);
});

test('a stream without the group counts all its requests as waiting', async () => {
  await redis.client.hset(
    keys.nodes(),
    'n4',
    JSON.stringify({ until: NOW + 60_000, url: null, connections: 0 }),
  );
  await redis.client.xadd(keys.requests('n4'), '*', 'user', 'u1');
  const node = (await readPipeline(redis.client, keys, NOW)).nodes.find(({ node }) => node === 'n4');
  assert.equal(node?.waiting, 1);
  assert.equal(node?.running, 0);
});

test('a key of the wrong type is an error, not a zero', async () => {
  const other = createKeys('wrong:');
  await redis.client.hset(other.nodes(), 'n1', '{}');
  await redis.client.set(other.requests('n1'), 'text');
  await assert.rejects(readPipeline(redis.client, other, NOW), /WRONGTYPE/);
});

const run = promisify(execFile);
const streams = (...args: string[]) =>
  run(process.execPath, ['--import', 'tsx', 'infra/streams.ts', ...args], {
    env: { PATH: process.env.PATH },
  });

test('npm run streams prints one plain table, or JSON', async () => {
  const { stdout } = await streams('--redis', server.url);
  assert.match(stdout, /^GATEWAY +STATE +WAITING/);
  assert.match(stdout, /n1 +alive +2 +2 +2 +1 +4 +3 +http:\/\/127\.0\.0\.1:8080/);
  assert.match(stdout, /w1 .*u1:m1 \(\d+ s, attempt 2\)/);
  assert.ok(!stdout.includes('\x1b'));
  const snapshot = JSON.parse((await streams('--redis', server.url, '--json')).stdout);
  assert.equal(snapshot.nodes.length, 4);
  assert.match(
    (await streams('--redis', server.url, '--prefix', 'none:')).stdout,
    /No gateway has registered/,
  );
});

test('npm run streams names a Redis that does not answer, and ends', async () => {
  const startedAt = Date.now();
  await assert.rejects(
    streams('--redis', 'redis://:secret@127.0.0.1:1'),
    (error: Error & { stderr: string }) => {
      assert.match(error.stderr, /Redis at redis:\/\/\*\*\*@127\.0\.0\.1:1 does not answer/);
      assert.doesNotMatch(error.stderr, /secret|\n {4}at /);
      return true;
    },
  );
  assert.ok(Date.now() - startedAt < 15_000);
});
