import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { isProcessAlive } from '../../infra/run-state.ts';
import { startRedisCluster } from '../helpers/redis-cluster.ts';
import { spawnProcess, startStack } from '../helpers/stack.ts';

test('processes leave while the whole cluster is away', { timeout: 120_000 }, async (t) => {
  const cluster = await startRedisCluster();
  t.after(() => cluster.stop());
  const stack = await startStack(t, {
    gateways: 1,
    workers: 1,
    redisUrl: cluster.url,
    acl: true,
    env: { DRAIN_MS: '1000' },
  });
  const autoscaler = spawnProcess('infra/autoscaler.ts', {
    REDIS_URL: cluster.url,
    WORKERS_MIN: '1',
    DRAIN_MS: '1000',
  });
  t.after(() => autoscaler.kill('SIGKILL'));
  await autoscaler.logged((line) => line.msg === 'scaling');
  const started = autoscaler.logs.flatMap((line) =>
    line.msg === 'worker started' ? [Number(line.worker)] : [],
  );
  await Promise.all(cluster.nodes.map(({ server }) => server.kill('SIGKILL')));
  await delay(12_000); // by then ioredis has given up some commands, and keeps others for later
  const processes = [...stack.gateways, ...stack.workers, autoscaler];
  for (const { child } of processes) child.kill('SIGTERM');
  const left = Promise.all(processes.map(({ exited }) => exited));
  assert.deepEqual(await Promise.race([left, delay(45_000, 'still there', { ref: false })]), [0, 0, 0]);
  assert.deepEqual(started.map(isProcessAlive), [false]);
});
