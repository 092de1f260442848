import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import pino from 'pino';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createGenerationStore, type GenerationStore, ROUTES_MS } from '../../shared/generation-store.ts';
import { createKeys } from '../../shared/keys.ts';
import { createRedis, type RedisConnection } from '../../shared/redis.ts';
import { readEntry } from '../../shared/reply-stream.ts';
import { AnswerWriter } from '../../worker/answer-writer.ts';
import { type Appender, createAppender } from '../../worker/appender.ts';
import { eventually } from '../helpers/eventually.ts';

/** From a worker's text to its log and to the reply stream, against a real Redis. */

let redis: RedisConnection;
let store: GenerationStore;
let appender: Appender;
let stopServer: () => Promise<void>;
const keys = createKeys('chat:');
const user = 'u';

before(async () => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-appender-'));
  const server = await startRedisServer({ dir });
  redis = createRedis({ url: server.url, name: 'appender', hot: true });
  await redis.connected();
  store = createGenerationStore({ redis, keys, retentionMs: 60_000, compactAfterMs: 30_000 });
  appender = createAppender({ redis, keys, store });
  for (const node of ['n1', 'n2']) await redis.client.xadd(keys.replies(node), '*', 'opened', node);
  stopServer = async () => {
    await redis.close();
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  };
});
after(() => stopServer());

/** Those that were not open yet when they were made. */
const unopened = new Map<string, AnswerWriter>();

async function write(messageId: string, through = appender): Promise<AnswerWriter> {
  const writer = await admit(messageId, through);
  unopened.set(messageId, writer);
  writer.expect('n1');
  await writer.settled();
  return writer;
}

/** Accepted, and about to begin. */
async function admit(messageId: string, through = appender): Promise<AnswerWriter> {
  await store.admit({
    user,
    messageId,
    node: 'n1',
    payload: { contents: 'hi' },
    userActiveLimit: 1_000,
    quotaPerDay: 0,
    queueLimit: 1_000,
  });
  const attempt = { user, messageId, attempt: 1, owner: 'w', node: 'n1', entry: '1-1' };
  return new AnswerWriter(attempt, {
    store,
    appender: through,
    logger: () => pino({ level: 'silent' }),
    payload: '{"contents":"hi"}',
    tries: 1,
    trace: '',
    onFenced() {},
    onMended() {},
    isLeaving: () => false,
  });
}

/** Every frame of an answer that a node was sent, as `id text`, in order. */
async function published(node: string, messageId: string): Promise<string[]> {
  const seen: string[] = [];
  for (const [, fields] of await redis.client.xrange(keys.replies(node), '-', '+'))
    if (fields[0] !== 'opened')
      readEntry(fields, (address, frame) => {
        const [, message, , id] = address.split(' ');
        if (message === messageId) seen.push(`${id} ${JSON.parse(frame).text ?? ''}`);
      });
  return seen;
}

async function logged(messageId: string): Promise<string[]> {
  const { entries } = await store.readLog(user, messageId, '');
  return entries.map(({ id, frame }) => `${id} ${JSON.parse(frame).text ?? ''}`);
}

const calls = async (command: string) => {
  const stats = await redis.client.info('commandstats');
  return Number(new RegExp(`cmdstat_${command}:calls=(\\d+)`).exec(stats)?.[1] ?? 0);
};

/** Says a word in each, and waits until it is stored. */
async function sayAll(writers: AnswerWriter[], word: string): Promise<void> {
  for (const writer of writers) writer.push(word);
  for (const writer of writers) await writer.settled();
}

test('few answers or many: the log and the reply stream hold the same frames, each once and in order', async () => {
  for (const count of [1, 3, 16, 17, 80]) {
    const names = Array.from({ length: count }, (_, index) => `same-${count}-${index}`);
    const writers = await Promise.all(names.map((name) => write(name)));
    for (const word of ['one', ' two', ' \u{1f980} three']) await sayAll(writers, word);
    await appender.flushed();
    for (const name of names) {
      const frames = await logged(name);
      assert.equal(frames.length, 4, name);
      assert.deepEqual(await published('n1', name), frames);
    }
  }
});

test('texts that grow when they are encoded arrive whole too', async () => {
  const names = ['grown-1', 'grown-2', 'grown-3', 'grown-4'];
  const writers = await Promise.all(names.map((name) => write(name)));
  await sayAll(writers, '\u0001'.repeat(4_000));
  await sayAll(writers, '\u0001'.repeat(16_000));
  await appender.flushed();
  for (const name of names) {
    const frames = await logged(name);
    assert.equal(frames.length, 3);
    assert.deepEqual(await published('n1', name), frames);
  }
});

test('a character that comes in two halves is written whole, by every way to the log', async () => {
  const [high, low] = ['\ud83d', '\ude00'];
  const writer = await write('halves');
  writer.push(`a${low}`);
  await writer.settled();
  writer.push(high);
  await writer.settled();
  writer.push(high); // the half before it stays alone
  await writer.settled();
  writer.push(`${low}b`);
  await writer.settled();
  writer.push(high);
  await writer.settled();
  writer.push(low);
  await writer.settled();
  const frames = (await logged('halves')).map((frame) => frame.split(' ')[1]);
  assert.equal(frames.join(''), `a\ufffd\ufffd\u{1f600}b\u{1f600}`);
  assert.deepEqual(await published('n1', 'halves'), await logged('halves'));

  const { tokens } = appender;
  writer.push(`c${high}`);
  const finished = await writer.finish({ type: 'done', finishReason: 'stop', length: writer.length });
  assert.ok(finished);
  await appender.flushed();
  assert.deepEqual(await published('n1', 'halves'), await logged('halves'));
  assert.equal(appender.tokens, tokens + 1, 'what comes with the end counts too');
  assert.equal(
    await redis.client.hget(keys.generation(user, 'halves'), 'text'),
    'a\ufffd\ufffd\u{1f600}b\u{1f600}c\ufffd',
  );
});

