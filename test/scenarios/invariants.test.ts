import assert from 'node:assert/strict';
import { type TestContext, test } from 'node:test';
import { compareFrameIds, parseFrameId } from '../../shared/frame-id.ts';
import type { ServerFrame } from '../../shared/protocol.ts';
import { startProxy } from '../faults/proxy.ts';
import { isReady, until } from '../faults/stage.ts';
import type { TestClient } from '../helpers/chat-client.ts';
import { startScriptedOpenAi } from '../helpers/scripted-openai.ts';
import { type Stack, type StackOptions, startStack } from '../helpers/stack.ts';

/**
 * The eight invariants of the design, one test each, on real processes and a real Redis. Each fails when its mechanism
 * is switched off; the comment above it says which that is.
 */

const QUICK: StackOptions = {
  gateways: 2,
  workers: 2,
  workerEnv: { LEASE_MS: '1500', RETRY_BASE_MS: '50' },
};

const start = (t: TestContext, options: StackOptions = {}) => startStack(t, { ...QUICK, ...options });

/** The ids of the frames of a message that carry one, in the order in which they came. */
function idsOf(frames: ServerFrame[], messageId: string): string[] {
  return frames.flatMap((frame) =>
    (frame.type === 'start' || frame.type === 'token' || frame.type === 'done' || frame.type === 'failed') &&
    frame.messageId === messageId
      ? [frame.id]
      : [],
  );
}

function assertInLine(ids: string[]): void {
  ids.forEach((id, index) => {
    const [now, last] = [parseFrameId(id)!, index === 0 ? null : parseFrameId(ids[index - 1]!)!];
    const isNext = last?.attempt === now.attempt ? now.seq === last.seq + 1 : now.seq === 0;
    assert.ok(
      isNext && (!last || now.attempt >= last.attempt),
      `${id} after ${ids[index - 1]} in ${ids.join(' ')}`,
    );
  });
}

async function logOf(
  stack: Stack,
  user: number,
  messageId: string,
): Promise<[id: string, kind: string, value: string][]> {
  const entries = await stack.look.client.xrange(stack.keys.log(String(user), messageId), '-', '+');
  return entries.map(([id, [kind, value]]) => [id, kind!, value!]);
}

async function tokens(client: TestClient, messageId: string, count: number): Promise<void> {
  for (let seen = 0; seen < count; seen++) await client.next('token', messageId);
}

/** Takes frames out of the reply streams that the gateways have not read: they are frozen meanwhile. */
async function loseReplies(stack: Stack, user: number, messageId: string): Promise<void> {
  const { client } = stack.look;
  const length = () => client.xlen(stack.keys.log(String(user), messageId));
  for (const gateway of stack.gateways) await gateway.kill('SIGSTOP');
  const before = await length();
  await until('five more frames', 5_000, async () => (await length()) >= before + 5);
  for (const { node } of stack.gateways) await client.xtrim(stack.keys.replies(node), 'MAXLEN', 0);
  for (const gateway of stack.gateways) await gateway.kill('SIGCONT');
}

/** The worker that runs a message. */
async function runner(stack: Stack, user: number, messageId: string) {
  const owner = await stack.look.client.hget(stack.keys.generation(String(user), messageId), 'owner');
  const found = stack.workers.find((worker) => owner!.includes(`-${worker.pid}-`));
  assert.ok(found, `${owner} is one of our workers`);
  return found;
}

// Mechanisms: claims that outlive their worker (XPENDING and XCLAIM in the sweeper), the log, routes on resume, AOF.
test('1. an accepted request reaches one terminal frame, whatever is killed', async (t) => {
  const stack = await start(t);
  const first = await stack.client(20001, stack.gateways[0]);
  first.send({
    type: 'chat',
    messageId: 'm',
    contents: 'one',
    parameters: { tokens: 60, intervalMs: 50, seed: 1 },
  });
  await first.next('accepted', 'm');
  await tokens(first, 'm', 5);
  await (await runner(stack, 20001, 'm')).kill('SIGKILL');
  const again = await first.next('start', 'm');
  assert.equal(again.id, '2-0');
  await tokens(first, 'm', 5);
  const seen = idsOf(first.frames, 'm').at(-1)!;
  await stack.gateways[0]!.kill('SIGKILL');
  await stack.redis.kill('SIGKILL');
  await stack.redis.restart();
  const second = await stack.client(20001, stack.gateways[1]);
  await until('the gateway is ready', 10_000, () => isReady(stack.gateways[1]!));
  second.send({ type: 'resume', messageId: 'm', after: seen });
  await second.next('done', 'm');
  assertInLine(
    [...idsOf(first.frames, 'm'), ...idsOf(second.frames, 'm')].filter(
      (id, at, all) => all.indexOf(id) === at,
    ),
  );
  const ends = (await logOf(stack, 20001, 'm')).filter(([, kind]) => kind === 'done' || kind === 'failed');
  assert.equal(ends.length, 1, 'one terminal frame in the log');
});

