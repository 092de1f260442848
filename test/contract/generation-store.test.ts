import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import pino from 'pino';
import { createAdmission } from '../../gateway/admission.ts';
import { cancelGeneration, cancelWhenBack } from '../../gateway/cancel.ts';
import { createDelivery, type Follower } from '../../gateway/delivery.ts';
import type { GatewayMetrics } from '../../gateway/metrics.ts';
import { createQueuePlaces } from '../../gateway/queue-places.ts';
import { startRedisServer } from '../../infra/redis-server.ts';
import { type Attempt, createGenerationStore, type GenerationStore } from '../../shared/generation-store.ts';
import { createKeys } from '../../shared/keys.ts';
import { createRedis, type RedisConnection } from '../../shared/redis.ts';
import { addressHead, encodeLines } from '../../shared/reply-stream.ts';
import { createRequestQueue, type RequestQueue, readRequest } from '../../shared/request-queue.ts';
import { eventually } from '../helpers/eventually.ts';

/** The log and the queue against a real Redis: what everything else stands on. */

let redis: RedisConnection;
let store: GenerationStore;
let queue: RequestQueue;
let stopServer: () => Promise<void>;
const keys = createKeys('chat:');
const LEASE_MS = 30_000;

before(async () => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-contract-'));
  const server = await startRedisServer({ dir });
  redis = createRedis({ url: server.url, name: 'contract' });
  await redis.connected();
  store = createGenerationStore({ redis, keys, retentionMs: 60_000, compactAfterMs: 30_000 });
  queue = createRequestQueue({ redis, keys });
  stopServer = async () => {
    await redis.close();
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  };
});
after(() => stopServer());

let counter = 0;
const nextUser = () => `user-${++counter}`;

const admit = (user: string, messageId: string, conversationId?: string) =>
  store.admit({
    user,
    messageId,
    node: 'n1',
    payload: { contents: 'hi', ...(conversationId ? { conversationId } : {}) },
    userActiveLimit: 4,
    quotaPerDay: 0,
    queueLimit: 1_000,
  });
let runs = 0;
const begin = (user: string, messageId: string, worker = 'w1', entry = '1-1', maxTries = 5) =>
  store.begin({
    user,
    messageId,
    node: 'n1',
    entry,
    owner: `${worker}/${++runs}`,
    maxTries,
    leaseMs: LEASE_MS,
  });

async function running(user: string, messageId: string, worker = 'w1', entry = '1-1'): Promise<Attempt> {
  const begun = await begin(user, messageId, worker, entry);
  assert.equal(begun.state, 'run');
  assert.ok('attempt' in begun);
  return { user, messageId, attempt: begun.attempt, owner: `${worker}/${runs}`, node: 'n1', entry };
}

/** A first attempt that nobody has asked Redis for. */
const expected = (user: string, messageId: string, owner = 'w1'): Attempt => ({
  user,
  messageId,
  attempt: 1,
  owner,
  node: 'n1',
  entry: '1-1',
});

async function openFirst(
  attempt: Attempt,
  text: string | null = null,
  publish: Parameters<typeof store.openFirstCommand>[2] = null,
): Promise<{ routes: string; published: boolean } | null> {
  const [reply] = await redis.batch([store.openFirstCommand(attempt, text, publish)]);
  const [error, value] = reply!;
  if (error) throw error;
  return store.readOpened(value);
}

/** How `finish` is asked for when the log is there and the text before the last piece is this. */
const said = (textBefore: string | null) => ({ begun: true, textBefore });
/** How a first attempt that nobody has asked for begins and ends in one step. */
const finishAtOnce = (attempt: Attempt, text = 'yes') =>
  store.finish(attempt, { seq: 1, text }, 2, DONE, { begun: false, textBefore: '' });
const DONE = { type: 'done', finishReason: 'stop', length: 3 } as const;

async function append(attempt: Attempt, seq: number, text: string): Promise<Error | null | unknown> {
  const [reply] = await redis.batch([
    store.appendCommand(store.logKey(attempt), `${attempt.attempt}-${seq}`, text),
  ]);
  const [error, id] = reply!;
  return error ?? id;
}

const ids = async (user: string, messageId: string) =>
  (await store.readLog(user, messageId, '')).entries.map((entry) => entry.id);

test('a record is made once and joined after that, on any node', async () => {
  const user = nextUser();
  assert.equal((await admit(user, 'm1')).state, 'created');
  assert.deepEqual(await admit(user, 'm1'), { state: 'joined', status: 'queued', node: 'n1' });
});

test('a user has only so many open generations, and one a conversation; ended ones make room', async () => {
  const user = nextUser();
  assert.equal((await admit(user, 'a', 'talk')).state, 'created');
  assert.deepEqual(await admit(user, 'b', 'talk'), { state: 'refused', code: 'conversation_busy' });
  for (const id of ['c', 'd', 'e']) assert.equal((await admit(user, id)).state, 'created');
  assert.deepEqual(await admit(user, 'f'), { state: 'refused', code: 'too_many_active' });
  await store.cancel(user, 'a');
  assert.equal((await admit(user, 'f', 'talk')).state, 'created');
  await redis.client.del(keys.generation(user, 'c')); // lost: holds no place
  assert.equal((await admit(user, 'g')).state, 'created');
});