test('what few answers say takes one step', async () => {
  const writers = [await write('step-1'), await write('step-2'), await write('step-3')];
  await appender.flushed();
  const before = await calls('evalsha');
  await sayAll(writers, 'together');
  assert.equal(await calls('evalsha'), before + 1);
  assert.deepEqual(await published('n1', 'step-3'), ['1-0 ', '1-1 together']);
});

test('where many begin in a turn, one that is complete by the next has no log; few do not wait', async () => {
  for (const count of [4, 40]) {
    const names = Array.from({ length: count }, (_, index) => `brief-${count}-${index}`);
    const writers = await Promise.all(names.map((name) => admit(name)));
    for (const writer of writers) {
      writer.expect('n1');
      writer.push('first half,');
    }
    await new Promise(setImmediate); // the end of their turn
    const ended = writers.map((writer) => {
      writer.push(' second half');
      return writer.finish({ type: 'done', finishReason: 'stop', length: writer.length });
    });
    for (const one of await Promise.all(ended)) assert.equal(one?.state, 'ended');
    assert.equal(writers.filter((writer) => writer.hasLog).length, count === 4 ? 4 : 0);
    await appender.flushed();
    for (const name of names) {
      const attached = await store.attach(user, name, 'n1', '');
      assert.ok(attached.state === 'attached');
      const text = attached.entries.map(({ frame }) => JSON.parse(frame).text ?? '').join('');
      assert.equal(text, 'first half, second half');
      const shown = await published('n1', name);
      assert.equal(shown.map((frame) => frame.slice(frame.indexOf(' ') + 1)).join(''), text);
      assert.equal(shown.length, count === 4 ? 4 : 3);
    }
  }
});

test('one that was replaced is fenced and shows nothing; the others of its step lose nothing', async () => {
  const writers = [await write('kept-1'), await write('replaced'), await write('kept-2')];
  await sayAll(writers, 'one');
  await store.begin({
    user,
    messageId: 'replaced',
    node: 'n1',
    entry: '1-1',
    owner: 'v',
    maxTries: 5,
    leaseMs: 0,
  });
  await sayAll(writers, ' two');
  await appender.flushed();
  assert.deepEqual(
    writers.map((writer) => writer.fenced),
    [false, true, false],
  );
  assert.deepEqual(await published('n1', 'replaced'), ['1-0 ', '1-1 one']);
  for (const name of ['kept-1', 'kept-2'])
    assert.deepEqual(await published('n1', name), ['1-0 ', '1-1 one', '1-2  two']);
});

test('stale is what Redis says of it: after an opening whose answer was lost, clients may have seen some', async () => {
  for (const [lost, stale] of [
    [new Error('Connection is closed.'), false],
    [null, true],
  ] as const) {
    const messageId = `opening-${stale}`;
    const idle = { schedule() {}, publish() {}, count() {} } as unknown as Appender;
    const opening = write(messageId, idle);
    const writer = (await eventually('a writer', () => unopened.get(messageId)))!;
    writer.push('seen');
    assert.equal(writer.take()?.opening, true);
    // The new master knows of another's.
    await store.begin({ user, messageId, node: 'n1', entry: '1-1', owner: 'v', maxTries: 5, leaseMs: 0 });
    writer.refused(1, lost);
    await opening;
    assert.deepEqual([writer.fenced, writer.stale, writer.mayBeShown], [true, stale, !stale]);
  }
});

test('a Redis that has forgotten its scripts takes everything, in order', async () => {
  const writer = await write('forgotten');
  await sayAll([writer], 'one');
  await redis.client.script('FLUSH');
  writer.push(' two');
  await new Promise(setImmediate); // it is under way now
  writer.push(' three '.repeat(10_000)); // whole frames, which do not wait for each other
  await writer.settled();
  await appender.flushed();
  const frames = await logged('forgotten');
  assert.equal(
    frames.map((frame) => frame.slice(frame.indexOf(' ') + 1)).join(''),
    `one two${' three '.repeat(10_000)}`,
  );
  assert.deepEqual(await published('n1', 'forgotten'), frames);
});

test('a node that has come gets the frames from the moment that it is seen', async () => {
  const writer = await write('second-node');
  await sayAll([writer], 'one');
  await store.attach(user, 'second-node', 'n2', '');
  await new Promise((resolve) => setTimeout(resolve, ROUTES_MS + 20));
  await sayAll([writer], ' two');
  await sayAll([writer], ' three');
  await appender.flushed();
  assert.deepEqual(await published('n1', 'second-node'), ['1-0 ', '1-1 one', '1-2  two', '1-3  three']);
  assert.deepEqual(await published('n2', 'second-node'), ['1-2  two', '1-3  three']);
});

test('in a Cluster a server that does not answer does not hold up the answers of the others', async () => {
  const stuck = keys.log(user, 'on-a-silent-server');
  let silent = false;
  const never = new Promise<never>(() => {});
  const cluster: RedisConnection = {
    ...redis,
    isCluster: true,
    outcomes: (commands) =>
      silent && commands.some((command) => command.includes(stuck)) ? never : redis.outcomes(commands),
  };
  const apart = createAppender({ redis: cluster, keys, store });
  const writers = await Promise.all(
    ['before', 'on-a-silent-server', 'behind'].map((name) => write(name, apart)),
  );
  silent = true;
  for (const writer of writers) writer.push('word');
  await Promise.all([writers[0]!.settled(), writers[2]!.settled()]);
  for (const name of ['before', 'behind'])
    await eventually(`the word of ${name}`, async () => (await published('n1', name)).includes('1-1 word'));
});
