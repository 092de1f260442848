import assert from 'node:assert/strict';
import { before, test } from 'node:test';
import type { ServerFrameOf } from '../../shared/protocol.ts';
import { openChat, type TestClient } from '../helpers/chat-client.ts';
import { eventually } from '../helpers/eventually.ts';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** Messages between people over three gateways: direct, inbox, groups, presence, notices. */

let stack: Stack;
let n1: GatewayProcess;
let n2: GatewayProcess;
let n3: GatewayProcess;

before(async (t) => {
  stack = await startStack(t as never, {
    gateways: 3,
    workers: 0,
    gatewayEnv: { INBOX_MESSAGES: '120' },
  });
  [n1, n2, n3] = stack.gateways as [GatewayProcess, GatewayProcess, GatewayProcess];
});

let counter = 0;
const nextUser = () => `user-${++counter}`;

const open = async (user: string, gateway = n1, init: object = {}): Promise<TestClient> => {
  const client = await openChat(gateway.url, user, init);
  clients.push(client);
  return client;
};
const clients: TestClient[] = [];
test.after(() => {
  for (const client of clients) client.close();
});

const messages = (client: TestClient): ServerFrameOf<'message'>[] =>
  client.frames.filter((frame) => frame.type === 'message');

/** Messages with these contents, in order, and nothing else. */
async function receives(client: TestClient, contents: string[]): Promise<ServerFrameOf<'message'>[]> {
  const got: ServerFrameOf<'message'>[] = [];
  while (got.length < contents.length) got.push(await client.next('message'));
  assert.deepEqual(
    got.map((frame) => frame.contents),
    contents,
  );
  return got;
}

test('a direct message reaches every device of the recipient on whatever node, once, under one id', async () => {
  const [ann, ben] = [nextUser(), nextUser()];
  const sender = await open(ann, n1);
  const phone = await open(ben, n2, { device: 'phone' });
  const laptop = await open(ben, n3, { device: 'laptop' });
  sender.send({ type: 'send', messageId: 'd1', to: { user: ben }, contents: 'hello ✓ "quoted"' });
  const sent = await sender.next('sent', 'd1');
  assert.equal(sent.online, 2);
  const one = await phone.next('message', 'd1');
  const two = await laptop.next('message', 'd1');
  assert.deepEqual(one, two);
  assert.deepEqual(
    { ...one, sentAt: 0 },
    { type: 'message', id: sent.id, messageId: 'd1', from: ann, contents: 'hello ✓ "quoted"', sentAt: 0 },
  );
  assert.equal('group' in one, false);

  // The same messageId again: the same answer, and nobody gets it twice.
  sender.send({ type: 'send', messageId: 'd1', to: { user: ben }, contents: 'hello ✓ "quoted"' });
  assert.deepEqual(await sender.next('sent', 'd1'), sent);
  sender.send({ type: 'send', messageId: 'd2', to: { user: ben }, contents: 'after' });
  await phone.next('message', 'd2');
  await laptop.next('message', 'd2');
  assert.equal(messages(phone).length, 2);
  assert.equal(messages(laptop).length, 2);
});

