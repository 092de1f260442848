import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import pino from 'pino';
import { createMailboxes } from '../../gateway/mailboxes.ts';
import { createPeopleDesk } from '../../gateway/people-desk.ts';
import { createPostOffice } from '../../gateway/post-office.ts';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createAccessStore } from '../../shared/access.ts';
import { createGenerationStore } from '../../shared/generation-store.ts';
import { createGroups } from '../../shared/groups.ts';
import {
  compareInboxIds,
  createInboxes,
  encodeRest,
  INBOX_PAGE,
  type Inboxes,
  parseInboxId,
} from '../../shared/inbox.ts';
import { createKeys } from '../../shared/keys.ts';
import { createLiveNodes, readPresence } from '../../shared/presence.ts';
import { createRedis, type RedisConnection } from '../../shared/redis.ts';
import { eventually } from '../helpers/eventually.ts';

/** Inboxes, presence, groups and the quota against a real Redis. */

let redis: RedisConnection;
let inboxes: Inboxes;
let stopServer: () => Promise<void>;
const keys = createKeys('chat:');
const MOST = 10;
const AGE_MS = 60_000;

before(async () => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-contract-'));
  const server = await startRedisServer({ dir });
  redis = createRedis({ url: server.url, name: 'contract' });
  await redis.connected();
  inboxes = createInboxes({ redis, keys, limits: { mostMessages: MOST, ageMs: AGE_MS } });
  stopServer = async () => {
    await redis.close();
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  };
});
after(() => stopServer());

let counter = 0;
const nextUser = () => `user-${++counter}`;

async function deliver(user: string, messageId: string, from = 'ann', store = inboxes) {
  const message = { messageId, from, contents: messageId, sentAt: 1 };
  const [[error, value]] = (await redis.batch([
    store.deliverCommand(user, message, encodeRest(message)),
  ])) as [[Error | null, unknown]];
  if (error) throw error;
  return store.readDelivered(value);
}

const LIFE_MS = 60_000;
const entry = (node: string, device = 'default', since = 1) =>
  JSON.stringify({ node, instance: `${node}-a`, device, since });
/** Binds as a gateway does; `live` names the nodes that are alive. */
async function bind(
  user: string,
  connection: string,
  options: {
    node?: string;
    device?: string;
    live?: string[];
    most?: number;
    after?: string;
    since?: number;
    ageMs?: number;
  } = {},
) {
  const { node = 'n1', device = 'default', live = ['n1', 'n2'], most = 1_000, after = '', since } = options;
  const { ageMs = AGE_MS } = options;
  return (await redis.script(
    'bind',
    [keys.access(user), keys.connections(user), keys.cursors(user), keys.inbox(user)],
    [
      connection,
      entry(node, device, since),
      device,
      live.length > 0 ? ` ${live.map((name) => `${name}/${name}-a`).join(' ')} ` : '',
      most,
      LIFE_MS,
      after,
      INBOX_PAGE,
      10_000,
      most > 0 && most < 1_000 ? 1 : 0,
      ageMs,
    ],
  )) as [string, string, string, [string, string[]][], string[]];
}
const connectionsOf = async (user: string) => (await redis.client.hkeys(keys.connections(user))).sort();

test('a message enters an inbox once, and names the one before it', async () => {
  const user = nextUser();
  const first = await deliver(user, 'm1');
  assert.equal(first.before, '-');
  assert.deepEqual(first.connections, []);
  await bind(user, 'c1');
  const second = await deliver(user, 'm2');
  assert.equal(second.before, first.id);
  assert.equal(second.connections.length, 1);
  assert.deepEqual(await deliver(user, 'm1'), { ...first, before: '?', connections: second.connections });
  assert.equal((await deliver(user, 'm1', 'ben')).before, second.id); // another sender, another message
  assert.equal(await redis.client.xlen(keys.inbox(user)), 3);
});

test('fingerprints are remembered over their rotation', async () => {
  const user = nextUser();
  const first = await deliver(user, 'm0');
  for (let index = 1; index <= 2_100; index += 100)
    await Promise.all(Array.from({ length: 100 }, (_, at) => deliver(user, `m${index + at}`)));
  assert.ok((await redis.client.hlen(keys.seen(user))) < 2_000);
  assert.equal((await deliver(user, 'm0')).id, first.id);
  for (const key of [keys.seen(user), keys.seenBefore(user), keys.inbox(user), keys.cursors(user)])
    assert.ok((await redis.client.pttl(key)) > 0, `${key} expires`);
});

