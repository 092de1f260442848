import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { openChat, type TestClient } from '../helpers/chat-client.ts';
import { urlFor } from '../helpers/redis-users.ts';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** The checks at the door: bans, locks, devices, quotas, moderation; and the administrators' command. */

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const run = promisify(execFile);

let stack: Stack;
/** Two gateways where the newest login wins, with a word list. */
let n1: GatewayProcess;
let n2: GatewayProcess;
/** One that lets two devices in, with a moderation hook. */
let n3: GatewayProcess;
let hook: Server;
let hookBehaviour: 'allow' | 'refuse' | 'hang' | 'break' = 'allow';
const asked: { userId: string; texts: string[] }[] = [];
const dir = mkdtempSync(join(tmpdir(), 'rivulet-door-'));
const wordFile = join(dir, 'words.txt');

before(async () => {
  writeFileSync(wordFile, 'forbidden\n');
  hook = createServer((request, response) => {
    let body = '';
    request.on('data', (chunk) => {
      body += chunk;
    });
    request.on('end', () => {
      asked.push(JSON.parse(body));
      if (hookBehaviour === 'hang') return;
      response.statusCode = hookBehaviour === 'break' ? 500 : 200;
      response.end(JSON.stringify({ allow: hookBehaviour === 'allow', message: 'not here' }));
    });
  });
  await new Promise<void>((resolve) => hook.listen(0, '127.0.0.1', resolve));
  stack = await startStack(null, { gateways: 0, workers: 1, workerEnv: { MAX_ATTEMPTS: '1' } });
  const newest = { DEVICE_POLICY: 'newest', MODERATION_WORDS: wordFile, QUOTA_PER_DAY: '3' };
  [n1, n2, n3] = await Promise.all([
    stack.addGateway({ node: 'n1', env: newest }),
    stack.addGateway({ node: 'n2', env: newest }),
    stack.addGateway({
      node: 'n3',
      env: {
        DEVICE_POLICY: '2',
        MODERATION_URL: `http://127.0.0.1:${(hook.address() as AddressInfo).port}/check`,
        MODERATION_TIMEOUT_MS: '1500',
      },
    }),
  ]);
});
const clients: TestClient[] = [];
after(async () => {
  for (const client of clients) client.close();
  hook.closeAllConnections();
  hook.close();
  rmSync(dir, { recursive: true, force: true });
  await stack?.stop(); // last: it fails when the server has denied something
});

let counter = 0;
const nextUser = () => `user-${++counter}`;
const open = async (user: string, gateway: GatewayProcess, init: object = {}): Promise<TestClient> => {
  const client = await openChat(gateway.url, user, init);
  clients.push(client);
  return client;
};
/** A connection that is not let in: its error and its close code. */
async function refused(user: string, gateway: GatewayProcess): Promise<{ error: string; code: number }> {
  const client = await openChat(gateway.url);
  clients.push(client);
  client.send({ type: 'init', userId: user });
  const error = await client.next('error');
  return { error: error.code, code: (await client.closed).code };
}

/** As the operator, unless the server is somebody else's. */
async function users(...args: string[]): Promise<string> {
  const url = process.env.TEST_REDIS_URL ? stack.redisUrl : urlFor('operator', stack.redisUrl);
  const { stdout } = await run(
    process.execPath,
    ['--import', './infra/typescript.mjs', 'infra/users.ts', '--redis', url, '--by', 'tester', ...args],
    { cwd: ROOT },
  );
  return stdout;
}

test('a ban closes the connections on every node, and the door, until it is taken back', async () => {
  const user = nextUser();
  const one = await open(user, n3, { device: 'phone' });
  const two = await open(user, n3, { device: 'laptop' });
  const other = await open(nextUser(), n3);
  await users('ban', user, 'sold', 'spam');
  assert.deepEqual([(await one.closed).code, (await two.closed).code], [4502, 4502]);
  for (const gateway of [n1, n3])
    assert.deepEqual(await refused(user, gateway), { error: 'banned', code: 4502 });
  assert.match(await users('show', user), /banned +yes: sold spam/);
  await users('unban', user);
  await open(user, n2);
  other.send({ type: 'heartbeat' });
  await other.next('heartbeat'); // was not touched
  const audit = await users('audit');
  assert.match(audit, new RegExp(`tester {2}unban ${user}\\n`));
  assert.match(audit, new RegExp(`tester {2}ban ${user} {2}sold spam`));
  assert.equal(await users('audit', '--prefix', 'chat:new:'), 'No decisions.\n');
});

