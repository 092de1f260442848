import assert from 'node:assert/strict';
import { createServer, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, before, type TestContext, test } from 'node:test';
import {
  DefaultChatTransport,
  readUIMessageStream,
  type UIMessage,
  type UIMessageChunk,
  WebSocketChatTransport,
} from 'ai';
import { WebSocket } from 'ws';
import { createAccessStore } from '../../shared/access.ts';
import { eventually } from '../helpers/eventually.ts';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** The AI SDK's own transports, WebSocket and HTTP, on a real stack of two gateways. */

let stack: Stack;
before(async () => {
  stack = await startStack(null, {
    gateways: 2,
    workers: 2,
    env: { LEASE_MS: '1500', RETRY_BASE_MS: '20', COMPACT_AFTER_MS: '0' },
  });
});
after(() => stack.stop());

const user = (id: string, text: string): UIMessage => ({ id, role: 'user', parts: [{ type: 'text', text }] });
const parameters = (tokens: number, intervalMs = 5, more: object = {}) => ({
  parameters: { tokens, intervalMs, seed: 1, ...more },
});

type Transport = WebSocketChatTransport<UIMessage> | DefaultChatTransport<UIMessage>;

function webSocketTransport(userId: string, gateway: GatewayProcess = stack.gateways[0]!) {
  return new WebSocketChatTransport<UIMessage>({
    url: `ws://127.0.0.1:${gateway.port}/ai`,
    params: { userId },
    webSocket: WebSocket as never,
  });
}

function httpTransport(userId: string, gateway: GatewayProcess = stack.gateways[0]!) {
  return new DefaultChatTransport<UIMessage>({
    api: `${gateway.http}/api/chat?userId=${userId}`,
  });
}

const kinds: [string, (userId: string, gateway?: GatewayProcess) => Transport][] = [
  ['WebSocket', webSocketTransport],
  ['HTTP', httpTransport],
];

function send(
  transport: Transport,
  chatId: string,
  messages: UIMessage[],
  body: object,
  abortSignal?: AbortSignal,
  trigger: 'submit-message' | 'regenerate-message' = 'submit-message',
) {
  return transport.sendMessages({ trigger, chatId, messageId: undefined, messages, abortSignal, body });
}