test('what comes while offline waits in the inbox, in order, page after page, then goes on live', async () => {
  const [ann, ben] = [nextUser(), nextUser()];
  const sender = await open(ann, n1);
  const contents = Array.from({ length: 110 }, (_, index) => `message ${index}`); // more than two pages
  for (const [index, text] of contents.entries()) {
    sender.send({ type: 'send', messageId: `m${index}`, to: { user: ben }, contents: text });
    assert.equal((await sender.next('sent', `m${index}`)).online, 0);
  }
  const reader = await open(ben, n2, { device: 'phone' });
  // Messages that are sent while the inbox is being read come after it, once.
  for (let index = 0; index < 10; index++)
    sender.send({ type: 'send', messageId: `live${index}`, to: { user: ben }, contents: `live ${index}` });
  const got = await receives(reader, [
    ...contents,
    ...Array.from({ length: 10 }, (_, index) => `live ${index}`),
  ]);
  await sender.next('sent', 'live9');
  assert.equal(messages(reader).length, 120);

  // Acknowledged by one device: it gets only what is new; another device gets everything.
  reader.send({ type: 'ack', id: got[99]!.id });
  reader.send({ type: 'presence', userIds: [ben] }); // handled after the ack
  await reader.next('presence');
  reader.close();
  const again = await open(ben, n3, { device: 'phone' });
  await receives(again, [
    ...contents.slice(100),
    ...Array.from({ length: 10 }, (_, index) => `live ${index}`),
  ]);
  const laptop = await open(ben, n1, { device: 'laptop' });
  assert.equal((await laptop.next('message')).contents, 'message 0');
  // An explicit place overrides the cursor; one beyond the end means the end.
  const late = await open(ben, n2, { device: 'phone', inboxAfter: got[117]!.id });
  await receives(late, ['live 8', 'live 9']);
  const future = await open(ben, n2, { device: 'phone', inboxAfter: '99999999999999-0' });
  sender.send({ type: 'send', messageId: 'last', to: { user: ben }, contents: 'last' });
  await receives(future, ['last']);
  assert.equal(messages(future).length, 1);
});

test('an inbox that overflows says so, once, and delivers what is left', async () => {
  const [ann, ben] = [nextUser(), nextUser()];
  const sender = await open(ann, n1);
  for (let index = 0; index < 125; index++)
    sender.send({ type: 'send', messageId: `m${index}`, to: { user: ben }, contents: `${index}` });
  await sender.next('rejected'); // more frames than may wait for an answer
  const answered = () => sender.frames.filter(({ type }) => type === 'sent' || type === 'rejected').length;
  await eventually('an answer to each, so that none waits', () => answered() === 125);
  // What was rejected is sent again, one at a time, on a connection that has seen no answers yet.
  const again = await open(ann, n1);
  for (let index = 0; index < 125; index++) {
    again.send({ type: 'send', messageId: `m${index}`, to: { user: ben }, contents: `${index}` });
    await again.next('sent', `m${index}`);
  }
  const reader = await open(ben, n2);
  const dropped = await reader.next('inbox');
  assert.equal(dropped.dropped, true);
  const all = new Set<string>(); // which of them are the oldest depends on which had to be sent again
  while (all.size < 120) all.add((await reader.next('message')).contents);
  assert.equal(messages(reader).length, 120);
  assert.equal(reader.frames.filter((frame) => frame.type === 'inbox').length, 1);
  assert.ok(reader.frames.findIndex((frame) => frame.type === 'inbox') < 3, 'before the messages');
});

test('presence names the connections of each user, and forgets them when they close', async () => {
  const [ann, ben, eve] = [nextUser(), nextUser(), nextUser()];
  const asker = await open(ann, n1);
  const phone = await open(ben, n2, { device: 'phone' });
  await open(ben, n3, { device: 'laptop' });
  const ask = async () => {
    asker.send({ type: 'presence', userIds: [ben, eve] });
    return (await asker.next('presence')).online;
  };
  const online = await ask();
  assert.deepEqual(Object.keys(online), [ben]);
  assert.deepEqual(
    online[ben]!.sort((a, b) => (a.node < b.node ? -1 : 1)),
    [
      { device: 'phone', node: 'n2' },
      { device: 'laptop', node: 'n3' },
    ],
  );
  // A reconnect before the old socket is gone: the close of the old one leaves the new one's entry.
  await open(ben, n2, { device: 'phone' });
  assert.equal((await ask())[ben]!.length, 3);
  phone.close();
  while ((await ask())[ben]!.length !== 2);
  assert.deepEqual((await ask())[ben]!.map((entry) => entry.device).sort(), ['laptop', 'phone']);
});

test('whatever a user is called, presence names them', async () => {
  const odd = ['__proto__', 'constructor', 'toString'];
  for (const user of odd) await open(user);
  const asking = await open(nextUser());
  asking.send({ type: 'presence', userIds: odd });
  const { online } = await asking.next('presence');
  assert.deepEqual(Object.keys(online), odd);
});