test('after begin of attempt 2, Redis refuses every append of attempt 1', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const first = await running(user, 'm', 'w1', '1-1');
  assert.equal(await append(first, 1, 'one'), '1-1');
  const second = await running(user, 'm', 'w2', '1-1');
  assert.equal(second.attempt, 2);
  assert.match(String(await append(first, 2, 'zombie')), /equal or smaller/);
  assert.deepEqual(await store.finish(first, null, 2, DONE, said('one')), {
    state: 'fenced',
  });
  assert.equal(await store.release(first, true), false);
  assert.equal((await store.restore(first, ['one', 'zombie'])).state, 'fenced');
  assert.equal(await append(second, 1, 'two'), '2-1');
  assert.deepEqual(await ids(user, 'm'), ['1-0', '1-1', '2-0', '2-1']);
});

test('a log that is gone refuses its zombies too', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = await running(user, 'm');
  await redis.client.del(keys.log(user, 'm'));
  assert.equal((await store.finish(attempt, { seq: 1, text: 'yes' }, 2, DONE, said(''))).state, 'behind');
  assert.equal(await append(attempt, 1, 'x'), null);
  assert.equal(await redis.client.exists(keys.log(user, 'm')), 0);
});

test('a second entry of a request that a live worker runs is a duplicate; a silent one is replaced', async () => {
  const user = nextUser();
  await admit(user, 'm');
  await running(user, 'm', 'w1', '1-1');
  const duplicate = await begin(user, 'm', 'w2', '2-2');
  assert.ok(duplicate.state === 'duplicate' && duplicate.leaseMs > 0 && duplicate.leaseMs <= LEASE_MS);
  await redis.client.hset(keys.generation(user, 'm'), 'beat', Date.now() - LEASE_MS - 1_000);
  assert.equal((await begin(user, 'm', 'w2', '2-2')).state, 'run');
});

test('one run opens one attempt, however often it asks, and none once it was given up', async () => {
  const user = nextUser();
  await admit(user, 'm');
  await running(user, 'm', 'w0');
  const ask = (owner: string, above = false) =>
    store.begin({
      user,
      messageId: 'm',
      node: 'n1',
      entry: '1-1',
      owner,
      maxTries: 2,
      leaseMs: LEASE_MS,
      above,
    });
  const first = await ask('w1/7');
  assert.deepEqual(await ask('w1/7'), first);
  assert.ok(first.state === 'run' && first.attempt === 2 && first.tries === 2 && first.before === '1-0');
  assert.deepEqual(await ids(user, 'm'), ['1-0', '2-0']);
  const attempt = { user, messageId: 'm', attempt: 2, owner: 'w1/7', node: 'n1', entry: '1-1' };
  assert.equal(
    await store.release({ ...attempt, owner: 'w1/8' }, true),
    false,
    'another run of the same worker',
  );
  assert.equal((await store.restore({ ...attempt, owner: 'w1/8' }, ['x'])).state, 'fenced');
  assert.equal(await store.release(attempt, true), true);
  assert.equal((await ask('w1/7')).state, 'terminal', 'it comes late');
  assert.equal(await redis.client.hget(keys.generation(user, 'm'), 'status'), 'queued');
  assert.equal((await ask('w1/9')).state, 'exhausted');
  const other = {
    user,
    messageId: 'm',
    node: 'n1',
    entry: '5-1',
    owner: 'w2/1',
    maxTries: 9,
    leaseMs: LEASE_MS,
  };
  assert.equal((await store.begin(other)).state, 'duplicate');
  const above = await store.begin({ ...other, above: true });
  assert.ok(above.state === 'run' && above.attempt === 4);
});

test('an attempt is given up once, however often that is said, and only by its worker', async () => {
  for (const [countsAsTry, tries] of [
    [true, '1'],
    [false, '0'],
  ] as const) {
    const user = nextUser();
    await admit(user, 'm');
    const attempt = await running(user, 'm');
    assert.equal(await store.release({ ...attempt, owner: 'w2' }, countsAsTry), false);
    for (let time = 1; time <= 2; time++) assert.equal(await store.release(attempt, countsAsTry), true);
    assert.equal(await redis.client.hget(keys.generation(user, 'm'), 'tries'), tries);
    await running(user, 'm', 'w2', '1-2');
    assert.equal(await store.release(attempt, countsAsTry), false);
  }
});