test('an inbox is bounded by length and by age, and remembers how far it was dropped', async () => {
  const user = nextUser();
  const ids: string[] = [];
  for (let index = 0; index < MOST + 5; index++) ids.push((await deliver(user, `m${index}`)).id);
  const page = await inboxes.read(user, '');
  assert.equal(page.dropped, ids[4]);
  assert.deepEqual(
    page.entries.map(({ id }) => id),
    ids.slice(5),
  );
  const [state, start, dropped, entries] = await bind(user, 'c1');
  assert.deepEqual([state, start, dropped, entries.length], ['bound', '', ids[4], MOST]);
  // Whoever had those that were dropped is not told.
  assert.equal((await bind(user, 'c2', { after: ids[4]! }))[2], '');
  assert.equal((await bind(user, 'c2', { after: ids[3]! }))[2], ids[4]);

  const young = createInboxes({ redis, keys, limits: { mostMessages: 100, ageMs: 300 } });
  const other = nextUser();
  const old = await deliver(other, 'm1', 'ann', young);
  await delay(200);
  await deliver(other, 'm2', 'ann', young);
  await delay(200);
  await deliver(other, 'm3', 'ann', young);
  const left = await young.read(other, '');
  assert.equal(left.dropped, old.id);
  assert.equal(left.entries.length, 2);
});

test('what is too old is told as dropped, also when nothing new came; what was acknowledged does not come again', async () => {
  const ageMs = 1_000;
  const young = createInboxes({ redis, keys, limits: { mostMessages: 100, ageMs } });
  const user = nextUser();
  const arrive = async (device: string, after = '') => {
    const [, , dropped, page] = await bind(user, `on-${device}`, { device, after, ageMs });
    return { dropped, ids: page.map(([id]) => id) };
  };
  const a1 = await deliver(user, 'a1', 'ann', young);
  const a2 = await deliver(user, 'a2', 'ann', young);
  await young.ack(user, 'phone', a2.id);
  await delay(600);
  const b = await deliver(user, 'b', 'ann', young);
  await delay(600); // the first two are too old, and still there: nothing was delivered since
  assert.deepEqual(await arrive('phone'), { dropped: '', ids: [b.id] });
  assert.deepEqual(await arrive('laptop'), { dropped: a2.id, ids: [b.id] });
  assert.deepEqual(await arrive('other', a1.id), { dropped: a2.id, ids: [b.id] });
  assert.deepEqual((await young.read(user, a1.id)).dropped, a2.id);

  await delay(600); // all are
  assert.equal(
    await redis.client.exists(keys.inbox(user)),
    0,
    'an idle inbox costs no more than its cursors',
  );
  assert.deepEqual(await arrive('phone'), { dropped: b.id, ids: [] });
  assert.deepEqual(await young.read(user, ''), { dropped: b.id, entries: [] });
  const c = await deliver(user, 'c', 'ann', young);
  assert.equal(c.before, '-');
  for (const device of ['phone', 'laptop'])
    assert.deepEqual(await arrive(device), { dropped: b.id, ids: [c.id] });
  // Told once to who acknowledges it, whether or not something followed.
  await delay(ageMs + 100);
  await young.ack(user, 'phone', c.id);
  assert.deepEqual(await arrive('phone'), { dropped: '', ids: [] });
  await eventually(
    'the end of the cursors, where nothing comes',
    async () => (await redis.client.exists(keys.cursors(user))) === 0,
  );
});

test('who stays connected is not told that what it had became too old', async (t) => {
  const ageMs = 500;
  const young = createInboxes({ redis, keys, limits: { mostMessages: 100, ageMs } });
  const user = nextUser();
  const mailboxes = createMailboxes({
    node: 'n1',
    instance: 'n1-a',
    redis,
    keys,
    inboxes: young,
    live: () => createLiveNodes([], 0),
    devicePolicy: 'any',
    closeOthers() {},
    counters: { delivered() {}, gap() {} },
    log: pino({ level: 'silent' }),
  });
  t.after(() => mailboxes.stop());
  const got: string[] = [];
  const { opened } = await mailboxes.open(
    {
      userId: user,
      device: 'phone',
      connectionId: 'c1',
      slow: false,
      sendText(text) {
        const frame = JSON.parse(text);
        got.push(frame.messageId ?? frame.type);
      },
      closeWith: (_, reason) => assert.fail(reason),
    },
    '',
  );
  assert.ok(opened.state === 'bound');
  opened.start();
  await deliver(user, 'o1', 'ann', young); // live entries are lost: the look finds what came
  await mailboxes.lookAtAll();
  await eventually('the first', () => got.length === 1);
  await eventually('the end of the inbox', async () => (await redis.client.exists(keys.inbox(user))) === 0);
  await mailboxes.lookAtAll();
  await deliver(user, 'o2', 'ann', young);
  await mailboxes.lookAtAll();
  await eventually('the second', () => got.length > 1);
  assert.deepEqual(got, ['o1', 'o2']);
});

