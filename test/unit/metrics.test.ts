import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createGatewayMetrics, type SharedNumbers } from '../../gateway/metrics.ts';

const createMetrics = (pipeline: () => Promise<SharedNumbers | null>) =>
  createGatewayMetrics({ connections: () => 7, followed: () => 0, pipeline });

test('queues that nobody tells cost a scrape nothing but their own numbers', { timeout: 5_000 }, async () => {
  const waiting = new Promise<never>(() => {});
  for (const pipeline of [() => waiting, () => Promise.reject(new Error('no Redis'))]) {
    const { registry } = createMetrics(pipeline);
    const alive = setInterval(() => {}, 1_000);
    const text = await registry.metrics();
    clearInterval(alive);
    assert.match(text, /^rivulet_connections 7$/m);
    assert.doesNotMatch(text, /^rivulet_queue_requests\{/m);
    assert.doesNotMatch(text, /^rivulet_workers /m, 'unknown is not none');
  }
});

test('live workers are counted, by one look for all gauges, as long as this gateway tells them', async () => {
  const node = { node: 'n1', waiting: 2, running: 1, retries: 0, dead: 0 };
  let told: SharedNumbers | null = { nodes: [node], workers: [{ alive: true }, { alive: false }] };
  let looks = 0;
  const { registry } = createMetrics(async () => {
    looks++;
    return told;
  });
  assert.match(await registry.metrics(), /^rivulet_workers 1$/m);
  assert.equal(looks, 1);
  told = { nodes: [node], workers: [] };
  assert.match(await registry.metrics(), /^rivulet_workers 0$/m);
  told = null;
  assert.doesNotMatch(await registry.metrics(), /^rivulet_(workers|queue_requests)[ {]/m);
});