test('finish is exact: last text, terminal frame, record; and safe to repeat', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = await running(user, 'm');
  await append(attempt, 1, 'Hello');
  const finish = () =>
    store.finish(
      attempt,
      { seq: 2, text: ' you' },
      3,
      { type: 'done', finishReason: 'stop', length: 9 },
      said('Hello'),
    );
  for (let repeat = 0; repeat < 2; repeat++)
    assert.deepEqual(await finish(), { state: 'ended', routes: ['n1'], acknowledged: true });
  assert.deepEqual(await ids(user, 'm'), ['1-0', '1-1', '1-2', '1-3']);
  assert.equal((await begin(user, 'm')).state, 'terminal');
  const logMs = await redis.client.pttl(keys.log(user, 'm'));
  assert.ok(logMs > 0 && logMs <= 30_000, 'the log stays for COMPACT_AFTER_MS');
  assert.ok((await redis.client.pttl(keys.generation(user, 'm'))) > 30_000);
  await redis.client.del(keys.log(user, 'm'));
  assert.equal((await finish()).state, 'ended', 'also when its log has expired');
});

test('finish does not close a log that lacks frames; restore puts them back under the same ids', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = await running(user, 'm');
  await append(attempt, 1, 'a');
  const texts = ['a', 'b', 'c']; // 2 and 3 were lost by a failover
  assert.deepEqual(await store.finish(attempt, null, 4, DONE, said('abc')), { state: 'behind' });
  assert.equal((await store.restore(attempt, texts)).state, 'restored');
  assert.equal((await store.restore(attempt, texts)).state, 'restored', 'safe to repeat');
  assert.deepEqual(await ids(user, 'm'), ['1-0', '1-1', '1-2', '1-3']);
  await redis.client.del(keys.log(user, 'm')); // all of it lost
  assert.equal((await store.restore(attempt, texts)).state, 'restored');
  assert.deepEqual(await ids(user, 'm'), ['1-0', '1-1', '1-2', '1-3']);
  assert.equal((await store.finish(attempt, null, 4, DONE, said('abc'))).state, 'ended');
});

/** An attempt whose request was appended a moment ago, by the clock of Redis. */
async function justAsked(user: string, messageId: string, conversationId?: string): Promise<Attempt> {
  await admit(user, messageId, conversationId);
  const entry = `${(await redis.client.time())[0]}000-0`;
  return { ...(await running(user, messageId, 'w1', entry)), entry };
}

/** Redis loses all that it has of a user. */
async function forget(user: string): Promise<void> {
  await redis.client.del(...(await redis.client.keys(`*${user}*`)));
}

const lost = (payload: object = { contents: 'hi' }) => ({
  payload: JSON.stringify(payload),
  tries: 1,
  trace: 'a trace',
  routes: ['n1', 'n3'],
});

test('restore makes a lost record again, with its place and its log', async () => {
  const user = nextUser();
  const attempt = await justAsked(user, 'm', 'c1');
  await append(attempt, 1, 'a');
  const known = lost({ contents: 'hi', conversationId: 'c1' });
  for (const gone of [[keys.generation(user, 'm')], await redis.client.keys(`*${user}*`)]) {
    await redis.client.del(...gone);
    assert.deepEqual(await store.restore(attempt, ['a', 'b']), { state: 'missing' });
    const routes = ['n1', 'n3'];
    assert.deepEqual(await store.restore(attempt, ['a', 'b'], known), {
      state: 'restored',
      routes,
      again: true,
    });
    assert.deepEqual(await store.restore(attempt, ['a', 'b'], known), {
      state: 'restored',
      routes,
      again: false,
    });
    assert.deepEqual(await ids(user, 'm'), ['1-0', '1-1', '1-2']);
    assert.equal(await redis.client.hget(keys.active(user), 'm'), 'c1', 'it has its place');
    const record = await store.inspect({ user, messageId: 'm' });
    assert.equal(record?.status, 'running');
    assert.equal(record.owner, attempt.owner);
    for (const key of [keys.generation(user, 'm'), keys.log(user, 'm'), keys.active(user)])
      assert.ok((await redis.client.pttl(key)) > 60_000, `${key} expires, but not yet`);
  }
  // Should this worker die too: the next one has the question, and goes above what was shown.
  const next = await begin(user, 'm', 'w2', attempt.entry);
  assert.ok(next.state === 'run');
  assert.deepEqual([next.attempt, next.tries, next.trace], [2, 2, 'a trace']);
  assert.deepEqual(JSON.parse(next.payload), { contents: 'hi', conversationId: 'c1' });
  assert.equal((await store.restore(attempt, ['a', 'b'], known)).state, 'fenced', 'it was taken over');
  await redis.client.del(keys.generation(user, 'm'));
  assert.equal((await store.restore(attempt, ['a', 'b'], known)).state, 'fenced', 'the log says so too');
});

test('restore leaves a record alone that is gone because its answer has, or may have, ended', async () => {
  const user = nextUser();
  const ended = await justAsked(user, 'ended');
  assert.equal((await store.finish(ended, null, 1, DONE, said(''))).state, 'ended');
  await redis.client.del(keys.generation(user, 'ended')); // its log is still there
  assert.equal((await store.restore(ended, [], lost())).state, 'missing');
  const old = await justAsked(user, 'old');
  await forget(user);
  const askedMs = Number(old.entry.split('-')[0]) - 60_000; // RETENTION_MS ago: it may have ended, and expired
  assert.equal((await store.restore({ ...old, entry: `${askedMs}-0` }, [], lost())).state, 'missing');
  assert.equal(
    (await store.restore({ ...old, entry: `${askedMs + 10_000}-0` }, [], lost())).state,
    'restored',
  );
  assert.equal(await store.inspect({ user, messageId: 'ended' }), null);
});