test('the command of administrators does nothing when it is called wrongly', async () => {
  const user = nextUser();
  const wrong: [string[], RegExp][] = [
    [['audit', '0'], /at least one/],
    [['show', user, 'extra', 'words'], /Unexpected argument 'extra'/],
    [['ban', user, '--by', ' '], /--by must name somebody/],
    [['lock', user, '2090-02-31'], /neither a span as 12h nor a date/],
    [['lock', user, '2090-02-30T10:00Z'], /neither a span as 12h nor a date/],
    [['lock', user, 'maybe', '2090'], /neither a span as 12h nor a date/],
  ];
  await Promise.all(wrong.map(([args, says]) => assert.rejects(users(...args), says, args.join(' '))));
  assert.doesNotMatch(await users('audit'), new RegExp(`${user}\\b`));
  assert.equal(await users('audit', '--prefix', 'chat:nobody:'), 'No decisions.\n');
  const locked = await users('lock', user, '2092-02-29T23:00:30-02:00');
  assert.match(locked, /is locked until 2092-03-01T01:00:30.000Z/);
});

test('a lock ends by itself', async () => {
  const user = nextUser();
  const one = await open(user, n1);
  await users('lock', user, '1h');
  assert.equal((await one.closed).code, 4502);
  assert.deepEqual(await refused(user, n2), { error: 'locked', code: 4502 });
  // As after the hour.
  await stack.look.client.hset(stack.keys.access(user), 'lockedUntil', Date.now() - 1);
  const back = await open(user, n2);
  await users('lock', user, '7d');
  await back.closed;
  await users('unlock', user);
  await open(user, n1);
  await assert.rejects(users('lock', user, 'yesterday'), /neither a span/);
  await assert.rejects(users('frobnicate', user), /there is no command/);
});

test('a missed order to close is noticed by the sweep', async () => {
  const user = nextUser();
  const one = await open(user, n1);
  await stack.look.client.hset(stack.keys.access(user), 'banned', 'quietly');
  assert.equal((await one.closed).code, 4502);
});

test('newest wins: the older connection is closed 4010, on whatever node', async () => {
  const user = nextUser();
  const old = await open(user, n1);
  const newer = await open(user, n2);
  assert.equal((await old.closed).code, 4010);
  newer.send({ type: 'presence', userIds: [user, 'nobody'] });
  const there = await newer.next('presence');
  assert.deepEqual(there.userIds, [user, 'nobody']);
  assert.equal(there.online[user]!.length, 1);
  const newestOf = await open(user, n2);
  assert.equal((await newer.closed).code, 4010);
  newestOf.send({ type: 'heartbeat' });
  await newestOf.next('heartbeat');
});

test('at most two devices; one that reconnects takes its own place', async () => {
  const user = nextUser();
  const phone = await open(user, n3, { device: 'phone' });
  const laptop = await open(user, n3, { device: 'laptop' });
  assert.deepEqual(await refused(user, n3), { error: 'forbidden', code: 4003 });
  const again = await open(user, n3, { device: 'phone' });
  assert.equal((await phone.closed).code, 4010);
  laptop.close();
  await laptop.closed;
  for (;;) {
    again.send({ type: 'presence', userIds: [user] });
    if ((await again.next('presence')).online[user]!.length === 1) break;
  }
  await open(user, n3, { device: 'tablet' });
});

test('the quota counts a message once, gives back what failed, and may be set for a user', async () => {
  const user = nextUser();
  const client = await open(user, n1);
  const ask = (messageId: string, parameters: object = { tokens: 1 }) =>
    client.send({ type: 'chat', messageId, contents: 'hi', parameters });
  ask('q1');
  await client.answer('q1');
  ask('q1'); // joined, not counted
  await client.next('accepted', 'q1');
  ask('q2', { tokens: 2, failAttempts: 9 });
  assert.equal((await client.answer('q2')).end.type, 'failed');
  ask('q3');
  await client.answer('q3');
  ask('q4');
  await client.answer('q4'); // the third that counts
  ask('q5');
  const rejected = await client.next('rejected', 'q5');
  assert.equal(rejected.code, 'quota_exhausted');
  assert.ok(rejected.retryAfterMs! > 0 && rejected.retryAfterMs! <= 86_400_000);
  assert.match(await users('show', user), /counted today: 3/);
  await users('quota', user, '4');
  ask('q6', { tokens: 500, intervalMs: 20 });
  await client.next('accepted', 'q6');
  client.send({ type: 'cancel', messageId: 'q6' });
  await client.answer('q6');
  ask('q7'); // what was cancelled stays counted
  assert.equal((await client.next('rejected', 'q7')).code, 'quota_exhausted');
  await users('quota', user, 'unlimited');
  ask('q8');
  await client.answer('q8');
  await users('quota', user, 'default');
  ask('q9');
  assert.equal((await client.next('rejected', 'q9')).code, 'quota_exhausted');
});

