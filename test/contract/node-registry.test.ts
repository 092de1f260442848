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
