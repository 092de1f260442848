import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { openChat } from '../helpers/chat-client.ts';
import { eventually } from '../helpers/eventually.ts';
import { type Stack, startStack } from '../helpers/stack.ts';

/** The main job on a real stack: two gateways, two workers, raw sockets. */

let stack: Stack;
before(async () => {
  stack = await startStack(null, {
    gateways: 2,
    workers: 2,
    env: { LEASE_MS: '1500', RETRY_BASE_MS: '20', COMPACT_AFTER_MS: '0' },
  });
});
after(() => stack.stop());

const words = (tokens: number, intervalMs = 5, more: object = {}) => ({
  tokens,
  intervalMs,
  seed: 1,
  ...more,
});

/** Every id above the one before; within an attempt without a gap; an attempt opens with its `start`. */
function assertIds(ids: string[]): void {
  const parsed = ids.map((id) => id.split('-').map(Number) as [number, number]);
  for (let index = 1; index < parsed.length; index++) {
    const [attempt, seq] = parsed[index]!;
    const [attemptBefore, seqBefore] = parsed[index - 1]!;
    if (attempt === attemptBefore) assert.equal(seq, seqBefore + 1, ids.join(' '));
    else assert.ok(attempt > attemptBefore && seq === 0, ids.join(' '));
  }
}

test('ask and watch the answer stream', async () => {
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'a1', contents: 'hello', parameters: words(30) });
  const accepted = await client.next('accepted', 'a1');
  assert.deepEqual(accepted, { type: 'accepted', messageId: 'a1', position: 0, duplicate: false });
  assert.equal((await client.next('start', 'a1')).id, '1-0');
  const answer = await client.answer('a1');
  assertIds(answer.ids);
  assert.equal(answer.text.split(' ').length, 30);
  assert.ok(answer.end.type === 'done');
  assert.equal(answer.end.finishReason, 'stop');
  assert.equal(answer.end.length, answer.text.length);
  assert.ok(answer.ids.length > 10, 'it came in pieces');
});

test('the demo answers without parameters, and says what it is', async () => {
  const client = await stack.client(20002);
  client.send({ type: 'chat', messageId: 'd1', contents: 'What are you?' });
  const answer = await client.answer('d1', 60_000);
  assert.match(answer.text, /demo/i);
});

test('the same messageId on the other node joins, and never asks twice', async () => {
  const first = await stack.client(20003);
  first.send({ type: 'chat', messageId: 'j1', contents: 'hello', parameters: words(60, 10) });
  await first.next('token', 'j1');
  const second = await stack.client(20003, stack.gateways[1]);
  second.send({ type: 'chat', messageId: 'j1', contents: 'hello', parameters: words(60, 10) });
  assert.equal((await second.next('accepted', 'j1')).duplicate, true);
  const resumed = await second.next('resumed', 'j1');
  assert.equal(resumed.status, 'running');
  const answers = await Promise.all([first.answer('j1'), second.answer('j1')]);
  assert.equal(answers[0].text, answers[1].text);
  for (const answer of answers) {
    assertIds(answer.ids);
    assert.equal(answer.starts, 1);
  }
});

test('resume on the other node in the middle of an answer', async () => {
  const first = await stack.client(20004);
  first.send({ type: 'chat', messageId: 'r1', contents: 'hello', parameters: words(80, 10) });
  for (let count = 0; count < 10; count++) await first.next('token', 'r1');
  const seen = first.frames.filter((frame) => frame.type === 'start' || frame.type === 'token');
  const after = seen.at(-1)!.id;
  const before = seen.map((frame) => (frame.type === 'token' ? frame.text : '')).join('');
  first.close();
  const second = await stack.client(20004, stack.gateways[1]);
  second.send({ type: 'resume', messageId: 'r1', after });
  const resumed = await second.next('resumed', 'r1');
  assert.deepEqual([resumed.recovered, resumed.compacted, resumed.status], [true, false, 'running']);
  const rest = await second.answer('r1');
  assertIds([...seen.map((frame) => frame.id), ...rest.ids]);
  assert.ok(rest.end.type === 'done');
  assert.equal((before + rest.text).length, rest.end.length);
});

test('resume of what nobody knows, and of a finished answer', async () => {
  const client = await stack.client(20005);
  client.send({ type: 'resume', messageId: 'never' });
  assert.equal((await client.next('rejected', 'never')).code, 'unknown_message');
  client.send({ type: 'chat', messageId: 'f1', contents: 'hello', parameters: words(20, 1) });
  const answer = await client.answer('f1');
  await eventually(
    'compaction',
    async () => (await stack.look.client.exists(stack.keys.log('20005', 'f1'))) === 0,
  );
  const again = await stack.client(20005, stack.gateways[1]);
  again.send({ type: 'resume', messageId: 'f1', after: '1-3' });
  const resumed = await again.next('resumed', 'f1');
  assert.deepEqual([resumed.recovered, resumed.compacted, resumed.status], [false, true, 'done']);
  const replayed = await again.answer('f1');
  assert.equal(replayed.text, answer.text);
  assert.deepEqual(replayed.ids, ['1-0', answer.ids.at(-2), answer.ids.at(-1)]);
  again.send({ type: 'resume', messageId: 'f1', after: answer.ids.at(-1) });
  assert.equal((await again.next('resumed', 'f1')).recovered, true);
});

test('a user sees only their own generations', async () => {
  const owner = await stack.client(20006);
  owner.send({ type: 'chat', messageId: 'o1', contents: 'secret', parameters: words(200, 10) });
  await owner.next('token', 'o1');
  const other = await stack.client(20007);
  other.send({ type: 'resume', messageId: 'o1' });
  assert.equal((await other.next('rejected', 'o1')).code, 'unknown_message');
  other.send({ type: 'cancel', messageId: 'o1' });
  assert.equal((await other.next('rejected', 'o1')).code, 'unknown_message');
  await owner.next('token', 'o1');
  owner.send({ type: 'cancel', messageId: 'o1' });
  const answer = await owner.answer('o1');
  assert.ok(answer.end.type === 'done');
  assert.equal(answer.end.finishReason, 'cancelled');
});

