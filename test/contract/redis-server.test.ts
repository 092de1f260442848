import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { startRedisServer } from '../../infra/redis-server.ts';
import { isProcessAlive } from '../../infra/run-state.ts';
import { createRedis, type RedisConnection } from '../../shared/redis.ts';

type Later = (step: () => unknown) => void;

/** Teardown in reverse order: node:test runs `after` hooks first come, first served. */
function later(t: TestContext): Later {
  const steps: (() => unknown)[] = [];
  t.after(async () => {
    for (const step of steps.reverse()) await step();
  });
  return (step) => steps.push(step);
}

async function tempDir(defer: Later): Promise<string> {
  const dir = await mkdtemp(join(tmpdir(), 'rivulet redis ')); // with a space, as home folders may have
  defer(() => rm(dir, { recursive: true, force: true }));
  return dir;
}

async function using<T>(url: string, work: (client: RedisConnection['client']) => Promise<T>): Promise<T> {
  const redis = createRedis({ url, name: 'redis-server-test' });
  try {
    await redis.connected();
    return await work(redis.client);
  } finally {
    await redis.close();
  }
}

test('starts private and durable, and keeps its data over a stop and a start', async (t) => {
  const defer = later(t);
  const dir = await tempDir(defer);
  const first = await startRedisServer({ dir });
  defer(() => first.stop());
  const settings = await using(first.url, async (client) => {
    await client.set('a', '1');
    return client.call('CONFIG', 'GET', 'appendonly', 'appendfsync', 'maxmemory-policy', 'save', 'bind');
  });
  assert.deepEqual(
    new Set(settings as string[]),
    new Set([
      'appendonly',
      'yes',
      'appendfsync',
      'everysec',
      'maxmemory-policy',
      'noeviction',
      'save',
      '',
      'bind',
      '127.0.0.1',
    ]),
  );
  await first.stop();
  await first.stop();
  assert.equal(isProcessAlive(first.pid), false);

  const second = await startRedisServer({ dir });
  defer(() => second.stop());
  assert.equal(await using(second.url, (client) => client.get('a')), '1');
});

test('a killed server comes back on the same port with a new process', async (t) => {
  const defer = later(t);
  const ended: string[] = [];
  const server = await startRedisServer({
    dir: await tempDir(defer),
    onUnexpectedEnd: (reason) => ended.push(reason),
  });
  defer(() => server.stop());
  const { port, pid } = server;
  await server.kill('SIGKILL');
  await server.restart();
  assert.equal(server.port, port);
  assert.notEqual(server.pid, pid);
  assert.deepEqual(ended, []); // we did it ourselves
  process.kill(server.pid, 'SIGKILL');
  while (ended.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
  assert.match(ended[0]!, /ended with SIGKILL/);
});

test('a hung server is still stopped', async (t) => {
  const defer = later(t);
  const server = await startRedisServer({ dir: await tempDir(defer) });
  defer(() => server.stop());
  await server.kill('SIGSTOP');
  await server.stop();
  assert.equal(isProcessAlive(server.pid), false);
});

test('an early end gives the last lines of its log', async (t) => {
  const defer = later(t);
  const dir = await tempDir(defer);
  await assert.rejects(startRedisServer({ dir, args: ['--nonsense', 'yes'] }), /code 1.*nonsense/s);
});

test('a taken port is an error, never a visit to the server that has it', async (t) => {
  const defer = later(t);
  const other = await startRedisServer({ dir: await tempDir(defer) });
  defer(() => other.stop());
  await assert.rejects(startRedisServer({ dir: await tempDir(defer), port: other.port }), /already in use/i);
});

test('a silent program on the port does not count as an answer', async (t) => {
  const defer = later(t);
  const silent = createServer((socket) => defer(() => socket.destroy()));
  await new Promise<void>((resolve) => silent.listen(0, '127.0.0.1', resolve));
  defer(() => silent.close());
  const { port } = silent.address() as { port: number };
  await assert.rejects(startRedisServer({ dir: await tempDir(defer), port }), /already in use/i);
});

test('two servers never share a data folder', async (t) => {
  const defer = later(t);
  const dir = await tempDir(defer);
  const server = await startRedisServer({ dir });
  defer(() => server.stop());
  await assert.rejects(
    startRedisServer({ dir }),
    new RegExp(`in use by the redis-server with process id ${server.pid}`),
  );
});

test('a program that is not there is named', async (t) => {
  const defer = later(t);
  const dir = await tempDir(defer);
  await assert.rejects(
    startRedisServer({ dir, program: '/nonexistent/redis' }),
    /nonexistent\/redis is not on the PATH/,
  );
});
