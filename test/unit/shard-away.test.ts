import assert from 'node:assert/strict';
import { test } from 'node:test';
import pino from 'pino';
import { createAiDoor } from '../../gateway/ai/ai-door.ts';
import { createDelivery, type Follower, type Subscription } from '../../gateway/delivery.ts';
import { createMailboxes, type MailboxOwner } from '../../gateway/mailboxes.ts';
import { createQueuePlaces } from '../../gateway/queue-places.ts';
import { tellPositions } from '../../gateway/queue-positions.ts';
import { createGenerationStore, type GenerationStore } from '../../shared/generation-store.ts';
import { createKeys } from '../../shared/keys.ts';
import type { Command, RedisConnection, Reply } from '../../shared/redis.ts';
import { eventually } from '../helpers/eventually.ts';

/** A server of a Cluster is away: what lives on the others goes on, and what is not known is not taken for gone. */

const log = pino({ level: 'silent' });
const keys = createKeys('chat:');

/** Answers for all users but those whose names begin with `away`. */
function createPartOfRedis(answer: (command: Command) => unknown, others: object = {}): RedisConnection {
  const reply = (command: Command): Reply =>
    command.join(' ').includes('{away') ? [new Error('away'), null] : [null, answer(command)];
  return {
    isReady: () => true,
    batch: async (commands: Command[]) => commands.map(reply),
    scriptCommand: (name: string, scriptKeys: string[], args: string[]) => [name, ...scriptKeys, ...args],
    ...others,
  } as unknown as RedisConnection;
}

test('the store tells what is not known from what is not there', async () => {
  const redis = createPartOfRedis(([name, key]) => {
    if (name === 'xrevrange') return String(key).includes('{here}') ? [['1-3', ['token', 'x']]] : [];
    return String(key).includes('{here}') ? ['running', '1', 'w', 'n1'] : [null, null, null, null];
  });
  const store = createGenerationStore({ redis, keys, retentionMs: 1_000 });
  const generations = ['away', 'here', 'nowhere'].map((user) => ({ user, messageId: 'm' }));
  const progress = await store.progress(generations);
  assert.ok(progress[0] instanceof Error);
  assert.deepEqual(progress.slice(1), [{ top: '1-3', attempt: 1 }, null]);
  const records = await store.inspectAll(generations);
  assert.ok(records[0] instanceof Error);
  assert.deepEqual(records.slice(1), [{ status: 'running', attempt: 1, owner: 'w', node: 'n1' }, null]);
});

test('silent streams are healed although others cannot be compared', async () => {
  const read: string[] = [];
  const store = {
    async readLog(user: string) {
      read.push(user);
      return { entries: [{ id: '1-0', frame: '{}', terminal: true }], more: false };
    },
  } as unknown as GenerationStore;
  const delivery = createDelivery({
    store,
    node: 'n1',
    log,
    counters: { healed() {}, slow() {}, doubled() {} },
  });
  const ended: string[] = [];
  const follower: Follower = {
    sendText() {},
    onEnded: ({ user }) => void ended.push(user),
    slow: false,
    open: true,
  };
  // The one that is here comes last, in the second round trip.
  for (const user of [...Array.from({ length: 500 }, (_, index) => `away${index}`), 'here'])
    delivery.release(delivery.hold(follower, user, 'm'), '', [], false);
  const progress = (batch: Subscription[]) =>
    Promise.resolve(
      batch.map(({ user }) => (user === 'here' ? { top: '1-0', attempt: 1 } : new Error('away'))),
    );
  await assert.rejects(delivery.heal(progress, true), /away/);
  await eventually('the end', () => ended.length > 0);
  assert.deepEqual([read, ended, delivery.size], [['here'], ['here'], 500]);
  delivery.stop();
});