test('each device has its own cursor, which only moves forward', async () => {
  const user = nextUser();
  const ids: string[] = [];
  for (let index = 0; index < 5; index++) ids.push((await deliver(user, `m${index}`)).id);
  await inboxes.ack(user, 'phone', ids[2]!);
  await inboxes.ack(user, 'phone', ids[0]!);
  assert.deepEqual((await bind(user, 'c1', { device: 'phone' }))[1], ids[2]);
  assert.deepEqual((await bind(user, 'c2', { device: 'laptop' }))[1], '');
  await inboxes.ack(user, 'laptop', '99999999999999-0'); // beyond the end is the end
  assert.deepEqual((await bind(user, 'c3', { device: 'laptop' }))[1], ids[4]);
  for (let index = 0; index < 50; index++) await inboxes.ack(user, `device-${index}`, ids[3]!);
  const fields = await redis.client.hkeys(keys.cursors(user));
  assert.equal(fields.filter((field) => field.startsWith('d:')).length, 32);
  assert.equal((await bind(user, 'c4', { device: 'laptop' }))[1], ids[4]); // the farthest behind went first
});

test('inbox ids from clients', () => {
  assert.equal(parseInboxId('12-3'), '12-3');
  assert.equal(parseInboxId('12'), '12-0');
  assert.equal(parseInboxId('007-01'), '7-1');
  for (const text of ['', '-', 'x', '1-', '-1', '1-2-3', '1 2', '9'.repeat(20)])
    assert.equal(parseInboxId(text), null, text);
  assert.ok(compareInboxIds('9-0', '10-0') < 0);
  assert.ok(compareInboxIds('10-9', '10-10') < 0);
  assert.ok(compareInboxIds('', '0-0') < 0);
});

test('binding sweeps ghosts, never what is fresh or not known to be gone', async () => {
  const user = nextUser();
  await bind(user, 'ghost', { node: 'n3', live: ['n3'] });
  await bind(user, 'fresh', { node: 'n4', live: ['n3', 'n4'], since: Date.now() });
  await bind(user, 'c1', { live: [] }); // the registry was not read: nobody is a ghost
  assert.deepEqual(await connectionsOf(user), ['c1', 'fresh', 'ghost']);
  await bind(user, 'c2');
  assert.deepEqual(await connectionsOf(user), ['c1', 'c2', 'fresh']);
  assert.ok((await redis.client.pttl(keys.connections(user))) > 0);
});

test('presence counts only connections whose gateway lives, as the same process', async () => {
  const user = nextUser();
  await bind(user, 'c1', { node: 'n1', device: 'phone' });
  await bind(user, 'c2', { node: 'n2', device: 'laptop' });
  const node = (name: string, instance: string, until: number) => ({
    node: name,
    instance,
    until,
    startedAt: 0,
    url: null,
    connections: 1,
  });
  const read = async (...nodes: ReturnType<typeof node>[]) =>
    (await readPresence({ redis, keys }, [user], createLiveNodes(nodes, 1_000)))[0]!
      .map(({ device }) => device)
      .sort();
  assert.deepEqual(await read(node('n1', 'n1-a', 2_000), node('n2', 'n2-a', 2_000)), ['laptop', 'phone']);
  assert.deepEqual(await read(node('n1', 'n1-a', 2_000), node('n2', 'n2-b', 2_000)), ['phone']); // restarted
  assert.deepEqual(await read(node('n1', 'n1-a', 999)), []); // its lease has ended
});