test('a group: members only, offline ones get it later, joining and leaving', async () => {
  const [ann, ben, eve] = [nextUser(), nextUser(), nextUser()];
  const sender = await open(ann, n1);
  const member = await open(ben, n2);
  const outsider = await open(eve, n3);
  for (const [index, client] of [sender, member].entries()) {
    client.send({ type: 'join', group: 'g1' });
    assert.deepEqual(await client.next('joined'), { type: 'joined', group: 'g1', members: index + 1 });
  }
  sender.send({ type: 'send', messageId: 'g-1', to: { group: 'g1' }, contents: 'hi all' });
  assert.equal((await sender.next('sent', 'g-1')).online, 1);
  assert.equal((await member.next('message', 'g-1')).group, 'g1');
  outsider.send({ type: 'send', messageId: 'g-2', to: { group: 'g1' }, contents: 'spam' });
  assert.equal((await outsider.next('rejected', 'g-2')).code, 'forbidden');
  outsider.send({ type: 'members', group: 'g1' });
  assert.equal((await outsider.next('error')).code, 'forbidden');

  member.close();
  sender.send({ type: 'send', messageId: 'g-3', to: { group: 'g1' }, contents: 'later' });
  await sender.next('sent', 'g-3');
  const back = await open(ben, n3);
  await receives(back, ['hi all', 'later']); // nothing was acknowledged
  back.send({ type: 'groups' });
  assert.deepEqual((await back.next('groups')).groups, ['g1']);
  back.send({ type: 'members', group: 'g1' });
  assert.deepEqual((await back.next('members')).userIds, [ann, ben].sort());
  back.send({ type: 'leave', group: 'g1' });
  await back.next('left');
  back.send({ type: 'groups' });
  assert.deepEqual((await back.next('groups')).groups, []);
  sender.send({ type: 'send', messageId: 'g-4', to: { group: 'g1' }, contents: 'alone' });
  assert.equal((await sender.next('sent', 'g-4')).online, 0);
  sender.send({ type: 'send', messageId: 'd-5', to: { user: ben }, contents: 'direct' });
  assert.equal((await back.next('message')).contents, 'direct');
});

test('what cannot be sent is rejected by name', async () => {
  const sender = await open(nextUser(), n1);
  sender.send({ type: 'send', messageId: 'r1', to: { user: '77' }, contents: 'x' });
  const reserved = await sender.next('rejected', 'r1');
  assert.equal(reserved.code, 'invalid_frame');
  assert.match(reserved.message, /to\.user.*reserved/);
  sender.send({ type: 'send', messageId: 'r2', to: { user: 'someone' }, contents: 'x'.repeat(16_385) });
  assert.equal((await sender.next('rejected', 'r2')).code, 'payload_too_large');
  sender.send({ type: 'send', messageId: 'r3', to: { user: 'someone' } });
  assert.match((await sender.next('rejected', 'r3')).message, /contents/);
  sender.send({ type: 'ack', id: 'nonsense' });
  assert.equal((await sender.next('error')).code, 'invalid_frame');
});

