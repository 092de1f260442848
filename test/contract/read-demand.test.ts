import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { hostname } from 'node:os';
import { test } from 'node:test';
import { readDemand } from '../../infra/read-demand.ts';
import { createNodeRegistry } from '../../shared/node-registry.ts';
import { startStack } from '../helpers/stack.ts';

test('what workers of others run is left out, also of those on this machine; what the dead ran is not', async (t) => {
  const { look, keys } = await startStack(t, { gateways: 0, workers: 0 });
  const registry = createNodeRegistry({ redis: look, keys });
  await registry.register('n1', 'i', 60_000, { startedAt: 0, url: null, connections: 0 });
  for (let open = 0; open < 100; open++) await look.client.xadd(keys.requests('n1'), '*', 'user', 'u');
  const { pid: dead } = spawnSync('true');
  const ours = process.ppid;
  for (const [worker, host, pid, runningCount, leaseMs] of [
    ['ours', hostname(), ours, 1, 60_000],
    ['by-hand', hostname(), process.pid, 2, 60_000],
    ['dead', hostname(), dead, 4, 60_000],
    ['elsewhere', 'another', 1, 8, 60_000],
    ['silent', 'another', 2, 16, -1],
  ] as const)
    await registry.beatWorker(worker, leaseMs, {
      ...{ host, pid, runningCount, concurrency: 16, running: [], tokens: 0, done: 0, failed: 0 },
    });
  const demand = await readDemand(look, keys, (pid) => pid === ours);
  assert.equal(demand.needed, 100 - 2 - 8);
  assert.deepEqual(demand.ours, new Map([[ours, 1]]));
});