test('newest wins and a bound on devices are decided in one step', async () => {
  const user = nextUser();
  await bind(user, 'c1', { most: -1 });
  const [, , , , replaced] = await bind(user, 'c2', { most: -1 });
  assert.deepEqual(replaced.slice(0, 1), ['c1']);
  assert.deepEqual((await bind(user, 'c2', { most: -1 }))[4], []); // repeated after a lost connection
  assert.deepEqual(await connectionsOf(user), ['c2']);
  // The sweep of the old one's gateway does not bring it back; that of a lost entry does.
  const keep = (connection: string) =>
    redis.script('keep_connection', [keys.connections(user)], [connection, entry('n1'), -1, LIFE_MS]);
  assert.equal(await keep('c1'), 0);
  await redis.client.hdel(keys.connections(user), 'c2');
  assert.equal(await keep('c2'), 1);
  assert.deepEqual(await connectionsOf(user), ['c2']);

  const many = nextUser();
  const outcomes = await Promise.all(
    Array.from({ length: 20 }, (_, index) => bind(many, `c${index}`, { most: 3 })),
  );
  assert.equal(outcomes.filter(([state]) => state === 'bound').length, 3);
  assert.equal((await connectionsOf(many)).length, 3);
});

test('a device that has bound anew is not brought back by the sweep of its old connection', async () => {
  const user = nextUser();
  await bind(user, 'new', { most: 3, device: 'phone', since: 5 });
  const keep = (connection: string, device: string, since: number) => {
    const json = entry('n1', device, since);
    return redis.script('keep_connection', [keys.connections(user)], [connection, json, 3, LIFE_MS, 1]);
  };
  assert.equal(await keep('old', 'phone', 4), 0);
  assert.equal(await keep('laptop', 'laptop', 4), 1);
  assert.equal(await keep('nameless', 'default', 4), 1);
  assert.deepEqual(await connectionsOf(user), ['laptop', 'nameless', 'new']);
});

test('groups are bounded, for the group and for the user', async () => {
  const groups = createGroups({ redis, keys, mostMembers: 3 });
  assert.deepEqual(await groups.add('g1', ['a', 'b']), { size: 2 });
  assert.deepEqual(await groups.add('g1', ['b', 'c']), { size: 3 });
  assert.ok('reason' in (await groups.add('g1', ['d'])));
  assert.deepEqual(await groups.groupsOf('d'), []);
  assert.deepEqual(await groups.groupsOf('c'), ['g1']);
  assert.deepEqual(await groups.remove('g1', ['a', 'c']), { size: 1 });
  assert.deepEqual(await groups.groupsOf('c'), []);
  assert.equal(await groups.has('g1', 'b'), true);
  for (let index = 0; index < 199; index++) await groups.add(`h${index}`, ['b']);
  const full = await groups.add('one-too-many', ['b']);
  assert.ok('reason' in full && /200 groups/.test(full.reason));
  assert.equal(await groups.has('one-too-many', 'b'), false);
  // One who is full keeps all of his step out; who was in the group before stays in it.
  await groups.add('mixed', ['old']);
  assert.ok('reason' in (await groups.add('mixed', ['new', 'b', 'old'])));
  assert.deepEqual([await groups.groupsOf('new'), await groups.groupsOf('old')], [[], ['mixed']]);
});

test('who is in a group is told to members only, at a cost that its size does not change', async () => {
  const groups = createGroups({ redis, keys, mostMembers: 100_000 });
  const crowd = Array.from({ length: 5_000 }, (_, index) => `crowd-${index}`);
  await redis.client.sadd(keys.group('big'), ...crowd);
  await groups.add('small', ['zoe', 'ann', 'ben']);
  const desk = createPeopleDesk({ groups } as never);
  const ask = async (user: string, group: string) => {
    await redis.client.call('CONFIG', 'RESETSTAT');
    const answer = await desk.handle(user, 'd', { type: 'members', group });
    const stats = await redis.client.info('commandstats');
    return { answer, commands: [...stats.matchAll(/cmdstat_(s\w+):/g)].map(([, name]) => name).sort() };
  };
  const outsider = await ask('somebody', 'big');
  assert.ok(outsider.answer?.type === 'error' && outsider.answer.code === 'forbidden');
  assert.deepEqual(outsider.commands, ['sismember']);

  const { answer, commands } = await ask('crowd-1', 'big');
  assert.ok(answer?.type === 'members');
  assert.equal(answer.count, 5_000);
  assert.equal(new Set(answer.userIds).size, 1_000);
  assert.ok(answer.userIds.every((user) => crowd.includes(user)));
  assert.deepEqual(commands, ['scard', 'sismember', 'sscan']);

  const all = { type: 'members', group: 'small', count: 3, userIds: ['ann', 'ben', 'zoe'] };
  assert.deepEqual((await ask('ben', 'small')).answer, all);
});