test('cancel ends it at once, keeps the text, counts UTF-16 units, and fences the worker', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = await running(user, 'm');
  await append(attempt, 1, 'né €');
  await append(attempt, 2, ' 𝒳😀');
  const cancelled = await store.cancel(user, 'm');
  assert.ok(cancelled.state === 'cancelled');
  assert.equal(cancelled.id, '2-0');
  assert.equal(cancelled.before, '1-2');
  assert.deepEqual(JSON.parse(cancelled.frame), {
    type: 'done',
    messageId: 'm',
    id: '2-0',
    finishReason: 'cancelled',
    length: 'né € 𝒳😀'.length,
  });
  assert.match(String(await append(attempt, 3, 'late')), /equal or smaller/);
  assert.deepEqual(await store.cancel(user, 'm'), { state: 'ended', status: 'cancelled' });
  assert.deepEqual(await store.cancel(user, 'never'), { state: 'unknown' });
});

test('resume reads what comes after an id; an id that is not in the log replays from the last start', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const first = await running(user, 'm', 'w1');
  await append(first, 1, 'x');
  const second = await running(user, 'm', 'w2');
  await append(second, 1, 'y');
  const after = async (id: string) => {
    const attached = await store.attach(user, 'm', 'n2', id);
    assert.ok(attached.state === 'attached');
    return [attached.recovered, attached.entries.map((entry) => entry.id)];
  };
  assert.deepEqual(await after(''), [true, ['1-0', '1-1', '2-0', '2-1']]);
  assert.deepEqual(await after('1-1'), [true, ['2-0', '2-1']]);
  assert.deepEqual(await after('2-1'), [true, []]);
  assert.deepEqual(await after('1-7'), [false, ['2-0', '2-1']]);
  assert.equal(await redis.client.hget(keys.generation(user, 'm'), 'routes'), 'n1,n2');
  assert.equal((await store.attach(user, 'other', 'n1', '')).state, 'unknown');
});

test('a finished generation whose log has expired replays as start, one token, terminal', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = await running(user, 'm');
  for (const [index, text] of ['a "quoted"', ' \n'].entries()) await append(attempt, index + 1, text);
  const terminal = { type: 'done', finishReason: 'stop', length: 13 } as const;
  await store.finish(attempt, { seq: 3, text: 'é' }, 4, terminal, said('a "quoted" \n'));
  const attach = async (id: string) => {
    const attached = await store.attach(user, 'm', 'n1', id);
    assert.ok(attached.state === 'attached');
    return attached;
  };
  const exact = await attach('1-2');
  assert.deepEqual([exact.recovered, exact.compacted, exact.entries.length], [true, false, 2]);
  await redis.client.pexpire(keys.log(user, 'm'), 0);
  const replayed = await attach('1-2');
  assert.deepEqual([replayed.recovered, replayed.compacted], [false, true]);
  assert.deepEqual(
    replayed.entries.map((entry) => JSON.parse(entry.frame)),
    [
      { type: 'start', messageId: 'm', id: '1-0', attempt: 1 },
      { type: 'token', messageId: 'm', id: '1-3', text: 'a "quoted" \né' },
      { type: 'done', messageId: 'm', id: '1-4', finishReason: 'stop', length: 13 },
    ],
  );
  assert.deepEqual((await attach('1-4')).entries, []);
  assert.match(String(await append(attempt, 5, 'zombie')), /null/);
  const bytes = Number(await redis.client.memory('USAGE', keys.generation(user, 'm')));
  assert.ok(bytes < 1_500, `${bytes} bytes`);
});

test('an end without new text keeps the id of the text before it; a text too long for a record stays a log', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = await running(user, 'm');
  await append(attempt, 1, 'yes');
  await store.finish(attempt, null, 2, DONE, said('yes'));
  await redis.client.del(keys.log(user, 'm'));
  const attached = await store.attach(user, 'm', 'n1', '1-1');
  assert.ok(attached.state === 'attached' && attached.recovered);
  assert.deepEqual(
    attached.entries.map((entry) => entry.id),
    ['1-2'],
  );

  await admit(user, 'long');
  const long = await running(user, 'long');
  await append(long, 1, 'x');
  await store.finish(long, null, 2, DONE, said(null));
  assert.ok((await redis.client.pttl(keys.log(user, 'long'))) > 30_000);
  assert.equal(await redis.client.hexists(keys.generation(user, 'long'), 'text'), 0);
});