// Mechanisms: delivery compares each frame with the one before; resume reads a range of the log.
test('2. ids rise by one, over lost reply streams, reconnects and nodes; the text equals the log', async (t) => {
  const stack = await start(t);
  const [n1, n2] = stack.gateways;
  let client = await stack.client(20001, n1);
  client.send({
    type: 'chat',
    messageId: 'm',
    contents: 'two',
    parameters: { tokens: 100, intervalMs: 25, seed: 2 },
  });
  const ids: string[] = [];
  let text = '';
  const collect = (from: TestClient) => {
    for (const frame of from.frames)
      if (frame.type === 'token' && frame.messageId === 'm') text += frame.text;
    ids.push(...idsOf(from.frames, 'm'));
  };
  for (const next of [n2, n1]) {
    await tokens(client, 'm', 8);
    await loseReplies(stack, 20001, 'm');
    await stack.look.client.del(stack.keys.replies('n1'));
    await tokens(client, 'm', 8);
    client.close();
    await client.closed;
    collect(client);
    client = await stack.client(20001, next);
    client.send({ type: 'resume', messageId: 'm', after: ids.at(-1)! });
    assert.equal((await client.next('resumed', 'm')).recovered, true);
  }
  const done = await client.next('done', 'm');
  collect(client);
  assertInLine(ids);
  const log = await logOf(stack, 20001, 'm');
  assert.deepEqual(
    ids,
    log.map(([id]) => id),
  );
  assert.equal(
    text,
    log
      .filter(([, kind]) => kind === 'token')
      .map(([, , value]) => value)
      .join(''),
  );
  assert.equal(done.length, text.length);
});

// Mechanism: begin writes `2-0`, and Redis refuses every id below it.
test('3. after attempt 2 has begun, no frame of attempt 1 enters the log', async (t) => {
  const stack = await start(t);
  const client = await stack.client(20001);
  client.send({
    type: 'chat',
    messageId: 'm',
    contents: 'three',
    parameters: { tokens: 30, intervalMs: 60, firstTokenMs: 1_200, seed: 3 },
  });
  await tokens(client, 'm', 3);
  const zombie = await runner(stack, 20001, 'm');
  await zombie.kill('SIGSTOP');
  assert.equal((await client.next('start', 'm')).attempt, 2);
  const before = (await logOf(stack, 20001, 'm')).filter(([id]) => id.startsWith('1-')).length;
  await zombie.kill('SIGCONT'); // attempt 2 has not said a word yet: it thinks for 1.2 s
  await zombie.logged((line) => line.msg === 'attempt replaced');
  const answer = await client.answer('m');
  assert.equal(answer.end.type, 'done');
  const log = await logOf(stack, 20001, 'm');
  assert.equal(log.filter(([id]) => id.startsWith('1-')).length, before, 'the zombie added nothing');
  assert.deepEqual(
    log.map(([id]) => id),
    [...log.map(([id]) => id)].sort(compareFrameIds),
  );
  assertInLine(answer.ids);
});

