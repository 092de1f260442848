import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createGatewayMetrics } from '../../gateway/metrics.ts';

test('queues that nobody tells cost a scrape nothing but their own numbers', { timeout: 5_000 }, async () => {
  const waiting = new Promise<never>(() => {});
  for (const queues of [() => waiting, () => Promise.reject(new Error('no Redis'))]) {
    const { registry } = createGatewayMetrics({ connections: () => 7, followed: () => 0, queues });
    const alive = setInterval(() => {}, 1_000);
    const text = await registry.metrics();
    clearInterval(alive);
    assert.match(text, /^rivulet_connections 7$/m);
    assert.doesNotMatch(text, /^rivulet_queue_requests\{/m);
  }
});