test('what a cancelled answer had said is in its record when its log has expired', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = await running(user, 'm');
  await append(attempt, 1, 'so');
  await append(attempt, 2, ' far');
  assert.equal((await store.cancel(user, 'm')).state, 'cancelled');
  const logMs = await redis.client.pttl(keys.log(user, 'm'));
  assert.ok(logMs > 0 && logMs <= 30_000);
  await redis.client.pexpire(keys.log(user, 'm'), 0);
  const attached = await store.attach(user, 'm', 'n1', '');
  assert.ok(attached.state === 'attached' && attached.compacted && attached.status === 'cancelled');
  assert.deepEqual(
    attached.entries.map((entry) => JSON.parse(entry.frame)),
    [
      { type: 'start', messageId: 'm', id: '1-0', attempt: 1 },
      { type: 'token', messageId: 'm', id: '1-2', text: 'so far' },
      { type: 'done', messageId: 'm', id: '2-0', finishReason: 'cancelled', length: 6 },
    ],
  );
});

test('an answer that is there at once never has a log: finish puts it into its record, safe to repeat', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = expected(user, 'm');
  for (let repeat = 0; repeat < 2; repeat++)
    assert.deepEqual(await finishAtOnce(attempt), {
      state: 'ended',
      routes: ['n1'],
      acknowledged: true,
    });
  assert.equal(await redis.client.exists(keys.log(user, 'm')), 0);
  assert.equal(await openFirst(attempt), null, 'nothing makes a log for it');
  assert.equal(
    (await finishAtOnce(expected(user, 'm', 'w2'), 'no')).state,
    'stale',
    'another worker with the same request',
  );
  assert.equal((await begin(user, 'm')).state, 'terminal');
  assert.equal((await admit(user, 'next')).state, 'created');
  assert.deepEqual(await redis.client.hkeys(keys.active(user)), ['next'], 'it holds no place');
  const after = async (id: string) => {
    const attached = await store.attach(user, 'm', 'n2', id);
    assert.ok(attached.state === 'attached' && attached.whole);
    return [attached.recovered, attached.compacted, attached.entries.map((entry) => entry.id)];
  };
  // For COMPACT_AFTER_MS it looks like any other that has just ended; every place in it is one of its frames.
  assert.deepEqual(await after(''), [true, false, ['1-0', '1-1', '1-2']]);
  assert.deepEqual(await after('1-0'), [true, false, ['1-1', '1-2']]);
  assert.deepEqual(await after('1-1'), [true, false, ['1-2']]);
  assert.deepEqual(await after('1-2'), [true, false, []]);
  assert.deepEqual(await after('1-7'), [false, false, ['1-0', '1-1', '1-2']]);
  await redis.client.pexpire(keys.generation(user, 'm'), 30_000); // a log would have gone by now
  assert.deepEqual(await after(''), [true, true, ['1-0', '1-1', '1-2']]);
});

test('a first attempt begins with its log, its start and its first text in one step, and only once', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = expected(user, 'm');
  assert.deepEqual(await openFirst(attempt, 'first'), { routes: 'n1', published: false });
  assert.equal(await openFirst(attempt, 'first'), null);
  assert.deepEqual(await ids(user, 'm'), ['1-0', '1-1']);
  assert.deepEqual(
    await redis.client.hmget(keys.generation(user, 'm'), 'status', 'attempt', 'tries', 'owner', 'entry'),
    ['running', '1', '1', 'w1', 'n1 1-1'],
  );
  assert.ok(Number(await redis.client.hget(keys.generation(user, 'm'), 'beat')) > 0);
  // Its worker has lost the answer, or finds that it was lost with the server's memory.
  assert.equal((await store.restore(attempt, ['first'])).state, 'restored');
  assert.equal((await store.restore(expected(user, 'm', 'w2'), ['other'])).state, 'fenced');
  assert.equal(await append(attempt, 2, 'second'), '1-2');
  assert.ok((await redis.client.pttl(keys.log(user, 'm'))) > 0);
  assert.equal((await begin(user, 'm', 'w2', '2-1')).state, 'duplicate');
  assert.equal((await store.finish(attempt, null, 3, DONE, said('firstsecond'))).state, 'ended');
});

test('the step that begins a first attempt publishes its frames, unless somebody else wants them by now', async () => {
  const user = nextUser();
  const publishing = (messageId: string) => {
    const frame = encodeLines(addressHead(user, messageId), '', '1-0', 's', '{"type":"start"}');
    return openFirst(expected(user, messageId), 'first', { node: 'n1', frames: [frame] });
  };
  await redis.client.xadd(keys.replies('n1'), '*', '-', 'opened');
  await admit(user, 'm');
  assert.deepEqual(await publishing('m'), { routes: 'n1', published: true });
  assert.deepEqual((await redis.client.xrange(keys.replies('n1'), '-', '+')).at(-1)![1], [
    'frames',
    `${user} m - 1-0 s\n{"type":"start"}\n`,
  ]);
  await admit(user, 'two-nodes');
  await store.attach(user, 'two-nodes', 'n2', '');
  assert.deepEqual(await publishing('two-nodes'), { routes: 'n1,n2', published: false });
  assert.equal(await redis.client.xlen(keys.replies('n1')), 2);
  await redis.client.del(keys.replies('n1'));
  await admit(user, 'gone');
  await publishing('gone');
  assert.equal(await redis.client.exists(keys.replies('n1')), 0, 'a node that is gone gets no key');
});