// Mechanisms: admit joins a record that is there; begin leaves a second entry of a live attempt alone.
test('4. a message that is submitted many times on both nodes is answered once', async (t) => {
  // A long lease: on a machine that stands still for a while, a takeover would be right, and a second start.
  const stack = await start(t, { workerEnv: { ...QUICK.workerEnv, LEASE_MS: '20000' } });
  const clients = await Promise.all(
    Array.from({ length: 12 }, (_, index) => stack.client(20001, stack.gateways[index % 2])),
  );
  const chat = {
    type: 'chat',
    messageId: 'm',
    contents: 'four',
    parameters: { tokens: 20, intervalMs: 20, seed: 4 },
  };
  for (const client of clients) {
    client.send(chat);
    client.send(chat);
  }
  // And as if a crash had left a record whose request is in the streams of both nodes, under one entry id.
  await stack.look.client.hset(stack.keys.generation('20001', 'twin'), {
    ...{ status: 'queued', attempt: 0, tries: 0, node: 'n1', routes: 'n1', admitted: Date.now() },
    payload: JSON.stringify({ contents: 'twin', parameters: chat.parameters }),
  });
  const follower = clients[0]!;
  const twins = stack.look.client.pipeline();
  for (const node of ['n1', 'n2'])
    twins.xadd(stack.keys.requests(node), '9999999999999-0', 'user', '20001', 'message', 'twin');
  await twins.exec();
  follower.send({ type: 'resume', messageId: 'twin' });
  assert.equal((await follower.answer('twin')).end.type, 'done');
  const twin = await logOf(stack, 20001, 'twin');
  assert.equal(twin.filter(([, kind]) => kind === 'start').length, 1, 'the handler ran once for two entries');
  const answers = await Promise.all(clients.map((client) => client.answer('m')));
  assert.equal(new Set(answers.map((answer) => answer.end.id)).size, 1);
  assert.equal(new Set(answers.map((answer) => answer.text)).size, 1);
  const created = clients.flatMap((client) =>
    client.frames.filter((frame) => frame.type === 'accepted' && !frame.duplicate),
  );
  assert.equal(created.length, 1, 'accepted anew once');
  const starts = (await logOf(stack, 20001, 'm')).filter(([, kind]) => kind === 'start');
  assert.equal(starts.length, 1, 'the handler ran once');
  await until('nothing is left of it', 5_000, async () =>
    (await Promise.all(['n1', 'n2'].map((node) => stack.look.client.xlen(stack.keys.requests(node))))).every(
      (length) => length === 0,
    ),
  );
});

// Mechanisms: the bound in enqueue, the count in admit, an expiry on every key of a generation.
test('5. at its limit a queue has a name for it, and what is finished expires', async (t) => {
  const stack = await start(t, {
    gateways: 1,
    workers: 1,
    gatewayEnv: { QUEUE_LIMIT: '3', USER_ACTIVE_LIMIT: '2' },
    workerEnv: { ...QUICK.workerEnv!, WORKER_CONCURRENCY: '1' },
  });
  const ask = (client: TestClient, messageId: string) =>
    client.send({
      type: 'chat',
      messageId,
      contents: 'five',
      parameters: { tokens: 20, intervalMs: 50, seed: 5 },
    });
  const [one, two, three] = [await stack.client(20001), await stack.client(20002), await stack.client(20003)];
  ask(one, 'a');
  ask(one, 'b');
  ask(one, 'c');
  assert.equal((await one.next('rejected', 'c')).code, 'too_many_active');
  ask(two, 'd');
  await two.next('accepted', 'd');
  ask(three, 'e');
  const full = await three.next('rejected', 'e');
  assert.equal(full.code, 'queue_full');
  assert.ok(full.temporary && full.retryAfterMs! > 0 && full.position === 3, JSON.stringify(full));
  assert.equal(await stack.look.client.exists(stack.keys.generation('20003', 'e')), 0, 'nothing was kept');
  await Promise.all([one.answer('a'), one.answer('b'), two.answer('d')]);
  for (const prefix of ['gen:', 'log:', 'active:']) {
    const names = await stack.look.client.keys(`chat:${prefix}*`);
    for (const name of names) assert.ok((await stack.look.client.pttl(name)) > 0, `${name} has an expiry`);
  }
  assert.ok(
    (await stack.look.client.pttl(stack.keys.replies('n1'))) > 0,
    'the reply stream goes when its node does',
  );
});

