import assert from 'node:assert/strict';
import { test } from 'node:test';
import { until } from '../faults/stage.ts';
import { startStack } from '../helpers/stack.ts';

/** A gateway that died and never comes back: its requests are still answered, and then nothing of it is left. */
test('the requests of a dead node are drained, then its keys go', async (t) => {
  const stack = await startStack(t, { gateways: 2, workers: 1, workerEnv: { LEASE_MS: '1500' } });
  const { look, keys } = stack;
  const [dying] = stack.gateways;
  const client = await stack.client(20001, dying);
  const chat = (messageId: string) => ({
    type: 'chat',
    messageId,
    contents: 'still there?',
    parameters: { tokens: 20, intervalMs: 50, seed: 1 },
  });
  client.send(chat('m'));
  await client.next('token', 'm');
  await dying!.kill('SIGKILL');
  // As if it had died two minutes ago: only then is a node forgotten.
  const entry = JSON.parse((await look.client.hget(keys.nodes(), 'n1'))!);
  await look.client.hset(keys.nodes(), 'n1', JSON.stringify({ ...entry, until: Date.now() - 120_000 }));
  const other = await stack.client(20001, stack.gateways[1]);
  other.send({ type: 'resume', messageId: 'm' });
  assert.equal((await other.answer('m')).end.type, 'done', 'answered, though its node is gone');
  await until('the node is forgotten', 40_000, async () => !(await look.client.hexists(keys.nodes(), 'n1')));
  await until(
    'its request stream is gone',
    5_000,
    async () => !(await look.client.exists(keys.requests('n1'))),
  );
  const left = await look.client.pttl(keys.replies('n1'));
  assert.ok(left > 0 && left <= 600_000, `its reply stream expires in ${left} ms`);
});
