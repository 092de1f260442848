import assert from 'node:assert/strict';
import { before, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { z } from 'zod';
import { openChat, type TestClient } from '../helpers/chat-client.ts';
import { eventually } from '../helpers/eventually.ts';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** The HTTP API for other systems, over two gateways, and its description. */

// biome-ignore lint/suspicious/noExplicitAny: answers are checked by what is asserted
type Json = any;

let stack: Stack;
let n1: GatewayProcess;
let n2: GatewayProcess;
const KEY = 'key-one-of-two';

before(async (t) => {
  stack = await startStack(t as never, {
    gateways: 2,
    workers: 0,
    gatewayEnv: { API_KEYS: `other,${KEY}`, MESSAGE_USERS: '5', GROUP_JOINS: 'closed' },
  });
  [n1, n2] = stack.gateways as [GatewayProcess, GatewayProcess];
});

const clients: TestClient[] = [];
test.after(() => {
  for (const client of clients) client.close();
});
const open = async (user: string, gateway = n1): Promise<TestClient> => {
  const client = await openChat(gateway.url, user);
  clients.push(client);
  return client;
};

async function call(
  path: string,
  body: unknown,
  options: { key?: string | null; gateway?: GatewayProcess } = {},
): Promise<{ status: number; body: Json }> {
  const { key = KEY, gateway = n1 } = options;
  const response = await fetch(gateway.http + path, {
    method: 'POST',
    headers: key === null ? {} : { authorization: `Bearer ${key}` },
    body: typeof body === 'string' ? body : JSON.stringify(body),
  });
  return { status: response.status, body: await response.json() };
}
const send = (body: unknown, options = {}) => call('/v1/messages', body, options);

test('a message to one user: online or not, once for each messageId', async () => {
  const ben = await open('ben', n2);
  const first = await send({ to: { user: 'ben' }, contents: 'shipped', messageId: 'order-1' });
  assert.equal(first.status, 202);
  assert.deepEqual({ ...first.body, id: '' }, { id: '', messageId: 'order-1', online: 1, offline: 0 });
  const got = await ben.next('message');
  assert.deepEqual({ ...got, sentAt: 0 }, {
    type: 'message',
    id: first.body.id,
    messageId: 'order-1',
    from: '0',
    contents: 'shipped',
    sentAt: 0,
  } as typeof got);
  const again = await send(
    { to: { user: 'ben' }, contents: 'shipped', messageId: 'order-1' },
    { gateway: n2 },
  );
  assert.deepEqual(again, first);
  // To another person it is another message.
  const other = await send({ to: { user: 'cy' }, contents: 'shipped', messageId: 'order-1' });
  assert.deepEqual([other.status, other.body.offline], [202, 1]);
  const offline = await send({ to: { user: 20_077 }, contents: 'hello' });
  assert.equal(offline.body.offline, 1);
  const late = await open('20077', n2);
  assert.equal((await late.next('message')).contents, 'hello');
  await send({ to: { user: 'ben' }, contents: 'last' });
  assert.equal((await ben.next('message')).contents, 'last');
  assert.equal(ben.frames.filter((frame) => frame.type === 'message').length, 2);
});

test('to several, to a group, to all', async () => {
  const [ann, eve] = [await open('ann', n1), await open('eve', n2)];
  const several = await send({ to: { users: ['ann', 'eve', 'zoe'] }, contents: 'hi', messageId: 's1' });
  assert.deepEqual([several.status, several.body.online, several.body.offline], [202, 2, 1]);
  assert.deepEqual(
    (await send({ to: { users: ['ann', 'eve', 'zoe'] }, contents: 'hi', messageId: 's1' })).body,
    several.body,
  );
  for (const client of [ann, eve]) assert.equal((await client.next('message')).messageId, 's1');

  assert.equal((await send({ to: { group: 'team' }, contents: 'x' })).status, 404);
  const added = await call('/v1/groups/members', { group: 'team', add: ['ann', 'zoe'] });
  assert.deepEqual(added, { status: 200, body: { group: 'team', count: 2 } });
  const group = await send({ to: { group: 'team' }, contents: 'stand-up' });
  assert.deepEqual([group.body.online, group.body.offline], [1, 1]);
  assert.equal((await ann.next('message')).group, 'team');
  ann.send({ type: 'send', messageId: 'g1', to: { group: 'team' }, contents: 'coming' });
  await ann.next('sent', 'g1');
  ann.send({ type: 'join', group: 'other' }); // closed here: operators manage groups
  assert.equal((await ann.next('error')).code, 'forbidden');
  const changed = await call('/v1/groups/members', { group: 'team', remove: ['ann'] });
  assert.equal(changed.body.count, 1);
  const listed = await fetch(`${n2.http}/v1/groups/members?group=team`, {
    headers: { authorization: `Bearer ${KEY}` },
  });
  assert.deepEqual(await listed.json(), { group: 'team', count: 1, userIds: ['zoe'] });

  const counts = async () =>
    Promise.all(
      stack.gateways.map(async ({ node }) => {
        const facts = (await stack.look.client.xinfo('STREAM', stack.keys.replies(node))) as unknown[];
        return Number(facts[facts.indexOf('entries-added') + 1]);
      }),
    );
  const before = await counts();
  const all = await send({ to: { all: true }, contents: 'maintenance', messageId: 'n1' });
  assert.equal(all.status, 202);
  assert.equal(all.body.offline, 0);
  assert.equal((await send({ to: { all: true }, contents: 'maintenance', messageId: 'n1' })).status, 202);
  for (const client of [ann, eve]) {
    const notice = await client.next('notice');
    assert.deepEqual([notice.contents, notice.messageId], ['maintenance', 'n1']);
  }
  assert.deepEqual(
    (await counts()).map((count, index) => count - before[index]!),
    [1, 1],
  );
});

test('a notice is counted in users, on other gateways too', async () => {
  const online = async () => (await send({ to: { all: true }, contents: 'x' })).body.online as number;
  const open2 = () =>
    clients.filter(({ socket }) => socket.readyState === 1 && socket.url.startsWith(n2.url)).length;
  /** n2 has told the registry of all its connections, and n1 has read that: what it counts stands still. */
  const settled = async () => {
    await eventually('news of all connections', async () => {
      const facts = JSON.parse((await stack.look.client.hget(stack.keys.nodes(), n2.node))!);
      return facts.connections === open2();
    });
    await delay(2_500); // above the two seconds in which it is read again
    return online();
  };
  const before = await settled();
  for (let device = 0; device < 2; device++) await open('bob', n2);
  assert.equal(await settled(), before + 1);
});

test('mistakes are answered by name', async () => {
  const cases: [unknown, number, string, RegExp][] = [
    ['{', 400, 'invalid_frame', /JSON/],
    [[], 400, 'invalid_frame', /object/],
    [{ contents: 'x' }, 400, 'invalid_frame', /to is missing/],
    [{ to: {}, contents: 'x' }, 400, 'invalid_frame', /user, users, group, all/],
    [{ to: { user: 'a', group: 'g' }, contents: 'x' }, 400, 'invalid_frame', /one of user/],
    [{ to: { user: 'a b' }, contents: 'x' }, 400, 'invalid_frame', /to\.user/],
    [{ to: { user: '17' }, contents: 'x' }, 400, 'invalid_frame', /to\.user.*reserved/],
    [{ to: { users: ['a', 'b c'] }, contents: 'x' }, 400, 'invalid_frame', /to\.users\.1/],
    [{ to: { users: [] }, contents: 'x' }, 400, 'invalid_frame', /users/],
    [{ to: { all: false }, contents: 'x' }, 400, 'invalid_frame', /all/],
    [{ to: { users: ['a', 'b', 'a'] }, contents: 'x' }, 400, 'duplicate_recipient', /to\.users\.2: a/],
    [{ to: { users: ['20001', 20001] }, contents: 'x' }, 400, 'duplicate_recipient', /20001/],
    [{ to: { users: ['a', 'b', 'c', 'd', 'e', 'f'] }, contents: 'x' }, 413, 'payload_too_large', /5 users/],
    [{ to: { user: 'a' } }, 400, 'invalid_frame', /contents/],
    [{ to: { user: 'a' }, contents: '' }, 400, 'invalid_frame', /contents/],
    [{ to: { user: 'a' }, contents: 'x'.repeat(16_385) }, 413, 'payload_too_large', /16384/],
    [' '.repeat(1_048_577), 413, 'payload_too_large', /A request body may have 1048576 bytes/],
    [{ to: { user: 'a' }, contents: 'x', messageId: 'no spaces' }, 400, 'invalid_frame', /messageId/],
    [{ to: { user: 'a' }, contents: 'x', colour: 1 }, 400, 'invalid_frame', /colour/],
  ];
  for (const [body, status, code, message] of cases) {
    const answer = await send(body);
    const what = JSON.stringify(body).slice(0, 100);
    assert.equal(answer.status, status, what);
    assert.equal(answer.body.error.code, code, what);
    assert.match(answer.body.error.message, message, what);
  }
  for (const key of [null, '', 'wrong', `${KEY}x`, 'other,key-one-of-two'])
    assert.equal((await send({ to: { user: 'a' }, contents: 'x' }, { key })).status, 401, String(key));
  assert.equal((await fetch(`${n1.http}/v1/messages`)).status, 405);
});

test('without API keys the HTTP API is off, and says so', async () => {
  const off = await stack.addGateway({ node: 'n9', env: { API_KEYS: '' } });
  const answer = await send({ to: { user: 'a' }, contents: 'x' }, { gateway: off });
  assert.equal(answer.status, 404);
  assert.match(answer.body.error.message, /HTTP API is off/);
  await off.kill('SIGTERM');
});

test('the OpenAPI description: its examples and our answers fit its schemas', async () => {
  const description = (await (await fetch(`${n1.http}/openapi.json`)).json()) as Json;
  assert.equal(description.openapi, '3.1.0');
  const schemas: Record<string, z.ZodType> = {};
  for (const [name, schema] of Object.entries(description.components.schemas))
    schemas[name] = z.fromJSONSchema(schema as never);
  let checked = 0;
  const check = (body: Json) => {
    for (const { schema, examples } of Object.values(body.content ?? {}) as Json[]) {
      const type = schemas[schema.$ref.replace('#/components/schemas/', '')]!;
      for (const [name, example] of Object.entries(examples) as [string, Json][]) {
        assert.ok(type.safeParse(example.value).success, `${schema.$ref} ${name}`);
        checked++;
      }
    }
  };
  for (const [path, methods] of Object.entries(description.paths) as [string, Json][])
    for (const [method, operation] of Object.entries(methods) as [string, Json][]) {
      assert.ok(operation.operationId && operation.summary, `${method} ${path}`);
      if (operation.requestBody) check(operation.requestBody);
      for (const response of Object.values(operation.responses)) check(response);
      const answer = await fetch(n1.http + path, {
        method: method.toUpperCase(),
        body: method === 'get' ? undefined : '{}',
      });
      assert.equal(answer.status, 401, `${method} ${path} is there, and guarded`);
      assert.ok(schemas.Error!.safeParse(await answer.json()).success);
    }
  assert.ok(checked > 15);
  // The described examples work, and the answers are what is described.
  const { examples } = description.paths['/v1/messages'].post.requestBody.content['application/json'];
  for (const name of ['user', 'users', 'all']) {
    const answer = await send(examples[name].value);
    assert.equal(answer.status, 202, name);
    assert.ok(schemas.MessageAnswer!.safeParse(answer.body).success, name);
  }
  assert.equal(
    schemas.MessageRequest!.safeParse({ to: { user: 'a', users: ['b'] }, contents: 'x' }).success,
    false,
  );
});
