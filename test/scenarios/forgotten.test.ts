import assert from 'node:assert/strict';
import { test } from 'node:test';
import { demoText } from '../faults/crowd.ts';
import { until } from '../faults/stage.ts';
import { startStack } from '../helpers/stack.ts';

/** A Redis that has lost everything, while an answer streams. */

for (const homeIsAlive of [true, false])
  test(`an answer goes on after FLUSHALL, and outlives the worker that put it back${homeIsAlive ? '' : '; its first gateway was gone before'}`, async (t) => {
    const env = { LEASE_MS: '1500', RETRY_BASE_MS: '50' };
    const stack = await startStack(t, { gateways: 2, workers: 1, workerEnv: env });
    const parameters = { tokens: 120, intervalMs: 50, seed: 3 };
    const question = { type: 'chat', messageId: 'm', contents: 'one', conversationId: 'c', parameters };
    const one = await stack.client(20001, stack.gateways[0]);
    const other = await stack.client(20001, stack.gateways[1]);
    one.send(question);
    await one.next('accepted', 'm');
    await one.next('token', 'm');
    other.send({ type: 'resume', messageId: 'm' }); // on a node that the request does not name
    for (let seen = 0; seen < 15; seen++) await other.next('token', 'm'); // its worker knows of this node by now
    if (!homeIsAlive) await stack.gateways[0]!.kill('SIGKILL');
    const { look, keys } = stack;
    await look.client.flushall();

    const record = () => look.client.hgetall(keys.generation('20001', 'm'));
    await until('the record is back', 5_000, async () => (await record()).status === 'running');
    assert.deepEqual((await record()).routes?.split(',').sort(), ['n1', 'n2'], 'both nodes get its frames');
    assert.deepEqual(await look.client.hgetall(keys.active('20001')), { m: 'c' });
    other.send({ ...question, messageId: 'm2' });
    assert.equal((await other.next('rejected', 'm2')).code, 'conversation_busy', 'it has its place');

    const requests = async () =>
      (await look.client.xlen(keys.requests('n1'))) + (await look.client.zcard(keys.retries('n1')));
    await until('a request carries it', 5_000, async () => (await requests()) === 1);
    await stack.workers[0]!.kill('SIGKILL');
    await stack.addWorker(env);
    const expected = await demoText('one', parameters);
    for (const client of homeIsAlive ? [one, other] : [other]) {
      const done = await client.next('done', 'm', 30_000);
      const start = client.frames.findLastIndex((frame) => frame.type === 'start');
      const text = client.frames
        .slice(start)
        .flatMap((frame) => (frame.type === 'token' ? [frame.text] : []));
      assert.equal(text.join(''), expected);
      assert.ok(Number(done.id.split('-')[0]) >= 2, 'another attempt');
      assert.ok(!client.frames.some((frame) => frame.type === 'failed'));
    }
    await until('nothing is left', 10_000, async () => (await requests()) === 0);
  });

test('a stop holds for an answer that Redis has just lost, also when its client leaves with it', async (t) => {
  const stack = await startStack(t, { gateways: 1, workers: 1 });
  const { look, keys } = stack;
  const parameters = { tokens: 40, intervalMs: 400, seed: 3 };
  for (const leaves of [false, true]) {
    const messageId = leaves ? 'left' : 'stayed';
    const client = await stack.client(20002, stack.gateways[0]);
    client.send({ type: 'chat', messageId, contents: 'one', parameters });
    await client.next('accepted', messageId);
    for (let seen = 0; seen < 2; seen++) await client.next('token', messageId);
    const gone = await look.client.keys('*{20002}*');
    await look.client.del(...gone);
    client.send({ type: 'cancel', messageId });
    if (leaves) client.close();
    else assert.equal((await client.next('done', messageId)).finishReason, 'cancelled');
    const status = () => look.client.hget(keys.generation('20002', messageId), 'status');
    await until('it has been stopped', 6_000, async () => (await status()) === 'cancelled');
    if (!leaves) client.close();
  }
});
