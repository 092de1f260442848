import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { createGenerationStore } from '../../shared/generation-store.ts';
import { eventually } from '../helpers/eventually.ts';
import { startStack } from '../helpers/stack.ts';

/** What a failover may make Redis forget of an attempt, done by hand. */

function handlerFile(t: TestContext, body: string): string {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-forgotten-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const file = join(dir, 'handler.mjs');
  writeFileSync(file, `export default async function* (request, { attempt, partial }) {\n${body}\n}\n`);
  return file;
}

// A quick one finds out when an append is refused, a slow one by a look at its record.
for (const [pace, count, waitMs] of [
  ['quick', 30, 50],
  ['slow', 5, 2_000],
] as const)
  test(`two workers with an attempt of the same number, ours ${pace}: no client gets a mixture`, async (t) => {
    const HANDLER = handlerFile(
      t,
      `for (let word = 1; word <= ${count}; word++) {
        yield 'a' + attempt + '.' + word + ' ';
        await new Promise((resolve) => setTimeout(resolve, ${waitMs}));
      }`,
    );
    const { look, keys, ...stack } = await startStack(t, { workers: 1, workerEnv: { HANDLER } });
    const client = await stack.client(20001);
    client.send({ type: 'chat', messageId: 'm', contents: 'hello' });
    for (let frames = 0; frames < 2; frames++) await client.next('token', 'm');

    // The new master knew the request as one that nobody had read; somebody did, and began.
    const [record, log] = [keys.generation('20001', 'm'), keys.log('20001', 'm')];
    const requests = keys.requests('n1');
    const holder = async () => {
      const [pending] = await look.client.xpending(requests, 'workers', '-', '+', 1);
      return (pending as [entry: string, worker: string]).slice(0, 2);
    };
    const id = Number((await look.client.xrevrange(log, '+', '-', 'COUNT', 1))[0]![0].split('-')[1]);
    const [entry, worker] = await holder();
    await look.client
      .multi()
      .xclaim(requests, 'workers', 'w-other', 0, entry!)
      .hset(record, 'owner', 'w-other', 'attempt', 1)
      .del(log)
      .xadd(log, '1-0', 'start', '1')
      .xadd(log, `1-${id + 100}`, 'token', 'of another answer')
      .exec();
    for (let begun = ''; begun !== '2-0'; ) begun = (await client.next('start', 'm')).id;
    assert.deepEqual(await holder(), [entry, worker], 'it is ours again');
    const answer = await client.answer('m');
    assert.equal(answer.text, Array.from({ length: count }, (_, index) => `a2.${index + 1} `).join(''));
    assert.match(answer.end.id!, /^2-/);
    const again = await stack.client(20001);
    again.send({ type: 'resume', messageId: 'm' });
    assert.equal((await again.answer('m')).text, answer.text);
  });

// With nothing in flight, what is refused first is the end itself: the record is as before the attempt was opened.
for (const [end, body, expected] of [
  ['its end', `yield said + 'end';`, /^a1\.1 a1\.2 a1\.end$/],
  [
    'a failure',
    `if (attempt > 1) { yield 'again'; return; } throw new Error('no more');`,
    /^a2\.1 a2\.2 again$/,
  ],
] as const)
  test(`an attempt that was forgotten before ${end}: no client gets a mixture`, async (t) => {
    const said = "'a' + (globalThis.runs = (globalThis.runs ?? 0) + 1) + '.'";
    const HANDLER = handlerFile(
      t,
      `const said = ${said};
      yield said + '1 ';
      await new Promise((resolve) => setTimeout(resolve, 100));
      yield said + '2 ';
      await new Promise((resolve) => setTimeout(resolve, 700));
      ${body}`,
    );
    const { look, keys, ...stack } = await startStack(t, {
      workers: 1,
      workerEnv: { HANDLER, LEASE_MS: '3000', RETRY_BASE_MS: '50' },
    });
    const client = await stack.client(20001);
    client.send({ type: 'chat', messageId: 'm', contents: 'hello' });
    for (let frames = 0; frames < 2; frames++) await client.next('token', 'm');
    const [record, log] = [keys.generation('20001', 'm'), keys.log('20001', 'm')];
    await look.client
      .multi()
      .hset(record, 'status', 'queued', 'attempt', 0, 'tries', 0)
      .hdel(record, 'owner', 'entry', 'beat')
      .del(log)
      .exec();
    const answer = await client.answer('m');
    assert.match(answer.text, expected);
    const again = await stack.client(20001);
    again.send({ type: 'resume', messageId: 'm' });
    assert.equal((await again.answer('m')).text, answer.text);
    assert.equal(await look.client.hget(record, 'attempt'), end === 'its end' ? '1' : '2');
  });