test('one step appends to several logs and publishes, but nothing when one of them refuses', async () => {
  const user = nextUser();
  await redis.client.xadd(keys.replies('n1'), '*', '-', 'opened');
  const names = ['a', 'b', 'gone'];
  for (const name of names) {
    await admit(user, name);
    await openFirst(expected(user, name), 'first');
  }
  const both = async (id: string, wanted: string[]) => {
    const appends = wanted.map((name) => ({ log: keys.log(user, name), id, text: `${name} ${id}` }));
    const [reply] = await redis.batch([
      store.appendAndPublishCommand(
        'n1',
        appends,
        wanted.map((name) => `${name} ${id}\n{}\n`),
      ),
    ]);
    return store.readAppended(reply![1]);
  };
  const before = await redis.client.xlen(keys.replies('n1'));
  assert.deepEqual(await both('1-2', ['a', 'b']), { published: true, taken: [1, 1] });
  assert.deepEqual((await redis.client.xrange(keys.replies('n1'), '-', '+')).at(-1)![1], [
    'frames',
    'a 1-2\n{}\nb 1-2\n{}\n',
  ]);
  await redis.client.del(keys.log(user, 'gone'));
  assert.deepEqual(await both('1-3', ['a', 'gone', 'b']), { published: false, taken: [1, null, 1] });
  const again = await both('1-3', ['a', 'b']);
  assert.equal(again.published, false);
  for (const one of again.taken) assert.match((one as Error).message, /equal or smaller/);
  assert.equal(await redis.client.xlen(keys.replies('n1')), before + 1);
  assert.deepEqual(await ids(user, 'a'), ['1-0', '1-1', '1-2', '1-3']);
  await redis.client.del(keys.replies('n1'));
  assert.deepEqual(await both('1-4', ['a', 'b']), { published: true, taken: [1, 1] });
  assert.equal(await redis.client.exists(keys.replies('n1')), 0, 'a node that is gone gets no key');
});

test('what is no first attempt neither begins nor ends as one, and nothing is changed', async () => {
  const user = nextUser();
  const refused = async (messageId: string) => {
    const before = await redis.client.hgetall(keys.generation(user, messageId));
    assert.equal(await openFirst(expected(user, messageId, 'w9'), 'zombie'), null);
    assert.equal((await finishAtOnce(expected(user, messageId, 'w9'), 'zombie')).state, 'stale');
    assert.deepEqual(await redis.client.hgetall(keys.generation(user, messageId)), before);
  };
  await refused('never-admitted');
  assert.equal(await redis.client.exists(keys.log(user, 'never-admitted')), 0);

  await admit(user, 'running');
  const second = await running(user, 'running', 'w2');
  await refused('running');
  assert.deepEqual(await ids(user, 'running'), ['1-0']);

  await store.release(second, true); // handed to a retry
  await refused('running');

  await admit(user, 'stopped');
  const cancelled = await store.cancel(user, 'stopped');
  assert.ok(cancelled.state === 'cancelled' && cancelled.before === '');
  await refused('stopped');
  assert.deepEqual(await ids(user, 'stopped'), ['1-0']);

  await admit(user, 'with-a-log'); // of a record that was deleted
  await redis.client.xadd(keys.log(user, 'with-a-log'), '3-1', 'token', 'old');
  await refused('with-a-log');
  const begun = await begin(user, 'with-a-log');
  assert.ok(begun.state === 'run' && begun.attempt === 4 && begun.before === '3-1');
});

test('a payload goes with its request when it is small', async () => {
  const user = nextUser();
  const sizes: Record<string, number> = { small: 10, large: 5_000 };
  for (const [messageId, size] of Object.entries(sizes))
    await store.admit({
      user,
      messageId,
      node: 'payloads',
      payload: { contents: 'x'.repeat(size) },
      userActiveLimit: 4,
      quotaPerDay: 0,
      queueLimit: 10,
      trace: 'trace',
    });
  await queue.enqueue('payloads', user, 'in-a-cluster', 10, '', JSON.stringify({ contents: 'x' }));
  await queue.enqueue(
    'payloads',
    user,
    'large-there',
    10,
    '',
    JSON.stringify({ contents: 'é'.repeat(2_500) }),
  );
  const entries = await redis.client.xrange(keys.requests('payloads'), '-', '+');
  const read = entries.map(([entry, fields]) => readRequest('payloads', entry, fields));
  assert.deepEqual(
    read.map((request) => [request.messageId, request.trace, request.payload]),
    [
      ['small', 'trace', '{"contents":"xxxxxxxxxx"}'],
      ['large', 'trace', ''],
      ['in-a-cluster', '', '{"contents":"x"}'],
      ['large-there', '', ''],
    ],
  );
  // In a long line nobody gains by it, and whoever looks for a place there would read it all.
  const add = redis.client.pipeline();
  for (let index = 0; index < 600; index++)
    add.xadd(keys.requests('payloads'), '*', 'user', 'u', 'message', `m${index}`);
  await add.exec();
  const enqueued = async (size: number) => {
    await queue.enqueue('payloads', user, `waits-${size}`, 1_000, '', 'x'.repeat(size));
    const [last] = await redis.client.xrevrange(keys.requests('payloads'), '+', '-', 'COUNT', 1);
    return readRequest('payloads', last![0], last![1]).payload.length;
  };
  assert.deepEqual([await enqueued(1_000), await enqueued(2_000)], [1_000, 0]);
});