test('a notice that was not published is published when it is repeated, and only then', async () => {
  let failures = 1;
  const shaky: RedisConnection = {
    ...redis,
    batch: async (commands) =>
      failures-- > 0 ? commands.map(() => [new Error('no'), null]) : redis.batch(commands),
  };
  const look = async () =>
    createLiveNodes(
      [{ node: 'n9', instance: 'a', until: 2_000, startedAt: 0, url: null, connections: 3, users: 2 }],
      1_000,
    );
  const office = createPostOffice({
    redis: shaky,
    keys,
    inboxes,
    live: () => createLiveNodes([], 0),
    look,
    countHere: () => ({ users: 1, connections: 2 }),
    node: 'n1',
  });
  for (const node of ['n1', 'n9']) await redis.client.xadd(keys.replies(node), '*', 'made', 'by its gateway');
  const published = async () => (await redis.client.xlen(keys.replies('n9'))) - 1;
  const notice = { messageId: 'to-all', from: '0', contents: 'hi', sentAt: 5 };
  await assert.rejects(office.toAll(notice), /^Error: no$/);
  assert.equal(await published(), 0);
  const outcome = await office.toAll(notice);
  assert.deepEqual(outcome, { id: '5-0', connections: 5, online: 3, offline: 0 });
  assert.equal(await published(), 1);
  assert.deepEqual(await office.toAll({ ...notice, sentAt: 6 }), outcome);
  assert.equal(await published(), 1);
  assert.ok((await redis.client.pttl(keys.sent('0', 'to-all'))) > 0);
});

test('a notice right after an outage reaches gateways whose leases have run out; an id goes to one set of people', async () => {
  const entry = { instance: 'a', startedAt: 0, url: null, connections: 2 };
  const look = async () =>
    createLiveNodes(
      [
        { ...entry, node: 'just-expired', until: 9_000 },
        { ...entry, node: 'long-gone', until: -60_000 },
      ],
      10_000,
    );
  const [live, countHere] = [() => createLiveNodes([], 0), () => ({ users: 1, connections: 1 })];
  const office = createPostOffice({ redis, keys, inboxes, live, look, countHere, node: 'here' });
  const notice = { messageId: 'late', from: '0', contents: 'hi', sentAt: 5 };
  await assert.rejects(office.toAll(notice), /not every gateway/); // its own stream is not there yet
  const nodes = ['here', 'just-expired', 'long-gone'];
  for (const node of nodes) await redis.client.xadd(keys.replies(node), '*', 'made', 'by its gateway');
  assert.equal((await office.toAll(notice)).online, 3);
  const lengths = await Promise.all(nodes.map((node) => redis.client.xlen(keys.replies(node))));
  assert.deepEqual(lengths, [2, 2, 1]);

  const both = async (name: string) =>
    office.toMany({ group: name }, async () => [], { ...notice, messageId: 'm' });
  assert.deepEqual(await both('g1'), await both('g1'));
  await assert.rejects(both('g2'), { code: 'invalid_frame' });
  const toUsers = (...users: string[]) =>
    office.toMany({ users }, async () => users, { ...notice, messageId: 'm2' });
  assert.deepEqual(await toUsers('20001', '20002'), await toUsers('20002', '20001'), 'in any order');
  await assert.rejects(toUsers('20001'), { code: 'invalid_frame' });
  // As the version before kept it.
  const before = { id: '5-0', connections: 1, online: 1, offline: 0 };
  await redis.client.set(keys.sent('0', 'old'), JSON.stringify(before));
  assert.deepEqual(await office.toAll({ ...notice, messageId: 'old' }), before);
});