// Mechanisms: the deadline of a blocked read, and the watchdog of the other connections (shared/redis.ts).
test('6. a silent Redis is noticed, connections are built anew, nobody is restarted', async (t) => {
  const stack = await startStack(t, { gateways: 0, workers: 0 });
  const proxy = await startProxy(() => stack.redis.port);
  t.after(() => proxy.stop());
  const env = { REDIS_URL: proxy.url, LEASE_MS: '1500' };
  const gateway = await stack.addGateway({ node: 'n1', env });
  const worker = await stack.addWorker(env);
  const client = await stack.client(20001, gateway);
  const chat = (messageId: string) =>
    client.send({
      type: 'chat',
      messageId,
      contents: 'six',
      parameters: { tokens: 5, intervalMs: 5, seed: 6 },
    });
  chat('before');
  await client.answer('before');
  proxy.silence();
  await until('/readyz is false', 6_000, async () => !(await isReady(gateway)));
  const scrape = await fetch(`${gateway.http}/metrics`, { signal: AbortSignal.timeout(4_000) });
  assert.match(await scrape.text(), /^rivulet_connections 1$/m, 'numbers are told in the outage too');
  await new Promise((resolve) => setTimeout(resolve, 4_000));
  proxy.speak(); // the old connections stay mute: only new ones work
  await until('/readyz is true', 8_000, () => isReady(gateway));
  chat('after');
  assert.equal((await client.answer('after')).end.type, 'done');
  assert.equal(gateway.child.exitCode ?? worker.child.exitCode, null, 'the same processes');
});

// Mechanisms: the record does not know of sockets; a cancel writes above the worker, which looks every second.
test('7. leaving is not cancelling; cancelling stops the call to the model, said a word or not', async (t) => {
  const model = await startScriptedOpenAi(t);
  const stack = await start(t, {
    gateways: 1,
    workers: 1,
    workerEnv: { ...QUICK.workerEnv!, HANDLER: 'openai', OPENAI_BASE_URL: model.baseUrl },
  });
  const leaver = await stack.client(20001);
  leaver.send({ type: 'chat', messageId: 'left', contents: 'seven' });
  const left = await model.next();
  left.token('Still ');
  await leaver.next('token', 'left');
  leaver.close();
  await leaver.closed;
  left.token('here.');
  left.finish('stop');
  assert.equal(await left.closed, 'complete');
  const back = await stack.client(20001);
  back.send({ type: 'chat', messageId: 'left', contents: 'seven' });
  assert.equal((await back.answer('left')).text, 'Still here.');

  for (const words of [0, 1]) {
    const messageId = `cancel${words}`;
    back.send({ type: 'chat', messageId, contents: 'stop this' });
    const call = await model.next();
    call.open();
    if (words > 0) {
      call.token('Too ');
      await back.next('token', messageId);
    } else await back.next('start', messageId);
    const cancelled = Date.now();
    back.send({ type: 'cancel', messageId });
    const done = await back.next('done', messageId);
    assert.equal(done.finishReason, 'cancelled');
    assert.equal(await call.closed, 'aborted');
    const tookMs = Date.now() - cancelled;
    assert.ok(tookMs < 10_000, `the call was cut after ${tookMs} ms, before the model said anything more`);
  }
});

// Mechanism: every key of a generation is the user's, and the user is the connection's.
test('8. a user resumes, joins and cancels only what is theirs', async (t) => {
  const stack = await start(t, { gateways: 1, workers: 1 });
  const [owner, stranger] = [await stack.client(20001), await stack.client(20002)];
  const parameters = { tokens: 30, intervalMs: 30, seed: 8 };
  owner.send({ type: 'chat', messageId: 'm', contents: 'mine', parameters });
  await tokens(owner, 'm', 3);
  stranger.send({ type: 'cancel', messageId: 'm' });
  assert.equal((await stranger.next('rejected', 'm')).code, 'unknown_message');
  stranger.send({ type: 'resume', messageId: 'm' });
  assert.equal((await stranger.next('rejected', 'm')).code, 'unknown_message');
  stranger.send({ type: 'chat', messageId: 'm', contents: 'theirs', parameters });
  assert.equal((await stranger.next('accepted', 'm')).duplicate, false);
  const [mine, theirs] = [await owner.answer('m'), await stranger.answer('m')];
  assert.deepEqual([mine.end.type, theirs.end.type], ['done', 'done']);
  assert.equal((mine.end as { finishReason: string }).finishReason, 'stop');
  assert.notEqual(mine.text, theirs.text);
});