test('mailboxes are looked at although others cannot be', async () => {
  const redis = createPartOfRedis(
    ([name]) => (name === 'hmget' ? ['spam', null] : name === 'hexists' ? 1 : []),
    { script: async () => ['bound', '', '', [], []] },
  );
  const mailboxes = createMailboxes({
    node: 'n1',
    instance: 'i',
    redis,
    keys,
    inboxes: { topCommand: (user: string) => ['xrevrange', keys.inbox(user)], readTop: () => '' },
    live: () => ({ list: '' }),
    devicePolicy: 'any',
    closeOthers() {},
    counters: { delivered() {}, gap() {} },
    log,
  } as unknown as Parameters<typeof createMailboxes>[0]);
  const closed: string[] = [];
  // The one that is here comes last, in the second round trip.
  for (const userId of [...Array.from({ length: 250 }, (_, index) => `away${index}`), 'here']) {
    const owner: MailboxOwner = {
      userId,
      device: 'd',
      connectionId: 'c',
      slow: false,
      sendText() {},
      closeWith: (_, reason) => void closed.push(`${userId} ${reason}`),
    };
    const { opened } = await mailboxes.open(owner, '');
    assert.ok(opened.state === 'bound');
    opened.start();
  }
  await mailboxes.lookAtAll();
  assert.deepEqual(closed, ['here banned']);
  await mailboxes.stop();
});

test('bans on the path of the AI SDK are seen although others cannot be', async (t) => {
  t.mock.timers.enable({ apis: ['setInterval'] });
  const door = createAiDoor({ redis: createPartOfRedis(() => ['spam', null]), keys, log });
  const closed: string[] = [];
  // The one that is here comes last, in the second round trip.
  for (const userId of [...Array.from({ length: 250 }, (_, index) => `away${index}`), 'here'])
    door.enter({ userId, closeWith: (_, reason) => void closed.push(`${userId} ${reason}`) });
  t.mock.timers.tick(5_000);
  await eventually('the ban', () => closed.length > 0, 2_000);
  assert.deepEqual(closed, ['here banned']);
  door.stop();
});

test('places in the queue are told although those of another node cannot be read', async () => {
  const stop = new AbortController();
  const told: string[] = [];
  const watching = ['n1', 'n2'].map((home) => ({
    home,
    key: 'u m',
    user: 'u',
    messageId: 'm',
    state: 'live',
    waiting: true,
    toldPosition: -1,
    missing: 0,
    follower: { open: true, sendText: (text: string) => void told.push(`${home} ${text}`) },
  }));
  let fail = (_: Error) => {};
  const ended = tellPositions({
    delivery: { watchingQueue: () => watching },
    places: createQueuePlaces({
      queue: {
        positions: (home: string) =>
          home === 'n2'
            ? Promise.resolve(new Map([['u m', 3]]))
            : new Promise((_, reject) => {
                fail = reject; // a silent server: its answer takes a while
              }),
      },
    }),
    desk: {},
    log,
    signal: stop.signal,
  } as unknown as Parameters<typeof tellPositions>[0]);
  await eventually('a place', () => told.length > 0, 5_000);
  assert.deepEqual(told, ['n2 {"type":"queued","messageId":"m","position":3}']);
  stop.abort();
  fail(new Error('away'));
  await ended;
});

test('a request that is nowhere is looked up once, however many wait for it; what has ended is not', async () => {
  const stop = new AbortController();
  const located: string[] = [];
  const follower = { open: true, sendText() {} };
  const waitFor = (messageId: string) => {
    const key = `u ${messageId}`;
    return { home: 'n1', key, user: 'u', messageId, state: 'live', waiting: true, missing: 0, follower };
  };
  const watching = [waitFor('lost'), waitFor('lost'), waitFor('moved')];
  const places = createQueuePlaces({ queue: { positions: async () => new Map() } });
  for (const messageId of ['lost', 'moved', 'ended']) places.doubt('n1', 'u', messageId);
  const records: Record<string, object> = {
    lost: { status: 'queued', node: 'n1' },
    moved: { status: 'running', node: 'n3' },
    ended: { status: 'done', node: 'n1' },
  };
  const ended = tellPositions({
    delivery: { watchingQueue: () => watching },
    places,
    store: {
      inspectAll: async (all: { messageId: string }[]) => all.map(({ messageId }) => records[messageId]),
    },
    desk: {
      locate: async (_: string, messageId: string) => {
        located.push(messageId);
        return { position: 0, home: 'n2' };
      },
    },
    log,
    signal: stop.signal,
  } as unknown as Parameters<typeof tellPositions>[0]);
  await eventually('a look', () => located.length > 0, 5_000);
  stop.abort();
  await ended;
  assert.deepEqual(located, ['lost']);
  assert.deepEqual(
    watching.map(({ home }) => home),
    ['n2', 'n2', 'n3'],
  );
  assert.deepEqual([...places.doubts.keys()], ['u moved'], 'looked for where it is now');
});