test('a group message to 5,000 members on 3 nodes makes 3 reply entries', async () => {
  const users = Array.from({ length: 5_000 }, (_, index) => `member-${index}`);
  const { look, keys } = stack;
  for (let from = 0; from < users.length; from += 1_000)
    await look.client.sadd(keys.group('town'), ...users.slice(from, from + 1_000));
  // 60 of them are online, 20 on each node; the others are not.
  const online = await Promise.all(
    Array.from({ length: 60 }, (_, index) => open(users[index]!, stack.gateways[index % 3]!)),
  );
  const sender = online[0]!;
  const added = async () =>
    Promise.all(
      stack.gateways.map(async ({ node }) => {
        const facts = (await look.client.xinfo('STREAM', keys.replies(node))) as unknown[];
        return Number(facts[facts.indexOf('entries-added') + 1]);
      }),
    );
  const before = await added();
  const startedAt = performance.now();
  sender.send({ type: 'send', messageId: 'town-1', to: { group: 'town' }, contents: 'to all of you' });
  const sent = await sender.next('sent', 'town-1');
  const tookMs = performance.now() - startedAt;
  assert.equal(sent.online, 59);
  await Promise.all(online.slice(1).map((client) => client.next('message', 'town-1')));
  const after = await added();
  assert.deepEqual(
    after.map((count, index) => count - before[index]!),
    [1, 1, 1],
  );
  console.log(`5,000 inboxes and 3 entries in ${Math.round(tookMs)} ms`);
  assert.equal(await look.client.xlen(keys.inbox('member-4999')), 1);
  // Repeated, it is answered from its outcome.
  sender.send({ type: 'send', messageId: 'town-1', to: { group: 'town' }, contents: 'to all of you' });
  assert.deepEqual(await sender.next('sent', 'town-1'), sent);
  assert.deepEqual(await added(), after);
  assert.equal(await look.client.xlen(keys.inbox('member-4999')), 1);
});

test('a live entry that is lost is found in the inbox', async () => {
  const [ann, ben] = [nextUser(), nextUser()];
  const sender = await open(ann, n1);
  const reader = await open(ben, n2);
  sender.send({ type: 'send', messageId: 'l1', to: { user: ben }, contents: 'one' });
  await reader.next('message', 'l1');
  const { look, keys } = stack;
  // An append whose live entry never came: the sender's gateway died in between. The sweep finds it,
  await look.client.xadd(
    keys.inbox(ben),
    '*',
    'm',
    JSON.stringify({ messageId: 'l2', from: ann, contents: 'two', sentAt: 1 }).slice(1),
  );
  await reader.next('message', 'l2');
  // and so does the next message.
  await look.client.xadd(
    keys.inbox(ben),
    '*',
    'm',
    JSON.stringify({ messageId: 'l3', from: ann, contents: 'three', sentAt: 1 }).slice(1),
  );
  sender.send({ type: 'send', messageId: 'l4', to: { user: ben }, contents: 'four' });
  await receives(reader, ['three', 'four']);
  assert.equal(messages(reader).length, 4);
});

test('a client that does not read costs nothing, and gets everything in order when it does', async () => {
  const [ann, ben] = [nextUser(), nextUser()];
  const sender = await open(ann, n1);
  const reader = await open(ben, n2);
  reader.socket.pause();
  const contents = Array.from({ length: 100 }, (_, index) => `${index} ${'x'.repeat(16_000)}`);
  for (const [index, text] of contents.entries()) {
    sender.send({ type: 'send', messageId: `big${index}`, to: { user: ben }, contents: text });
    await sender.next('sent', `big${index}`);
  }
  reader.socket.resume();
  await receives(reader, contents);
  assert.equal(messages(reader).length, 100);
});

test('a gateway that crashes leaves no ghosts beyond its lease; what was sent meanwhile is not lost', async () => {
  const [ann, ben] = [nextUser(), nextUser()];
  const doomed = await stack.addGateway({ node: 'doomed' });
  const sender = await open(ann, n1);
  const reader = await open(ben, doomed);
  sender.send({ type: 'send', messageId: 'c1', to: { user: ben }, contents: 'one' });
  assert.equal((await sender.next('sent', 'c1')).online, 1);
  const [got] = await receives(reader, ['one']);
  await doomed.kill('SIGKILL');
  sender.send({ type: 'send', messageId: 'c2', to: { user: ben }, contents: 'two' });
  await sender.next('sent', 'c2');
  const startedAt = Date.now();
  for (;;) {
    sender.send({ type: 'presence', userIds: [ben] });
    if ((await sender.next('presence')).online[ben] === undefined) break;
    assert.ok(Date.now() - startedAt < 30_000, 'a ghost');
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  sender.send({ type: 'send', messageId: 'c3', to: { user: ben }, contents: 'three' });
  assert.equal((await sender.next('sent', 'c3')).online, 0);
  await receives(await open(ben, n3, { inboxAfter: got!.id }), ['two', 'three']);
});