test('tries run out by begin, also when every worker dies', async () => {
  const user = nextUser();
  await admit(user, 'm');
  for (let attempt = 1; attempt <= 2; attempt++)
    assert.equal((await begin(user, 'm', `w${attempt}`, '1-1', 2)).state, 'run');
  const third = await begin(user, 'm', 'w3', '1-1', 2);
  assert.equal(third.state, 'exhausted');
});

test('the queue: bounded, counted exactly, acknowledged only by its holder', async () => {
  const node = 'q1';
  await queue.ensureGroup(node);
  for (let index = 0; index < 3; index++)
    assert.deepEqual(await queue.enqueue(node, 'u', `m${index}`, 3), { position: index, full: false });
  assert.deepEqual(await queue.enqueue(node, 'u', 'm3', 3), { position: 3, full: true });
  assert.equal(await queue.find(node, 'u', 'm2'), 2);
  assert.equal(await queue.find(node, 'u', 'm9'), -1);
  const read = async (worker: string) => {
    const reply = (await redis.client.call(
      'xreadgroup',
      'GROUP',
      'workers',
      worker,
      'COUNT',
      '1',
      'STREAMS',
      keys.requests(node),
      '>',
    )) as [string, [string, string[]][]][];
    const [entry, fields] = reply[0]![1][0]!;
    return { node, entry, user: fields[1]!, messageId: fields[3]!, trace: '', payload: '', deliveries: 1 };
  };
  const request = await read('w1');
  assert.equal(await queue.ack(request, 'w2'), false, 'not its own');
  assert.deepEqual(await queue.extend(node, 'w2', [request.entry]), [request.entry]);
  assert.deepEqual(await queue.extend(node, 'w1', [request.entry]), []);
  assert.equal(await queue.removeQueued(node, 'u', 'm0'), false, 'held by a worker');
  assert.equal(await queue.removeQueued(node, 'u', 'm1'), true);
  assert.equal(await queue.ack(request, 'w1'), true);
  assert.equal(await redis.client.xlen(keys.requests(node)), 1);
  const later = await read('w1');
  assert.equal(await queue.retryLater(later, 'w1', 0), true);
  await queue.retryLater(later, 'w1', 0); // again: nothing is doubled
  assert.equal(await queue.countOpen([node]), 1);
  assert.equal(await queue.promoteDue(node, 10), 1);
  assert.deepEqual([...(await queue.positions(node, 10)).keys()], ['u m2']);
});

test('a request that is nowhere is appended again while its generation is open, and not after its end', async () => {
  const [user, node, home] = [nextUser(), 'n-again', 'n1'];
  const desk = createAdmission({
    node,
    store,
    queue,
    places: createQueuePlaces({ queue }),
    policies: [],
    queueLimit: 10,
    userActiveLimit: 4,
    quotaPerDay: 0,
    isDraining: () => false,
    log: pino({ level: 'silent' }),
  });
  await queue.ensureGroup(home);
  await admit(user, 'open');
  await admit(user, 'ended');
  for (const messageId of ['open', 'ended']) assert.ok(await queue.removeQueued(home, user, messageId));
  await store.cancel(user, 'ended');

  assert.deepEqual(await desk.locate(user, 'ended', home), { position: 0, home });
  assert.deepEqual(await desk.locate(user, 'open', home), { position: 0, home: node });
  assert.deepEqual([...(await queue.positions(node, 10)).keys()], [`${user} open`]);
  assert.equal(await redis.client.hget(keys.generation(user, 'open'), 'node'), node);
  assert.equal(await redis.client.hget(keys.generation(user, 'ended'), 'node'), home);
});

test('a consumer is removed only when it holds nothing', async () => {
  const node = 'q2';
  await queue.ensureGroup(node);
  await queue.enqueue(node, 'u', 'm', 10);
  const read = (worker: string) =>
    redis.client.call(
      'xreadgroup',
      'GROUP',
      'workers',
      worker,
      'COUNT',
      '1',
      'STREAMS',
      keys.requests(node),
      '>',
    );
  const [[, [[entry]]]] = (await read('busy')) as [[string, [[string]]]];
  await redis.client.xgroup('CREATECONSUMER', keys.requests(node), 'workers', 'idle');
  assert.equal(await queue.removeConsumer(node, 'busy'), false);
  assert.equal(await queue.removeConsumer(node, 'idle'), true);
  assert.deepEqual(
    (await queue.claimStalled(node, 'other', { leaseMs: 0, most: 10, suspectAfter: 3, suspects: 1 })).map(
      (request) => request.entry,
    ),
    [entry],
  );
});