async function readAll(stream: ReadableStream<UIMessageChunk>): Promise<UIMessageChunk[]> {
  const chunks: UIMessageChunk[] = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

/** The message that the SDK makes of chunks. */
async function messageOf(chunks: UIMessageChunk[]): Promise<UIMessage> {
  const stream = new ReadableStream<UIMessageChunk>({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
  let message: UIMessage | undefined;
  for await (const next of readUIMessageStream({ stream })) message = next;
  return message!;
}

const textOf = (message: UIMessage) =>
  message.parts.map((part) => (part.type === 'text' ? part.text : '')).join('');

/** Reads until a chunk of this type has come. */
async function readUntil(reader: ReadableStreamDefaultReader<UIMessageChunk>, type: string, count = 1) {
  const chunks: UIMessageChunk[] = [];
  for (let seen = 0; seen < count; ) {
    const { done, value } = await reader.read();
    assert.ok(!done, `the stream ended before ${type}: ${JSON.stringify(chunks.slice(-3))}`);
    chunks.push(value);
    if (value.type === type) seen++;
  }
  return chunks;
}

for (const [kind, open] of kinds) {
  test(`${kind}: ask and watch the answer stream`, async () => {
    const transport = open('21001');
    const chunks = await readAll(await send(transport, `${kind}-a`, [user('u1', 'hello')], parameters(30)));
    const types = chunks.map((chunk) => chunk.type);
    assert.deepEqual(types.slice(0, 4), ['start', 'start-step', 'data-queue', 'text-start']);
    assert.deepEqual(types.slice(-3), ['text-end', 'finish-step', 'finish']);
    assert.ok(types.filter((type) => type === 'text-delta').length > 10, 'it came in pieces');
    const message = await messageOf(chunks);
    assert.equal(textOf(message).split(' ').length, 30);
    assert.equal(message.id, (chunks[0] as { messageId: string }).messageId);
    assert.deepEqual(
      message.parts.map((part) => part.type),
      ['step-start', 'text'],
      'the queue leaves no trace',
    );
    assert.equal(await transport.reconnectToStream({ chatId: `${kind}-a` } as never), null, 'nothing runs');
  });

  test(`${kind}: the same question again is answered once, another one anew`, async () => {
    const transport = open('21002');
    const chat = `${kind}-b`;
    const ask = async (messages: UIMessage[], trigger?: 'regenerate-message') =>
      messageOf(await readAll(await send(transport, chat, messages, parameters(10, 0), undefined, trigger)));
    const first = await ask([user('u1', 'hello')]);
    const again = await ask([user('u1', 'hello')]);
    assert.deepEqual([again.id, textOf(again)], [first.id, textOf(first)]);
    const edited = await ask([user('u1', 'hello there')]);
    assert.notEqual(edited.id, first.id);
    const anew = await ask([user('u1', 'hello')], 'regenerate-message');
    assert.notEqual(anew.id, first.id);
    const next = await ask([user('u1', 'hello'), first, user('u2', 'hello')]);
    assert.notEqual(next.id, first.id);
    const record = await stack.look.client.exists(stack.keys.generation('21002', next.id));
    assert.equal(record, 1);
  });

  test(`${kind}: leave in the middle, come back on the other gateway, have every word`, async () => {
    const chat = `${kind}/c ä`; // no id of ours: it is hashed
    const first = open('21003');
    const controller = new AbortController();
    const stream = await send(first, chat, [user('u1', 'hello')], parameters(120, 10), controller.signal);
    const reader = stream.getReader();
    const seen = await readUntil(reader, 'text-delta', 10);
    if (first instanceof WebSocketChatTransport) first.close();
    else controller.abort(); // over HTTP, leaving is not stopping
    const second = open('21003', stack.gateways[1]);
    const resumed = await second.reconnectToStream({ chatId: chat } as never);
    assert.ok(resumed);
    const chunks = await readAll(resumed);
    const message = await messageOf(chunks);
    assert.equal(message.id, (seen[0] as { messageId: string }).messageId, 'it replaces the partial message');
    assert.equal(textOf(message).split(' ').length, 120);
    assert.equal(chunks.at(-1)!.type, 'finish');
    assert.equal(await second.reconnectToStream({ chatId: chat } as never), null);
  });

  test(`${kind}: what ended while nobody was there is still given, once`, async () => {
    const chat = `${kind}-d`;
    const first = open('21004');
    const controller = new AbortController();
    const stream = await send(first, chat, [user('u1', 'hello')], parameters(60, 5), controller.signal);
    const seen = await readUntil(stream.getReader(), 'text-delta', 3);
    if (first instanceof WebSocketChatTransport) first.close();
    else controller.abort();
    const { messageId } = seen[0] as { messageId: string };
    await eventually(
      'the end',
      async () =>
        (await stack.look.client.hget(stack.keys.generation('21004', messageId), 'status')) === 'done',
    );
    const second = open('21004', stack.gateways[1]);
    const resumed = await second.reconnectToStream({ chatId: chat } as never);
    assert.equal(textOf(await messageOf(await readAll(resumed!))).split(' ').length, 60);
    await eventually('nothing more', async () => {
      const rest = await open('21004').reconnectToStream({ chatId: chat } as never);
      await rest?.cancel();
      return rest === null;
    });
  });

  test(`${kind}: an attempt that starts over takes its text back`, async () => {
    const transport = open('21005');
    const chunks = await readAll(
      await send(transport, `${kind}-e`, [user('u1', 'hello')], parameters(20, 5, { failAttempts: 1 })),
    );
    assert.equal(chunks.filter((chunk) => chunk.type === 'reset-step').length, 1);
    const message = await messageOf(chunks);
    assert.equal(textOf(message).split(' ').length, 20);
    assert.equal(message.parts.filter((part) => part.type === 'text').length, 1);
  });

  test(`${kind}: what fails for good is an error to the SDK`, async () => {
    const transport = open('21006');
    const stream = await send(
      transport,
      `${kind}-f`,
      [user('u1', 'x')],
      parameters(4, 0, { failAttempts: 99 }),
    );
    const chunks = await readAll(stream);
    assert.equal(chunks.at(-1)!.type, 'error');
    assert.equal((chunks.at(-2) as { data: { code: string } }).data.code, 'attempts_exhausted');
    // Asking again is the wish for another answer, not for the same failure.
    const again = await readAll(await send(transport, `${kind}-f`, [user('u1', 'x')], parameters(4, 0)));
    assert.equal(again.at(-1)!.type, 'finish');
  });

  test(`${kind}: one answer at a time in a chat, and refusals in words`, async () => {
    const transport = open('21007');
    const controller = new AbortController();
    const stream = await send(
      transport,
      `${kind}-g`,
      [user('u1', 'x')],
      parameters(400, 10),
      controller.signal,
    );
    await readUntil(stream.getReader(), 'text-delta');
    const refused = async () => {
      const second = await send(transport, `${kind}-g`, [user('u2', 'y')], parameters(4));
      await readAll(second);
    };
    await assert.rejects(refused(), /still open/);
    await assert.rejects(
      async () =>
        readAll(await send(transport, `${kind}-h`, [{ id: 'a', role: 'assistant', parts: [] }], {})),
      /last message must be the user/,
    );
    const file = { type: 'file' as const, mediaType: 'image/png', url: 'data:image/png;base64,' };
    await assert.rejects(
      async () => readAll(await send(transport, `${kind}-h`, [{ id: 'a', role: 'user', parts: [file] }], {})),
      /files are not supported/,
    );
    controller.abort();
    await fetch(`${stack.gateways[1]!.http}/api/chat/${kind}-g/stop?userId=21007`, { method: 'POST' });
  });

  test(`${kind}: a chat is its user's own`, async () => {
    const mine = open('21008');
    const controller = new AbortController();
    const stream = await send(
      mine,
      `${kind}-i`,
      [user('u1', 'secret')],
      parameters(150, 10),
      controller.signal,
    );
    const reader = stream.getReader();
    await readUntil(reader, 'text-delta');
    const theirs = open('21009');
    assert.equal(await theirs.reconnectToStream({ chatId: `${kind}-i` } as never), null);
    const stopped = await fetch(`${stack.gateways[0]!.http}/api/chat/${kind}-i/stop?userId=21009`, {
      method: 'POST',
    });
    assert.deepEqual(await stopped.json(), { success: true, stopped: false });
    const rest = await readUntil(reader, 'finish');
    assert.ok(rest.length > 10);
  });

  test(`${kind}: the history comes from the text of the messages`, async () => {
    const transport = open('21010');
    const messages: UIMessage[] = [
      user('u1', 'first'),
      {
        id: 'a1',
        role: 'assistant',
        parts: [{ type: 'step-start' }, { type: 'text', text: 'one ' }, { type: 'text', text: 'two' }],
      },
      user('u2', 'second'),
    ];
    const stream = await send(transport, `${kind}-j`, messages, { ...parameters(200, 10), model: 'm' });
    const reader = stream.getReader();
    const [start] = await readUntil(reader, 'text-delta');
    const { messageId } = start as { messageId: string };
    const payload = JSON.parse(
      (await stack.look.client.hget(stack.keys.generation('21010', messageId), 'payload'))!,
    );
    assert.equal(payload.contents, 'second');
    assert.equal(payload.model, 'm');
    assert.equal(payload.conversationId, `${kind}-j`);
    assert.deepEqual(payload.history, [
      { role: 'user', content: 'first' },
      { role: 'assistant', content: 'one two' },
    ]);
    await fetch(`${stack.gateways[1]!.http}/api/chat/${kind}-j/stop?userId=21010`, { method: 'POST' });
    const rest = await readUntil(reader, 'abort');
    assert.equal(rest.at(-1)!.type, 'abort', 'whoever still reads is told');
  });
}

test('WebSocket: stop ends the generation, and the next question is not in its way', async () => {
  const transport = webSocketTransport('21011');
  const controller = new AbortController();
  const stream = await send(transport, 'stop', [user('u1', 'x')], parameters(400, 10), controller.signal);
  const [start] = await readUntil(stream.getReader(), 'text-delta');
  controller.abort();
  const next = await readAll(await send(transport, 'stop', [user('u2', 'y')], parameters(5, 0)));
  assert.equal(next.at(-1)!.type, 'finish');
  const { messageId } = start as { messageId: string };
  const status = await stack.look.client.hget(stack.keys.generation('21011', messageId), 'status');
  assert.equal(status, 'cancelled');
  assert.equal(await transport.reconnectToStream({ chatId: 'stop' } as never), null);
});

test('WebSocket: a resume that replaces another does not stop the answer', async () => {
  const first = webSocketTransport('21012');
  const stream = await send(first, 'twice', [user('u1', 'x')], parameters(150, 10));
  await readUntil(stream.getReader(), 'text-delta');
  first.close();
  const transport = webSocketTransport('21012', stack.gateways[1]);
  const controller = new AbortController();
  const one = await transport.reconnectToStream({ chatId: 'twice', abortSignal: controller.signal } as never);
  await readUntil(one!.getReader(), 'text-delta');
  controller.abort();
  const two = await transport.reconnectToStream({ chatId: 'twice' } as never);
  const message = await messageOf(await readAll(two!));
  assert.equal(textOf(message).split(' ').length, 150);
});

test('WebSocket: a resume that is stopped stops the answer', async () => {
  const first = webSocketTransport('21013');
  const stream = await send(first, 'end', [user('u1', 'x')], parameters(2_000, 10));
  const [start] = await readUntil(stream.getReader(), 'text-delta');
  first.close();
  const transport = webSocketTransport('21013');
  const controller = new AbortController();
  const resumed = await transport.reconnectToStream({
    chatId: 'end',
    abortSignal: controller.signal,
  } as never);
  await readUntil(resumed!.getReader(), 'text-delta');
  controller.abort();
  const { messageId } = start as { messageId: string };
  await eventually(
    'the cancel',
    async () =>
      (await stack.look.client.hget(stack.keys.generation('21013', messageId), 'status')) === 'cancelled',
  );
});

/** The raw frames of a socket, in words of the protocol. */
async function rawSocket(query: string, gateway = stack.gateways[0]!) {
  const socket = new WebSocket(`ws://127.0.0.1:${gateway.port}/ai${query}`);
  // biome-ignore lint/suspicious/noExplicitAny: whatever comes
  const frames: any[] = [];
  socket.on('message', (data) => frames.push(JSON.parse(data.toString())));
  const closed = new Promise<number>((resolve) => socket.on('close', resolve));
  await new Promise((resolve) => socket.on('open', resolve));
  return {
    socket,
    frames,
    closed,
    send: (frame: object | string) => socket.send(typeof frame === 'string' ? frame : JSON.stringify(frame)),
    until: (type: string, requestId: string) =>
      eventually(`${type} ${requestId}`, () =>
        frames.find((frame) => frame.type === type && frame.requestId === requestId),
      ),
  };
}

const sendFrame = (requestId: string, id: string, text = 'x', more: object = {}) => ({
  type: 'send',
  requestId,
  id,
  trigger: 'submit-message',
  messages: [user('u1', text)],
  headers: {},
  body: parameters(20, 1),
  ...more,
});

test('on the wire: sequences from 0 without a gap, no keys of ours, pings for heartbeats', async () => {
  const client = await rawSocket('?userId=21020');
  client.send(sendFrame('r1', 'wire'));
  client.send({ type: 'resume', requestId: 'r2', id: 'nothing here', headers: {}, body: {} });
  await client.until('end', 'r1');
  await client.until('no-active', 'r2');
  const chunks = client.frames.filter((frame) => frame.requestId === 'r1' && frame.type === 'chunk');
  assert.deepEqual(
    chunks.map((frame) => frame.sequence),
    chunks.map((_, index) => index),
  );
  for (const frame of client.frames) {
    assert.equal(typeof frame.requestId, 'string');
    const keys = frame.type === 'chunk' ? ['type', 'requestId', 'sequence', 'chunk'] : ['type', 'requestId'];
    assert.deepEqual(Object.keys(frame), keys);
  }
  const allowed: Record<string, string[]> = {
    start: ['type', 'messageId'],
    'text-start': ['type', 'id'],
    'text-delta': ['type', 'id', 'delta'],
    'text-end': ['type', 'id'],
    'data-queue': ['type', 'data', 'transient'],
    finish: ['type', 'finishReason'],
  };
  for (const { chunk } of chunks) assert.deepEqual(Object.keys(chunk), allowed[chunk.type] ?? ['type']);
  client.socket.terminate();
});

test('on the wire: nonsense is answered where it has a request id, and closes where it has none', async () => {
  const client = await rawSocket('?userId=21021');
  client.send({ type: 'send', requestId: 'r1', id: 'x' });
  assert.match((await client.until('error', 'r1')).errorText, /messages/);
  client.send({ type: 'dance', requestId: 'r2' });
  await client.until('error', 'r2');
  client.send({ type: 'abort', requestId: 'never was' });
  client.send({ type: 'resume', requestId: 'r3', id: 'x', lastSequence: 4, headers: {}, body: {} });
  assert.match((await client.until('error', 'r3')).errorText, /lastSequence/);
  client.send('PING');
  assert.equal(await client.closed, 4503);
  const nobody = await rawSocket('');
  nobody.send(sendFrame('r1', 'x'));
  await nobody.until('error', 'r1');
  assert.equal(await nobody.closed, 4500);
  const reserved = await rawSocket('?userId=9');
  reserved.send(sendFrame('r1', 'x'));
  assert.equal(await reserved.closed, 4500);
});

test('the queue is told while one waits', async (t) => {
  const lonely = await startStack(t, { workers: 0 });
  const transport = webSocketTransport('21022', lonely.gateways[0]);
  const ask = async (chat: string) =>
    (await send(transport, chat, [user('u1', 'x')], parameters(3, 0))).getReader();
  const first = await ask('q1');
  const second = await ask('q2');
  const queued = await readUntil(second, 'data-queue');
  assert.deepEqual(queued.at(-1), { type: 'data-queue', data: { position: 1 }, transient: true });
  const back = webSocketTransport('21022', lonely.gateways[0]);
  const resumed = (await back.reconnectToStream({ chatId: 'q2' } as never))!.getReader();
  assert.deepEqual((await readUntil(resumed, 'data-queue')).at(-1), queued.at(-1));
  await lonely.addWorker();
  await readUntil(first, 'finish');
  await readUntil(second, 'finish');
  await readUntil(resumed, 'finish');
});

test('with tokens: in the URL, in the headers of a frame, in the HTTP header', async (t) => {
  const { SignJWT } = await import('jose');
  const JWT_SECRET = 'a secret of thirty-two characters';
  const gateway = await stack.addGateway({ node: 'jwt', env: { AUTH: 'jwt', JWT_SECRET } });
  t.after(() => gateway.kill());
  const sign = (sub: string, exp = '1m') =>
    new SignJWT({ sub })
      .setProtectedHeader({ alg: 'HS256' })
      .setExpirationTime(exp)
      .sign(new TextEncoder().encode(JWT_SECRET));
  const token = await sign('21030');
  const url = `ws://127.0.0.1:${gateway.port}/ai`;
  const api = `${gateway.http}/api/chat`;
  const authorization = `Bearer ${token}`;
  const webSocket = WebSocket as never;
  const good: Transport[] = [
    new WebSocketChatTransport({ url, params: { token }, webSocket }),
    new WebSocketChatTransport({ url, headers: { authorization }, webSocket }),
    new DefaultChatTransport({ api, headers: { authorization } }),
  ];
  for (const [index, transport] of good.entries()) {
    const chunks = await readAll(await send(transport, `t${index}`, [user('u1', 'x')], parameters(3, 0)));
    assert.equal(chunks.at(-1)!.type, 'finish');
  }
  const bad: Transport[] = [
    new WebSocketChatTransport({ url, params: { userId: '21030' }, webSocket }),
    new WebSocketChatTransport({ url, params: { userId: '21031', token }, webSocket }),
    new DefaultChatTransport({ api: `${api}?userId=21030` }),
    new DefaultChatTransport({ api: `${api}?userId=21031`, headers: { authorization } }),
  ];
  for (const transport of bad)
    await assert.rejects(async () =>
      readAll(await send(transport, 'bad', [user('u1', 'x')], parameters(3, 0))),
    );

  // Who has no good token does not get a body read.
  for (const [more, status] of [
    [{}, 401],
    [{ authorization: `${authorization}x` }, 401],
    [{ authorization }, 400],
  ] as const) {
    const answer = await fetch(api, { method: 'POST', body: 'no JSON', headers: more as HeadersInit });
    assert.equal(answer.status, status);
  }
  const theirs = { id: 'x', messages: [user('u1', 'x')], userId: '21031' };
  const refused = await fetch(api, {
    method: 'POST',
    body: JSON.stringify(theirs),
    headers: { authorization },
  });
  assert.equal(refused.status, 403);

  // The stream ends with the token.
  const short = await sign('21032', '2s');
  for (const transport of [
    new WebSocketChatTransport<UIMessage>({ url, params: { token: short }, webSocket }),
    new DefaultChatTransport<UIMessage>({ api, headers: { authorization: `Bearer ${short}` } }),
  ]) {
    const stream = await send(
      transport,
      'short',
      [user(`u${transport.constructor.name}`, 'x')],
      parameters(2_000, 10),
    ).catch((error: Error) => error);
    if (stream instanceof Error) continue; // too late already
    const chunks = await readAll(stream).catch(() => []);
    assert.notEqual(chunks.at(-1)?.type, 'finish');
    await stack.look.client.del(stack.keys.active('21032'));
  }
});

test('who is banned or locked is refused here too', async () => {
  const { http } = stack.gateways[0]!;
  const ban = { banned: 'spam' };
  const lock = { lockedUntil: Date.now() + 60_000 };
  for (const [id, access, code] of [
    ['21050', ban, 'banned'],
    ['21051', lock, 'locked'],
  ] as const) {
    await stack.look.client.hset(stack.keys.access(id), access);
    const client = await rawSocket(`?userId=${id}`);
    client.send(sendFrame('r1', 'x'));
    await client.until('error', 'r1');
    assert.equal(await client.closed, 4502);
    const refused = await fetch(`${http}/api/chat?userId=${id}`, {
      method: 'POST',
      body: JSON.stringify({ id: 'x', messages: [user('u1', 'x')] }),
    });
    const { error } = (await refused.json()) as { error: { code: string } };
    assert.deepEqual([refused.status, error.code], [403, code]);
    assert.equal((await fetch(`${http}/api/chat/x/stream?userId=${id}`)).status, 403);
  }
});

test('a ban closes sockets and event streams that are open; a missed order is noticed', async () => {
  const gateway = stack.gateways[1]!;
  const access = createAccessStore({ redis: stack.look, keys: stack.keys });
  /** A socket that has nothing to read any more, and one event stream. */
  const open = async (id: string) => {
    const client = await rawSocket(`?userId=${id}`, gateway);
    client.send(sendFrame('r1', 'socket'));
    await client.until('end', 'r1');
    const stream = await fetch(`${gateway.http}/api/chat?userId=${id}`, {
      method: 'POST',
      body: JSON.stringify({ id: 'stream', messages: [user('u1', 'x')], ...parameters(2_000, 10) }),
    });
    return { client, text: stream.text() };
  };
  const bystander = await open('21057');
  for (const [id, ban, message] of [
    ['21054', () => access.ban('21054', 'spam', 'tester'), /This account is banned\."\}\n\n$/],
    [
      '21055',
      () => access.lock('21055', Date.now() + 60_000, 'tester'),
      /This account is locked for now\."\}\n\n$/,
    ],
    [
      '21056',
      () => stack.look.client.hset(stack.keys.access('21056'), 'banned', 'quietly'),
      /is banned\."\}\n\n$/,
    ],
  ] as const) {
    const { client, text } = await open(id);
    await ban();
    assert.equal(await client.closed, 4502);
    assert.match(await text, message);
    await fetch(`${gateway.http}/api/chat/stream/stop?userId=${id}`, { method: 'POST' });
  }
  bystander.client.send(sendFrame('r2', 'socket'));
  await bystander.client.until('end', 'r2');
  bystander.client.socket.terminate();
  await fetch(`${gateway.http}/api/chat/stream/stop?userId=21057`, { method: 'POST' });
  assert.match(await bystander.text, /"abort"[\s\S]*\[DONE\]/);
});

test('HTTP: status codes, origins, and what an older SDK is told about a restart', async () => {
  const { http } = stack.gateways[0]!;
  const post = (body: object | string, headers: Record<string, string> = {}, query = '?userId=21040') =>
    fetch(`${http}/api/chat${query}`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', ...headers },
      body: typeof body === 'string' ? body : JSON.stringify(body),
    });
  const question = (chat: string, more: object = {}) => ({
    id: chat,
    messages: [user('u1', 'x')],
    ...parameters(10, 1),
    ...more,
  });
  assert.equal((await post('{')).status, 400);
  assert.equal((await post({})).status, 400);
  assert.equal((await post(question('h'), {}, '')).status, 400);
  assert.equal((await post(question('h', { userId: 9 }), {}, '')).status, 400);
  assert.equal((await post(question('h'), { origin: 'https://evil.example' })).status, 403);
  assert.equal((await post(question('h', { messages: [user('u1', 'x'.repeat(300_000))] }))).status, 413);
  const whole = await post(' '.repeat(1_048_577), { origin: http }); // more than a body may have: it is not read
  assert.equal(whole.headers.get('access-control-allow-origin'), http);
  const { error } = (await whole.json()) as { error: object };
  assert.deepEqual(
    { status: whole.status, ...error },
    {
      status: 413,
      code: 'payload_too_large',
      message: 'A request body may have 1048576 bytes.',
      temporary: false,
    },
  );
  assert.equal((await post(' '.repeat(1_048_577), { origin: 'https://evil.example' })).status, 403);
  assert.equal((await fetch(`${http}/api/chat?userId=21040`)).status, 405);
  assert.equal((await fetch(`${http}/api/chat/%zz/stream?userId=21040`)).status, 400);
  assert.equal((await fetch(`${http}/api/chat/none/stream?userId=21040`)).status, 204);
  assert.equal((await fetch(`${http}/api/chat/none/stream`)).status, 400);
  assert.equal((await fetch(`${http}/api/chat/none/other`)).status, 404);

  const good = await post(question('h1', { userId: 21040 }), { origin: http }, '');
  assert.equal(good.status, 200);
  assert.equal(good.headers.get('x-vercel-ai-ui-message-stream'), 'v1');
  assert.match(good.headers.get('content-type')!, /^text\/event-stream/);
  assert.match(await good.text(), /^data: \{"type":"start".*\n\ndata: \[DONE\]\n\n$/s);

  const older = await post(question('h2', parameters(10, 1, { failAttempts: 1 })), { 'x-ai-sdk': '6' });
  const text = await older.text();
  assert.doesNotMatch(text, /reset-step/);
  assert.match(
    text,
    /"type":"text-end","id":"text-1"\}\n\ndata: \{"type":"data-restart","data":\{"attempt":2\}\}/,
  );
});

test('HTTP: a long silence is kept alive, and a client that has left is forgotten', async () => {
  const { http } = stack.gateways[0]!;
  const controller = new AbortController();
  const answer = await fetch(`${http}/api/chat?userId=21041`, {
    method: 'POST',
    signal: controller.signal,
    body: JSON.stringify({
      id: 'silent',
      messages: [user('u1', 'x')],
      ...parameters(5, 0, { firstTokenMs: 12_000 }),
    }),
  });
  assert.match(await answer.text(), /keep-alive[\s\S]*"finish"[\s\S]*\[DONE\]/);
  const left = await fetch(`${http}/api/chat?userId=21041`, {
    method: 'POST',
    signal: controller.signal,
    body: JSON.stringify({ id: 'left', messages: [user('u1', 'x')], ...parameters(2_000, 10) }),
  });
  await left.body!.getReader().read();
  controller.abort();
  await eventually('nobody follows', async () =>
    /rivulet_generations_followed 0\n/.test(await (await fetch(`${http}/metrics`)).text()),
  );
  const stopped = await fetch(`${http}/api/chat/left/stop?userId=21041`, { method: 'POST' });
  assert.deepEqual(await stopped.json(), { success: true, stopped: true });
});

test('HTTP: an answer whose chat Redis has forgotten is resumed and stopped all the same', async (t) => {
  const { http } = stack.gateways[0]!;
  const controller = new AbortController();
  t.after(() => controller.abort());
  const call = (path: string, init: RequestInit = {}) =>
    fetch(`${http}/api/chat${path}?userId=21043`, { signal: controller.signal, ...init });
  const body = { id: 'forgotten', messages: [user('u1', 'x')], ...parameters(2_000, 10) };
  const asked = await call('', { method: 'POST', body: JSON.stringify(body) });
  await asked.body!.getReader().read();
  const [key] = await stack.look.client.keys(`${stack.keys.aiChat('21043', '*')}`);
  assert.ok(key);
  await stack.look.client.del(key);
  const resumed = await call('/forgotten/stream');
  assert.equal(resumed.status, 200);
  await resumed.body!.getReader().read();
  const stopped = await call('/forgotten/stop', { method: 'POST' });
  assert.deepEqual(await stopped.json(), { success: true, stopped: true });
  assert.equal((await call('/forgotten/stream')).status, 204, 'nothing runs any more');
});

/** A moderation hook that answers when it is told to. */
async function startHook(t: TestContext): Promise<{ waiting: ServerResponse[]; url: string }> {
  const waiting: ServerResponse[] = [];
  const hook = createServer((request, response) => {
    request.resume();
    waiting.push(response);
  });
  await new Promise<void>((resolve) => hook.listen(0, '127.0.0.1', resolve));
  t.after(() => hook.close());
  return { waiting, url: `http://127.0.0.1:${(hook.address() as AddressInfo).port}` };
}

test('HTTP: a stop ends a question that is on its way in, none that comes after it', async (t) => {
  const { waiting, url } = await startHook(t);
  const gateway = await stack.addGateway({
    node: 'stopped',
    env: { MODERATION_URL: url, MODERATION_TIMEOUT_MS: '20000' },
  });
  t.after(() => gateway.kill());
  const ask = async (id: string, text: string) => {
    const body = { id: 'early', messages: [user(id, text)], ...parameters(100, 10) };
    const answer = await fetch(`${gateway.http}/api/chat?userId=21061`, {
      method: 'POST',
      body: JSON.stringify(body),
    });
    return answer.text();
  };
  const first = ask('u1', 'first');
  await eventually('a question to the hook', () => waiting.length === 1);
  const stopped = await fetch(`${stack.gateways[1]!.http}/api/chat/early/stop?userId=21061`, {
    method: 'POST',
  });
  assert.deepEqual(await stopped.json(), { success: true, stopped: false });
  const second = ask('u2', 'second');
  await eventually('another question to the hook', () => waiting.length === 2);
  waiting.shift()!.end('{"allow":true}');
  assert.match(await first, /"type":"abort"/);
  waiting.shift()!.end('{"allow":true}');
  assert.match(await second, /"type":"finish"/);
});

test('HTTP: a client that leaves before it is answered holds nothing', async (t) => {
  const { waiting, url } = await startHook(t);
  const limit = 3;
  const gateway = await stack.addGateway({
    node: 'leavers',
    env: {
      CONNECTIONS_PER_ADDRESS: String(limit),
      TRUSTED_PROXIES: '127.0.0.1', // our own address is not limited
      MODERATION_URL: url,
      MODERATION_TIMEOUT_MS: '20000',
    },
  });
  t.after(() => gateway.kill());
  const call = (path: string, more: RequestInit = {}) =>
    fetch(`${gateway.http}/api/chat${path}?userId=21060`, {
      headers: { 'x-forwarded-for': '203.0.113.9' },
      ...more,
    });
  const leavers = Array.from({ length: limit }, (_, index) => {
    const controller = new AbortController();
    const body = { id: `leaver-${index}`, messages: [user('u1', 'x')], ...parameters(2_000, 10) };
    const answer = call('', { method: 'POST', signal: controller.signal, body: JSON.stringify(body) });
    return { controller, answer };
  });
  await eventually('questions to the hook', () => waiting.length === limit);
  assert.equal((await call('/none/stream')).status, 429);
  for (const { controller, answer } of leavers) {
    controller.abort();
    await assert.rejects(answer, /abort/);
  }
  for (const response of waiting.splice(0)) response.end('{"allow":true}');
  await eventually('a free place', async () => (await call('/none/stream')).status === 204);
  await eventually('nobody follows', async () =>
    /rivulet_generations_followed 0\n/.test(await (await fetch(`${gateway.http}/metrics`)).text()),
  );
  for (let index = 0; index < limit; index++) {
    const stopped = await call(`/leaver-${index}/stop`, { method: 'POST' });
    assert.deepEqual(await stopped.json(), { success: true, stopped: true }, 'the answer goes on');
  }
});