/** Says a word each 50 ms, by the number of the run of its process; the first attempt fails after a word where it is told to. */
const COUNTED = `const run = (globalThis.runs = (globalThis.runs ?? 0) + 1);
  if (attempt === 1 && request.contents === 'retry') {
    yield 'x';
    throw new Error('try again');
  }
  for (let word = 1; word <= (run % 2 ? 40 : 30); word++) {
    yield process.pid + '/' + run + '.' + word + ' ';
    await new Promise((resolve) => setTimeout(resolve, 50));
  }`;

/** All of one run and nothing else. */
function assertOneRun(text: string): void {
  const runs = new Set(
    text
      .trim()
      .split(' ')
      .map((word) => word.split('.')[0]),
  );
  assert.equal(runs.size, 1, text);
  assert.match(text, /^\S+\.1 .*\S+\.[34]0 $/);
}

/** A second attempt of one worker, five frames of which its client has seen. */
async function startRetry(t: TestContext) {
  const HANDLER = handlerFile(t, COUNTED);
  const workerEnv = { HANDLER, RETRY_BASE_MS: '50', LEASE_MS: '3000' };
  const { look, keys, ...stack } = await startStack(t, { workers: 1, workerEnv });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'm', contents: 'retry' });
  while ((await client.next('token', 'm')).id !== '2-5');
  const [record, log] = [keys.generation('20001', 'm'), keys.log('20001', 'm')];
  const requests = keys.requests('n1');
  const [[entry]] = (await look.client.xpending(requests, 'workers', '-', '+', 1)) as [[string]];
  return { stack, look, keys, client, record, log, requests, entry };
}

test('a retry that a failover forgot, begun by another worker under a new entry: no client gets a mixture', async (t) => {
  const { stack, look, keys, client, record, log, requests, entry } = await startRetry(t);
  const later = `${Number(entry.split('-')[0]) + 5_000}-0`; // the new master moved it back into the stream again
  const begun = look.client
    .multi()
    .xack(requests, 'workers', entry)
    .xdel(requests, entry)
    .xadd(requests, later, 'user', '20001', 'message', 'm')
    .xreadgroup('GROUP', 'workers', 'w-other', 'COUNT', 1, 'STREAMS', requests, '>')
    .hset(record, 'owner', 'w-other/1', 'attempt', 2, 'entry', `n1 ${later}`, 'beat', Date.now())
    .del(log)
    .xadd(log, '2-0', 'start', '2');
  for (let seq = 1; seq <= 8; seq++) begun.xadd(log, `2-${seq}`, 'token', `other${seq} `);
  await begun.exec();
  await delay(1_000);
  const other = { user: '20001', messageId: 'm', attempt: 2, owner: 'w-other/1', node: 'n1', entry: later };
  const store = createGenerationStore({ redis: look, keys, retentionMs: 60_000 });
  const end = { type: 'done', finishReason: 'stop', length: 0 } as const;
  const ended = await store.finish(other, null, 9, end, { begun: true, textBefore: null });
  assert.equal(ended.state, 'fenced', 'whoever clients have not seen gives way');
  const answer = await client.answer('m');
  assert.match(answer.end.id!, /^3-/);
  assertOneRun(answer.text);
  const again = await stack.client(20001);
  again.send({ type: 'resume', messageId: 'm' });
  assert.equal((await again.answer('m')).text, answer.text);
  // The other entry, which nobody acknowledges, goes once its lease is over.
  await eventually('end of the other entry', async () => (await look.client.xlen(requests)) === 0);
});

