import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createGenerationStore } from '../../shared/generation-store.ts';
import { until } from '../faults/stage.ts';
import { startStack } from '../helpers/stack.ts';

const TOKENS = 12;
const SCRIPTS = {
  stream: { tokens: TOKENS, intervalMs: 20, seed: 1 },
  'at once': { tokens: TOKENS, intervalMs: 0, seed: 1 },
};

/**
 * A worker calls the model of a request that comes for the first time before it has asked Redis. Here such requests are
 * not what they look like. The lease is long: whatever is left to it fails the test.
 */
for (const [name, parameters] of Object.entries(SCRIPTS))
  test(`a request that looks like a first attempt and is none: ${name}`, { timeout: 60_000 }, async (t) => {
    const stack = await startStack(t, { gateways: 1, workers: 0, workerEnv: { LEASE_MS: '50000' } });
    const { look, keys } = stack;
    const user = '20001';
    const store = createGenerationStore({ redis: look, keys, retentionMs: 60_000 });
    const client = await stack.client(20001);
    for (const messageId of ['plain', 'stopped', 'retried', 'twice']) {
      client.send({ type: 'chat', messageId, contents: 'hello', parameters });
      await client.next('accepted', messageId);
    }
    const queued = await look.client.xrange(keys.requests('n1'), '-', '+');
    assert.deepEqual(
      queued.map(([, fields]) => fields[4]),
      Array(4).fill('payload'),
    );

    // Its gateway died between the cancel and the removal of the request.
    assert.equal((await store.cancel(user, 'stopped')).state, 'cancelled');
    // Three attempts were made with another entry of it, and it was given back.
    await look.client.hset(keys.generation(user, 'retried'), 'attempt', 3, 'tries', 1);
    await look.client.xadd(keys.log(user, 'retried'), '3-0', 'start', '3');
    // It was appended twice.
    await look.client.xadd(keys.requests('n1'), '*', ...queued[3]![1]);

    await Promise.all([stack.addWorker(), stack.addWorker()]);
    const plain = await client.answer('plain');
    assert.equal(plain.text.split(' ').length, TOKENS);
    const [retried, twice, stopped] = await Promise.all(
      ['retried', 'twice', 'stopped'].map((messageId) => client.answer(messageId)),
    );
    assert.equal(retried!.text, plain.text);
    assert.match(retried!.end.id!, /^4-/, 'above every attempt before');
    assert.equal(twice!.text, plain.text);
    assert.match(twice!.end.id!, /^1-/, 'one attempt did it');
    assert.equal(stopped!.text, '', 'nothing of what its model said got out');
    assert.equal((stopped!.end as { finishReason?: string }).finishReason, 'cancelled');
    await until(
      'nothing is left to the lease',
      5_000,
      async () => (await look.client.xlen(keys.requests('n1'))) === 0,
    );
    const [pending] = (await look.client.call('xpending', keys.requests('n1'), 'workers')) as [number];
    assert.equal(pending, 0);
    const doubled = client.frames.filter((frame) => frame.type === 'done' && frame.messageId === 'twice');
    assert.equal(doubled.length, 1);
  });