test('two gateways are given the same message at once: it is carried out once', async () => {
  const offices = Array.from({ length: 4 }, () =>
    createPostOffice({
      redis,
      keys,
      inboxes,
      live: () => createLiveNodes([], 0),
      look: async () => createLiveNodes([], 0),
      countHere: () => ({ users: 0, connections: 0 }),
      node: 'once',
    }),
  );
  await redis.client.xadd(keys.replies('once'), '*', 'made', 'by its gateway');
  const notice = (index: number) => ({ messageId: 'o1', from: '0', contents: 'hi', sentAt: index });
  const outcomes = await Promise.all(offices.map((office, index) => office.toAll(notice(index))));
  assert.equal(new Set(outcomes.map(({ id }) => id)).size, 1);
  assert.equal(await redis.client.xlen(keys.replies('once')), 2);
  const users = [nextUser(), nextUser()];
  const tries = await Promise.allSettled(
    offices.map((office, index) =>
      office.toMany({ users: [users[index % 2]!] }, async () => [users[index % 2]!], {
        ...notice(index),
        messageId: 'o2',
      }),
    ),
  );
  assert.deepEqual(
    tries.map(({ status }) => status).sort(),
    ['fulfilled', 'fulfilled', 'rejected', 'rejected'],
    'one of the two sets of people, and only that',
  );
  const lengths = await Promise.all(users.map((user) => redis.client.xlen(keys.inbox(user))));
  assert.deepEqual(lengths.sort(), [0, 1]);
});

test('the quota counts a message once, and gives back what failed or was not queued', async () => {
  const store = createGenerationStore({ redis, keys, retentionMs: 60_000 });
  const access = createAccessStore({ redis, keys });
  const user = nextUser();
  const admit = (messageId: string, queueLimit = 100) =>
    store.admit({
      user,
      messageId,
      node: 'n1',
      payload: { contents: 'hi' },
      userActiveLimit: 10,
      quotaPerDay: 2,
      queueLimit,
    });
  const used = async () => (await access.read(user)).usedToday;
  const end = async (messageId: string, type: 'done' | 'failed') => {
    const begun = await store.begin({
      user,
      messageId,
      node: 'n1',
      entry: '1-1',
      owner: 'w',
      maxTries: 5,
      leaseMs: 1_000,
    });
    assert.ok('attempt' in begun);
    const attempt = { user, messageId, attempt: begun.attempt, owner: 'w', entry: '1-1', node: 'n1' };
    const terminal =
      type === 'done'
        ? ({ type, finishReason: 'stop', length: 0 } as const)
        : ({ type, code: 'model_error', message: 'x', temporary: false } as const);
    for (let repeat = 0; repeat < 2; repeat++)
      assert.equal(
        (await store.finish(attempt, null, 1, terminal, { begun: true, textBefore: '' })).state,
        'ended',
      );
  };
  assert.equal((await admit('m1')).state, 'created');
  assert.equal((await admit('m1')).state, 'joined');
  assert.equal(await used(), 1);
  assert.equal((await admit('full', 0)).state, 'created'); // the caller sees that the queue was full
  await store.forget(user, 'full');
  assert.equal(await used(), 1);
  await admit('m2');
  const refused = await admit('m3');
  assert.ok(refused.state === 'refused' && refused.code === 'quota_exhausted');
  assert.ok(refused.retryAfterMs! > 0 && refused.retryAfterMs! <= 86_400_000);
  await end('m1', 'failed');
  assert.equal(await used(), 1, 'given back once');
  await end('m2', 'done');
  assert.equal(await used(), 1);
  assert.equal((await admit('m3')).state, 'created');
  await store.cancel(user, 'm3');
  assert.equal(await used(), 2, 'what was cancelled counts');
  await access.setQuota(user, 0, 'test');
  assert.equal((await admit('m4')).state, 'refused');
  await access.setQuota(user, -1, 'test');
  assert.equal((await admit('m4')).state, 'created');
  await access.setQuota(user, null, 'test');
  assert.equal((await admit('m5')).state, 'refused');
  // Another day: the count begins anew.
  await redis.client.hset(keys.quota(user), 'day', 1);
  assert.equal((await admit('m6')).state, 'created');
  assert.equal(await used(), 1);
  // What begins and fails in one step is given back too, once.
  const atOnce = { user, messageId: 'm6', attempt: 1, owner: 'w', entry: '1-1', node: 'n1' };
  for (let repeat = 0; repeat < 2; repeat++) {
    const terminal = { type: 'failed', code: 'model_error', message: 'x', temporary: false } as const;
    const finished = await store.finish(atOnce, null, 1, terminal, { begun: false, textBefore: '' });
    assert.equal(finished.state, 'ended');
    assert.equal(await used(), 0);
  }
});