test('a retry that a failover forgot, begun again by the same worker: one run writes, no client gets a mixture', async (t) => {
  const { stack, look, client, record, log, requests, entry } = await startRetry(t);
  await look.client
    .multi()
    .xack(requests, 'workers', entry)
    .xdel(requests, entry)
    .hset(record, 'status', 'queued', 'attempt', 1, 'tries', 1, 'beat', 0)
    .del(log)
    .xadd(requests, '*', 'user', '20001', 'message', 'm')
    .exec();
  await eventually('second run', async () => (await look.client.hget(record, 'status')) === 'running');
  const answer = await client.answer('m');
  assertOneRun(answer.text);
  const again = await stack.client(20001);
  again.send({ type: 'resume', messageId: 'm' });
  assert.equal((await again.answer('m')).text, answer.text);
});

test('a worker that puts back what was forgotten goes on, and no client is given anything again', async (t) => {
  const HANDLER = handlerFile(t, COUNTED);
  const { look, keys, ...stack } = await startStack(t, { workers: 1, workerEnv: { HANDLER } });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'm', contents: 'hello' });
  while ((await client.next('token', 'm')).id !== '1-5');
  const [record, log] = [keys.generation('20001', 'm'), keys.log('20001', 'm')];
  await look.client
    .multi()
    .hset(record, 'status', 'queued', 'attempt', 0, 'tries', 0)
    .hdel(record, 'owner', 'entry', 'beat')
    .del(log)
    .exec();
  for (const line of String(await look.client.call('client', 'list')).split('\n'))
    if (/ name=(n1|w-)/.test(line))
      await look.client.call('client', 'kill', 'id', /id=(\d+)/.exec(line)![1]!);
  const answer = await client.answer('m');
  assertOneRun(answer.text);
  assert.equal(answer.starts, 1);
});

// The gateway has looked before the other one begins, or has not.
for (const [words, name, pauseMs] of [
  [30, 'longer', 2_500],
  [3, 'shorter', 2_500],
  [30, 'prompt', 0],
] as const)
  test(`an attempt that nobody remembers, and a ${name} one of the same number: the client is given all of that`, async (t) => {
    const HANDLER = handlerFile(
      t,
      `const words = process.env.SECOND ? ${words} : 40;
      for (let word = 1; word <= words; word++) {
        yield process.pid + '.' + word + ' ';
        await new Promise((resolve) => setTimeout(resolve, 50));
      }`,
    );
    const { look, keys, ...stack } = await startStack(t, { workers: 1, workerEnv: { HANDLER } });
    const client = await stack.client(20001);
    client.send({ type: 'chat', messageId: 'm', contents: 'hello' });
    while ((await client.next('token', 'm')).id !== '1-5');
    const [record, log] = [keys.generation('20001', 'm'), keys.log('20001', 'm')];
    const requests = keys.requests('n1');
    const [[entry, fields]] = (await look.client.xrange(requests, '-', '+')) as [[string, string[]]];
    await stack.workers[0]!.kill(); // with the master
    await look.client
      .multi()
      .del(requests)
      .xadd(requests, entry, ...fields)
      .xgroup('CREATE', requests, 'workers', '0')
      .hset(record, 'status', 'queued', 'attempt', 0, 'tries', 0)
      .hdel(record, 'owner', 'entry', 'beat')
      .del(log)
      .exec();
    await delay(pauseMs);
    await stack.addWorker({ HANDLER, SECOND: '1' });
    const resumed = await client.next('resumed', 'm');
    assert.equal(resumed.recovered, false);
    const answer = await client.answer('m');
    const second = answer.text.split('.')[0];
    assert.equal(
      answer.text,
      Array.from({ length: words }, (_, index) => `${second}.${index + 1} `).join(''),
    );
  });

test('an attempt that said nothing does not hide what the one before had said', async (t) => {
  const HANDLER = handlerFile(t, `yield attempt + ': after "' + partial + '"';`);
  const { look, keys, ...stack } = await startStack(t, { workers: 0, workerEnv: { HANDLER } });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'm', contents: 'hello' });
  await client.next('accepted', 'm');
  const [record, log] = [keys.generation('20001', 'm'), keys.log('20001', 'm')];
  await look.client
    .multi()
    .hset(record, 'attempt', 2, 'tries', 2)
    .xadd(log, '1-0', 'start', '1')
    .xadd(log, '1-1', 'token', 'Hello')
    .xadd(log, '2-0', 'start', '2')
    .exec();
  await stack.addWorker();
  assert.equal((await client.answer('m')).text, '3: after "Hello"');
});