test('the word list refuses before anything is queued, and is read again when it changes', async () => {
  const client = await open(nextUser(), n1);
  const send = (messageId: string, contents: string) =>
    client.send({ type: 'send', messageId, to: { user: 'somebody' }, contents });
  client.send({ type: 'chat', messageId: 'w1', contents: 'FORBIDDEN fruit' });
  assert.equal((await client.next('rejected', 'w1')).code, 'content_refused');
  client.send({
    type: 'chat',
    messageId: 'w2',
    contents: 'go on',
    history: [{ role: 'user', content: 'forbidden' }],
  });
  assert.equal((await client.next('rejected', 'w2')).code, 'content_refused');
  send('w3', 'forbidden');
  assert.equal((await client.next('rejected', 'w3')).code, 'content_refused');
  send('w4', 'fine, unforbidden');
  await client.next('sent', 'w4');
  writeFileSync(wordFile, 'fine\n');
  await n1.logged(
    (line) =>
      line.msg === 'word list loaded' &&
      n1.logs.indexOf(line) > 0 &&
      line !== n1.logs.find((first) => first.msg === 'word list loaded'),
  );
  send('w5', 'fine');
  assert.equal((await client.next('rejected', 'w5')).code, 'content_refused');
  send('w6', 'forbidden');
  await client.next('sent', 'w6');
  rmSync(wordFile); // an unreadable file leaves the list in force
  send('w7', 'fine');
  assert.equal((await client.next('rejected', 'w7')).code, 'content_refused');
});

test('the moderation hook decides, and its failure is closed by default', async () => {
  const user = nextUser();
  const client = await open(user, n3);
  const ask = (messageId: string) =>
    client.send({ type: 'chat', messageId, contents: `hi ${messageId}`, parameters: { tokens: 1 } });
  hookBehaviour = 'allow';
  ask('h1');
  await client.answer('h1');
  assert.deepEqual(asked.at(-1)!.texts, ['hi h1']);
  assert.equal(asked.at(-1)!.userId, user);
  hookBehaviour = 'refuse';
  ask('h2');
  const refusal = await client.next('rejected', 'h2');
  assert.deepEqual([refusal.code, refusal.message], ['content_refused', 'not here']);
  assert.equal(refusal.temporary, false);
  for (const behaviour of ['hang', 'break'] as const) {
    hookBehaviour = behaviour;
    ask(`h-${behaviour}`);
    client.send({ type: 'send', messageId: `s-${behaviour}`, to: { user: 'somebody' }, contents: 'hi' });
    for (const messageId of [`h-${behaviour}`, `s-${behaviour}`]) {
      const failed = await client.next('rejected', messageId);
      assert.deepEqual([failed.code, failed.temporary], ['content_refused', true]);
      assert.ok(failed.retryAfterMs);
    }
  }
  hookBehaviour = 'allow';
  ask('h5');
  await client.answer('h5');
});

test('what was accepted is joined although it would be refused now, and its stream goes on', async () => {
  const user = nextUser();
  const one = await open(user, n3, { device: 'phone' });
  const two = await open(user, n3, { device: 'laptop' });
  const question = {
    type: 'chat',
    messageId: 'j1',
    contents: 'hi',
    parameters: { tokens: 150, intervalMs: 10 },
  };
  hookBehaviour = 'allow';
  one.send(question);
  await one.next('token', 'j1');
  hookBehaviour = 'refuse';
  for (const client of [one, two]) {
    client.send(question);
    assert.equal((await client.next('accepted', 'j1')).position, 0);
    assert.equal((await client.next('resumed', 'j1')).status, 'running');
  }
  for (const client of [one, two]) {
    const { text, end } = await client.answer('j1');
    assert.equal(end.type, 'done');
    assert.equal(text.split(' ').length, 150);
  }
  two.send({ ...question, messageId: 'j2' });
  assert.equal((await two.next('rejected', 'j2')).code, 'content_refused');
  hookBehaviour = 'allow';
});

test('settings that cannot be are named at the start', async () => {
  await assert.rejects(
    stack.addGateway({ node: 'bad', env: { MODERATION_WORDS: join(dir, 'no-such-file') } }),
    /MODERATION_WORDS/,
  );
});
