import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createNodeRegistry } from '../../shared/node-registry.ts';
import { startStack } from '../helpers/stack.ts';

test('whether Redis takes beats is asked without a trace', async (t) => {
  const { look, keys } = await startStack(t, { gateways: 0, workers: 0 });
  const registry = createNodeRegistry({ redis: look, keys });
  assert.equal(await registry.takesBeats(), true);
  for (const [setting, refusing, usual] of [
    ['min-replicas-to-write', '1', '0'],
    ['maxmemory', '1', '0'],
  ] as const) {
    await look.client.config('SET', setting, refusing);
    assert.equal(await registry.takesBeats(), false, setting);
    await look.client.config('SET', setting, usual);
  }
  assert.equal(await registry.takesBeats(), true);
  assert.equal(await registry.countWorkers(), 0);
});

test('workers are counted whose lease runs, not those that left or fell silent', async (t) => {
  const { look, keys } = await startStack(t, { gateways: 0, workers: 0 });
  const registry = createNodeRegistry({ redis: look, keys });
  const facts = {
    concurrency: 1,
    running: [],
    runningCount: 0,
    tokens: 0,
    done: 0,
    failed: 0,
    host: 'h',
    pid: 1,
  };
  for (const [worker, leaseMs] of [
    ['one', 60_000],
    ['two', 60_000],
    ['three', 60_000],
    ['silent', -1],
  ] as const)
    await registry.beatWorker(worker, leaseMs, facts);
  await registry.leaveWorker('two');
  assert.equal(await registry.countWorkers(), 2);

  // The clock of a machine does not count: leases are written and read by that of Redis.
  t.mock.timers.enable({ apis: ['Date'], now: Date.now() + 3_600_000 });
  await registry.beatWorker('ahead', -1, facts);
  await registry.sweepWorkers(30_000);
  assert.equal(await registry.countWorkers(), 2);
  t.mock.timers.reset();
  assert.deepEqual((await look.client.hkeys(keys.workers())).sort(), ['ahead', 'one', 'silent', 'three']);
});