test('cancel keeps the partial text, under an id above every other', async () => {
  const client = await stack.client(20008);
  client.send({ type: 'chat', messageId: 'c1', contents: 'hello', parameters: words(5_000, 5) });
  for (let count = 0; count < 5; count++) await client.next('token', 'c1');
  client.send({ type: 'cancel', messageId: 'c1' });
  const answer = await client.answer('c1');
  assert.ok(answer.end.type === 'done');
  assert.equal(answer.end.finishReason, 'cancelled');
  assert.equal(answer.end.length, answer.text.length);
  assert.equal(answer.end.id, '2-0');
  await eventually(
    'an empty queue',
    async () => (await stack.look.client.xlen(stack.keys.requests('n1'))) === 0,
  );
});

test('the first attempts fail: start says discard, the answer is whole', async () => {
  const client = await stack.client(20009);
  client.send({
    type: 'chat',
    messageId: 't1',
    contents: 'hello',
    parameters: words(10, 2, { failAttempts: 2 }),
  });
  client.send({ type: 'chat', messageId: 't2', contents: 'hello', parameters: words(10, 2) });
  const answer = await client.answer('t1');
  assert.equal(answer.starts, 3);
  assertIds(answer.ids);
  assert.equal(answer.text, (await client.answer('t2')).text);
});

test('after the last attempt: a failed frame and a dead letter', async () => {
  const client = await stack.client(20010);
  client.send({
    type: 'chat',
    messageId: 'x1',
    contents: 'hello',
    parameters: words(4, 1, { failAttempts: 99 }),
  });
  const answer = await client.answer('x1');
  assert.ok(answer.end.type === 'failed');
  assert.equal(answer.end.code, 'attempts_exhausted');
  assert.equal(answer.starts, 5);
  const dead = await eventually('a dead letter', async () => {
    const letters = await stack.look.client.xrange(stack.keys.dead('n1'), '-', '+');
    return letters.find(([, fields]) => fields.includes('x1'));
  });
  assert.ok(dead[1].includes('attempts_exhausted'));
});

test('a worker killed in the middle: another one takes over', async () => {
  const client = await stack.client(20011);
  client.send({ type: 'chat', messageId: 'k1', contents: 'hello', parameters: words(150, 20) });
  client.send({ type: 'chat', messageId: 'k2', contents: 'hello', parameters: words(150, 1) });
  for (let count = 0; count < 5; count++) await client.next('token', 'k1');
  const owner = await stack.look.client.hget(stack.keys.generation('20011', 'k1'), 'owner');
  const victim = stack.workers.find((worker) => owner!.includes(`-${worker.pid}-`))!;
  await victim.kill('SIGKILL');
  const answer = await client.answer('k1', 30_000);
  assert.equal(answer.starts, 2);
  assertIds(answer.ids);
  assert.equal(answer.text, (await client.answer('k2')).text);
  stack.workers.splice(stack.workers.indexOf(victim), 1);
  await stack.addWorker();
});

test('frames before init, and heartbeats in every state', async () => {
  const client = await openChat(stack.gateways[0]!.url);
  client.send('PING');
  assert.ok((await client.next('heartbeat')).time > 0);
  client.send({ type: 'heartbeat' });
  await client.next('heartbeat');
  client.send({ type: 'chat', messageId: 'm', contents: 'x' });
  assert.equal((await client.next('error')).code, 'not_ready');
  client.send('{"type":"dance"}');
  assert.match((await client.next('error')).message, /dance/);
  client.send({ type: 'init', userId: 20012 });
  await client.next('ready');
  client.send({ type: 'chat', messageId: 'bad', contents: '' });
  const rejected = await client.next('rejected', 'bad');
  assert.equal(rejected.code, 'invalid_frame');
  assert.match(rejected.message, /contents/);
  client.close();
});

test('reserved user ids are refused and the connection closed 4500', async () => {
  for (const userId of [10_000, '7', 'a b', undefined]) {
    const client = await openChat(stack.gateways[0]!.url);
    client.send({ type: 'init', userId });
    assert.match((await client.next('error')).message, /userId/);
    assert.equal((await client.closed).code, 4500);
  }
});

test('a frame that is too large closes the connection 4504', async () => {
  const client = await stack.client(20013);
  client.send({ type: 'chat', messageId: 'big', contents: 'x'.repeat(300_000) });
  assert.equal((await client.closed).code, 4504);
});

test('health, readiness, metrics and wrong addresses', async () => {
  const { http } = stack.gateways[0]!;
  assert.equal((await fetch(`${http}/healthz`)).status, 200);
  assert.equal((await fetch(`${http}/readyz`)).status, 200);
  const metrics = await (await fetch(`${http}/metrics`)).text();
  assert.match(metrics, /rivulet_admitted_total \d/);
  assert.equal((await fetch(`${http}/nothing`)).status, 404);
  assert.equal((await fetch(`${http}/healthz`, { method: 'DELETE' })).status, 405);
  assert.equal((await fetch(`${http}/ws`)).status, 426);
  const page = await fetch(`${http}/`);
  assert.match(page.headers.get('content-security-policy') ?? '', /default-src 'none'/);
});

test('a second live gateway with the same id refuses to start', async () => {
  await assert.rejects(stack.addGateway({ node: 'n1' }), /NODE_ID n1 is used by another live gateway/);
  stack.gateways.pop();
});