test('a log with a hole, as a failover can leave it, is written anew with the same ids', async () => {
  const user = nextUser();
  await admit(user, 'm');
  const attempt = await running(user, 'm');
  for (const [seq, text] of [
    [1, 'a'],
    [2, 'b'],
    [4, 'd'],
  ] as const)
    await append(attempt, seq, text);
  assert.equal((await store.restore(attempt, ['a', 'b', 'c', 'd'])).state, 'restored');
  const { entries } = await store.readLog(user, 'm', '');
  assert.deepEqual(
    entries.map(({ id }) => id),
    ['1-0', '1-1', '1-2', '1-3', '1-4'],
  );
});

/** An answer, a client on node n2 that has seen all of it so far, and what that is sent from then on. */
async function followed() {
  const user = nextUser();
  const attempt = await justAsked(user, 'm');
  await append(attempt, 1, 'seen');
  const delivery = createDelivery({
    store,
    node: 'n2',
    log: pino({ level: 'silent' }),
    counters: { healed() {}, slow() {}, doubled() {} },
  });
  const got: { id?: string; type: string; text?: string; code?: string }[] = [];
  const follower: Follower = {
    sendText: (text) => void got.push(JSON.parse(text)),
    onEnded() {},
    slow: false,
    open: true,
  };
  const subscription = delivery.hold(follower, user, 'm');
  const attached = await store.attach(user, 'm', 'n2', '1-1');
  assert.ok(attached.state === 'attached' && attached.recovered);
  delivery.release(subscription, '1-1', attached.entries, attached.more);
  return { user, attempt, delivery, got };
}

/** Whether the frames of an answer that was made again go to that client's node too. */
const isRouted = async (user: string) =>
  (await redis.client.hget(keys.generation(user, 'm'), 'routes')) === 'n1,n3,n2';

test('what a worker wrote before it knew of a node reaches the client there without a next frame', async () => {
  const { attempt, delivery, got } = await followed();
  await append(attempt, 2, ' and this'); // published to n1 alone: its worker asks for routes every ROUTES_MS
  await eventually('the rest', () => got.length > 0, 1_500); // `heal` would take 2 s
  delivery.stop();
  assert.deepEqual(
    got.map(({ text }) => text),
    [' and this'],
  );
});

test('an answer that Redis has forgotten goes on when its worker puts it back', async () => {
  const { user, attempt, delivery, got } = await followed();
  await forget(user);
  await delivery.heal(store.progress, true);
  await delay(700); // a worker that has still to reconnect
  assert.equal((await store.restore(attempt, ['seen', ' and this'], lost())).state, 'restored');
  await eventually('all of it', () => got.length === 4, 1_500);
  await eventually('the next frames come here too', () => isRouted(user), 1_500);
  delivery.stop();
  // From the beginning: it might have been another run of the same number.
  assert.deepEqual(
    got.map(({ type, id, text }) => [type, id, text]),
    [
      ['resumed', undefined, undefined],
      ['start', '1-0', undefined],
      ['token', '1-1', 'seen'],
      ['token', '1-2', ' and this'],
    ],
  );
});

test('frames that stayed away because a record was made again are read once, then they come by themselves', async () => {
  const { user, attempt, delivery, got } = await followed();
  await forget(user);
  assert.equal((await store.restore(attempt, ['seen', ' and this'], lost())).state, 'restored');
  await delivery.heal(store.progress, true);
  await eventually('the frame', () => got.length > 0, 1_500);
  await eventually('the next frames come here too', () => isRouted(user), 1_500);
  delivery.stop();
});

test('a stop waits for an answer that Redis has forgotten, and holds when its worker puts it back', async () => {
  const user = nextUser();
  const attempt = await justAsked(user, 'm');
  await append(attempt, 1, 'seen');
  const metrics = { cancelled: { inc() {} } } as unknown as GatewayMetrics;
  const parts = { store, redis, keys, queue, metrics };
  await forget(user);
  assert.equal(await cancelGeneration(parts, user, 'm'), false);
  const stopped = cancelWhenBack(parts, user, 'm');
  await delay(700); // a worker that has still to reconnect
  assert.equal((await store.restore(attempt, ['seen'], lost())).state, 'restored');
  assert.equal(await stopped, true);
  assert.equal((await store.inspect({ user, messageId: 'm' }))?.status, 'cancelled');
  assert.match(String(await append(attempt, 2, 'late')), /equal or smaller/);
});

test('an answer that nobody puts back counts as lost after a while, and its client is told once', async () => {
  const { user, delivery, got } = await followed();
  await forget(user);
  await delivery.heal(store.progress, true);
  await delay(4_000);
  assert.deepEqual(got, [], 'it may still come back');
  await eventually('the end', () => got.length > 0, 4_000);
  await delay(500);
  assert.deepEqual(
    got.map(({ id, type, code }) => [id, type, code]),
    [['2-0', 'failed', 'internal']],
  );
  assert.equal(delivery.size, 0);
  delivery.stop();
});
