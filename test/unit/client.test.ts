import assert from 'node:assert/strict';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import type { AddressInfo } from 'node:net';
import { type TestContext, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { transform } from 'esbuild';
import { WebSocket, WebSocketServer } from 'ws';
import {
  type Answer,
  type Client,
  ClientError,
  type ClientEvents,
  type ClientOptions,
  createClient,
} from '../../shared/client.ts';

/** A gateway played by hand: each test reads what the client said and writes the answer itself. */

type Frame = Record<string, unknown> & { type: string };

const LONGEST_WAIT_MS = 5_000;

/** What arrives, in order, for a reader that waits for it. */
function createMailbox<T>(what: string) {
  const items: T[] = [];
  const waiting: ((item: T) => void)[] = [];
  return {
    items,
    put(item: T) {
      const reader = waiting.shift();
      if (reader) reader(item);
      else items.push(item);
    },
    take(): Promise<T> {
      if (items.length > 0) return Promise.resolve(items.shift()!);
      return new Promise((resolve, reject) => {
        const timer = setTimeout(() => reject(new Error(`no ${what} in time`)), LONGEST_WAIT_MS);
        waiting.push((item) => {
          clearTimeout(timer);
          resolve(item);
        });
      });
    },
  };
}

function createPeer(socket: WebSocket, url: string) {
  const frames = createMailbox<Frame>('frame');
  const closed = once(socket, 'close') as Promise<[number, Buffer]>;
  socket.on('message', (data) => frames.put(JSON.parse(String(data)) as Frame));
  return {
    url,
    socket,
    closed,
    waitingFrames: frames.items,
    send: (...list: Frame[]) => {
      for (const frame of list) socket.send(JSON.stringify(frame));
    },
    /** The next frame must be of this type. */
    async next(type: string): Promise<Frame> {
      const frame = await frames.take();
      assert.equal(frame.type, type, `expected ${type}, got ${JSON.stringify(frame)}`);
      return frame;
    },
    close: (code: number, reason = '') => socket.close(code, reason),
    kill: () => socket.terminate(),
    async ready(options: { heartbeatMs?: number; maxFrameBytes?: number } = {}) {
      const init = await this.next('init');
      this.send({
        type: 'ready',
        userId: String(init.userId),
        connectionId: 'c1',
        node: 'n1',
        heartbeatMs: options.heartbeatMs ?? 60_000,
        limits: { maxFrameBytes: options.maxFrameBytes ?? 262_144, userActive: 4, queue: 100 },
      });
      return init;
    },
    /** Nothing was said: proven by a round trip of a ping. */
    async quiet() {
      socket.ping();
      await once(socket, 'pong');
      assert.deepEqual(frames.items, []);
    },
  };
}

async function startServer(t: TestContext) {
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1' });
  await once(server, 'listening');
  t.after(() => {
    for (const socket of server.clients) socket.terminate();
    server.close();
  });
  const peers = createMailbox<ReturnType<typeof createPeer>>('connection');
  server.on('connection', (socket, request) => peers.put(createPeer(socket, request.url ?? '')));
  const { port } = server.address() as AddressInfo;
  return { url: `ws://127.0.0.1:${port}/ws`, server, accept: () => peers.take(), waiting: peers.items };
}

function startClient(t: TestContext, url: string | string[], options: Partial<ClientOptions> = {}): Client {
  const client = createClient({
    url,
    userId: 20001,
    WebSocket,
    reconnectBaseMs: 10,
    reconnectMaxMs: 40,
    ...options,
  });
  t.after(() => client.close());
  return client;
}

async function connected(t: TestContext, options: Partial<ClientOptions> = {}) {
  const server = await startServer(t);
  const client = startClient(t, server.url, options);
  const ready = client.connect();
  const peer = await server.accept();
  await peer.ready();
  await ready;
  return { server, client, peer };
}

const accepted = (messageId: string, extra = {}): Frame => ({
  type: 'accepted',
  messageId,
  position: 0,
  duplicate: false,
  ...extra,
});
const resumed = (messageId: string, extra = {}): Frame => ({
  type: 'resumed',
  messageId,
  recovered: true,
  compacted: false,
  status: 'running',
  ...extra,
});
const start = (messageId: string, attempt: number): Frame => ({
  type: 'start',
  messageId,
  id: `${attempt}-0`,
  attempt,
});
const token = (messageId: string, id: string, text: string): Frame => ({
  type: 'token',
  messageId,
  id,
  text,
});
const done = (messageId: string, id: string, length: number, extra = {}): Frame => ({
  type: 'done',
  messageId,
  id,
  finishReason: 'stop',
  length,
  ...extra,
});
const rejected = (messageId: string, code: string, extra = {}): Frame => ({
  type: 'rejected',
  messageId,
  code,
  message: `refused: ${code}`,
  temporary: false,
  ...extra,
});

async function readAll(answer: Answer): Promise<string[]> {
  const texts: string[] = [];
  for await (const text of answer) texts.push(text);
  return texts;
}

function nextEvent<T extends keyof ClientEvents>(client: Client, event: T): Promise<ClientEvents[T]> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${event} in time`)), LONGEST_WAIT_MS);
    const off = client.on(event, (value) => {
      clearTimeout(timer);
      off();
      resolve(value);
    });
  });
}

/** The error that a promise must reject with. */
async function errorOf(promise: Promise<unknown>): Promise<ClientError> {
  return promise.then(
    () => assert.fail('expected a rejection'),
    (error) => {
      assert.ok(error instanceof ClientError, String(error));
      return error;
    },
  );
}

async function codeOf(promise: Promise<unknown>): Promise<string> {
  return (await errorOf(promise)).code;
}

test('an answer: init, chat, accepted, queued, tokens, done', async (t) => {
  const server = await startServer(t);
  const client = startClient(t, server.url, { token: 'secret', device: 'phone' });
  const answer = client.chat('Hello', {
    messageId: 'm1',
    history: [{ role: 'user', content: 'a' }],
    model: 'x',
  });
  const peer = await server.accept();
  assert.equal(peer.url, '/ws?userId=20001', 'the user id is in the URL, the token is not');
  assert.deepEqual(await peer.ready(), { type: 'init', userId: '20001', token: 'secret', device: 'phone' });
  assert.deepEqual(await peer.next('chat'), {
    type: 'chat',
    messageId: 'm1',
    contents: 'Hello',
    history: [{ role: 'user', content: 'a' }],
    model: 'x',
  });
  assert.equal(answer.status, 'sending');
  const reading = readAll(answer);
  const queued = nextEvent(client, 'queued');
  peer.send(accepted('m1', { position: 3 }), { type: 'queued', messageId: 'm1', position: 1 });
  await queued;
  assert.deepEqual([answer.status, answer.position], ['queued', 1]);
  peer.send(start('m1', 1), token('m1', '1-1', 'Hi'), { type: 'news', messageId: 'm1' });
  peer.send(
    token('m1', '1-2', ' there'),
    done('m1', '1-3', 8, { usage: { promptTokens: 1, completionTokens: 2 } }),
  );
  assert.deepEqual(await answer.done, {
    messageId: 'm1',
    status: 'done',
    text: 'Hi there',
    finishReason: 'stop',
    usage: { promptTokens: 1, completionTokens: 2 },
    attempt: 1,
  });
  assert.equal((await reading).join(''), 'Hi there');
  assert.deepEqual([answer.status, answer.position, answer.lastId], ['done', null, '1-3']);
  assert.equal((await readAll(answer)).join(''), 'Hi there', 'a late reader gets the whole text');
  assert.equal(client.answers.size, 0);
});

test('doubles are dropped, also in the events', async (t) => {
  const { client, peer } = await connected(t);
  const texts: string[] = [];
  client.on('token', (frame) => texts.push(frame.text));
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'a'), token('m1', '1-1', 'a'), start('m1', 1));
  peer.send(token('m1', '1-2', 'b'), token('m1', '1-1', 'a'), done('m1', '1-3', 2));
  assert.equal((await answer.done).text, 'ab');
  assert.deepEqual(texts, ['a', 'b']);
});

test('a lost connection: reconnects and resumes every open answer after its last id', async (t) => {
  const { server, client, peer } = await connected(t);
  const one = client.chat('x', { messageId: 'm1' });
  const two = client.chat('y', { messageId: 'm2' });
  const three = client.chat('z', { messageId: 'm3' });
  await peer.next('chat');
  await peer.next('chat');
  await peer.next('chat');
  const reading = readAll(one);
  const tokens = nextEvent(client, 'token');
  peer.send(accepted('m1'), accepted('m2'), start('m1', 1), token('m1', '1-1', 'one '));
  await tokens;
  const lost = nextEvent(client, 'disconnected');
  peer.kill();
  assert.equal((await lost).final, false);
  const again = await server.accept();
  await again.ready();
  assert.deepEqual(await again.next('resume'), { type: 'resume', messageId: 'm1', after: '1-1' });
  assert.deepEqual(await again.next('resume'), { type: 'resume', messageId: 'm2' });
  assert.equal((await again.next('chat')).messageId, 'm3', 'never accepted: submitted again');
  again.send(resumed('m1'), token('m1', '1-2', 'two'), done('m1', '1-3', 7));
  again.send(resumed('m2', { status: 'queued' }), start('m2', 1), done('m2', '1-1', 0));
  again.send(accepted('m3', { duplicate: true }), resumed('m3'), start('m3', 1), token('m3', '1-1', 'z'));
  again.send(done('m3', '1-2', 1));
  assert.equal((await one.done).text, 'one two');
  assert.equal((await reading).join(''), 'one two');
  assert.equal((await two.done).text, '');
  assert.equal((await three.done).text, 'z');
});

test('a hole: the log is read once, then the line goes on', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'a'));
  peer.send(token('m1', '1-3', 'c'), token('m1', '1-4', 'd'));
  assert.deepEqual(await peer.next('resume'), { type: 'resume', messageId: 'm1', after: '1-1' });
  await peer.quiet();
  peer.send(resumed('m1'), token('m1', '1-2', 'b'), token('m1', '1-3', 'c'), token('m1', '1-4', 'd'));
  peer.send(done('m1', '1-5', 4));
  assert.equal((await answer.done).text, 'abcd');
});

test('a hole that the log has too is accepted instead of asked for ever', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-3', 'c'));
  assert.equal((await peer.next('resume')).after, '1-0');
  peer.send(resumed('m1'), token('m1', '1-3', 'c'), done('m1', '1-4', 1));
  assert.equal((await answer.done).text, 'c');
});

test('a wrong length at the end: read from the beginning, once', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'ab'), done('m1', '1-2', 4));
  assert.deepEqual(await peer.next('resume'), { type: 'resume', messageId: 'm1' });
  peer.send(
    resumed('m1', { status: 'done' }),
    start('m1', 1),
    token('m1', '1-1', 'abcd'),
    done('m1', '1-2', 4),
  );
  assert.equal((await answer.done).text, 'abcd');
  assert.equal(answer.restarts, 0);
});

test('a restart: the text is void, parts() says where, the last attempt is the answer', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  const parts = answer.parts();
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'The cat'));
  assert.deepEqual((await parts.next()).value, { type: 'text', text: 'The cat' });
  const restarted = nextEvent(client, 'restart');
  peer.send(start('m1', 2));
  assert.deepEqual(await restarted, { messageId: 'm1', attempt: 2 });
  assert.deepEqual([answer.text, answer.restarts, answer.attempt], ['', 1, 2]);
  peer.send(token('m1', '2-1', 'The '), token('m1', '2-2', 'dog'));
  assert.deepEqual((await parts.next()).value, { type: 'restart', attempt: 2 });
  assert.deepEqual((await parts.next()).value, { type: 'text', text: 'The dog' });
  peer.send(done('m1', '2-3', 7));
  assert.equal((await parts.next()).done, true);
  assert.equal((await answer.done).text, 'The dog');
});

test('a restart that repeats the same text is seamless for a reader', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  const parts = answer.parts();
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'one two '));
  assert.deepEqual((await parts.next()).value, { type: 'text', text: 'one two ' });
  peer.send(
    start('m1', 2),
    token('m1', '2-1', 'one '),
    token('m1', '2-2', 'two three'),
    done('m1', '2-3', 13),
  );
  assert.deepEqual((await parts.next()).value, { type: 'text', text: 'three' });
  assert.equal((await parts.next()).done, true);
});

test('restarts over restarts, and an attempt that ends shorter than what was read', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  const parts = answer.parts();
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'one two three'));
  assert.equal((await parts.next()).value?.type, 'text');
  // Attempt 2 differs but nobody reads meanwhile; attempt 3 repeats a part and stops there.
  peer.send(start('m1', 2), token('m1', '2-1', 'other'), start('m1', 3), token('m1', '3-1', 'one two'));
  peer.send(done('m1', '3-2', 7, { finishReason: 'length' }));
  await answer.done;
  assert.deepEqual((await parts.next()).value, { type: 'restart', attempt: 3 });
  assert.deepEqual((await parts.next()).value, { type: 'text', text: 'one two' });
  assert.equal((await parts.next()).done, true);
});

test('resume after a finished, compacted generation: start, one token, terminal, without a double', async (t) => {
  const { server, client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  const texts: string[] = [];
  const reading = (async () => {
    for await (const text of answer) texts.push(text);
  })();
  peer.send(accepted('m1'), start('m1', 2), token('m1', '2-1', 'Hello '));
  await nextEvent(client, 'token');
  peer.kill();
  const again = await server.accept();
  await again.ready();
  assert.equal((await again.next('resume')).after, '2-1');
  again.send(resumed('m1', { compacted: true, status: 'done' }), start('m1', 2));
  again.send(token('m1', '2-9', 'Hello world'), done('m1', '2-10', 11));
  assert.equal((await answer.done).text, 'Hello world');
  await reading;
  assert.deepEqual(texts, ['Hello ', 'world']);
  assert.equal(answer.restarts, 0);
});

test('recovered:false replays from the last start', async (t) => {
  const { server, client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'a'), token('m1', '1-2', 'b'));
  await nextEvent(client, 'token');
  peer.close(4001, 'slow client');
  const again = await server.accept();
  await again.ready();
  await again.next('resume');
  again.send(
    resumed('m1', { recovered: false }),
    start('m1', 1),
    token('m1', '1-1', 'A'),
    done('m1', '1-2', 1),
  );
  assert.equal((await answer.done).text, 'A');
});

test('a message that is gone is submitted again under its id; a resumed one is reported', async (t) => {
  const { server, client, peer } = await connected(t);
  const answer = client.chat('question', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'old'));
  await nextEvent(client, 'token');
  peer.kill();
  const again = await server.accept();
  await again.ready();
  await again.next('resume');
  again.send(rejected('m1', 'unknown_message'));
  assert.equal((await again.next('chat')).contents, 'question');
  again.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'new'), done('m1', '1-2', 3));
  assert.equal((await answer.done).text, 'new');

  const other = client.resume('m9', '1-4', { text: 'kept' });
  assert.deepEqual(await again.next('resume'), { type: 'resume', messageId: 'm9', after: '1-4' });
  assert.equal(other.text, 'kept');
  again.send(rejected('m9', 'unknown_message'));
  assert.equal(await codeOf(other.done), 'unknown_message');

  const kept = client.resume('m8', '1-4', { text: 'kept' });
  await again.next('resume');
  again.send(resumed('m8'), token('m8', '1-5', ' on'), done('m8', '1-6', 7));
  assert.equal((await kept.done).text, 'kept on');
});

test('the server forgets for ever: a bounded number of submissions', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  for (let i = 0; i < 4; i++) {
    await peer.next('chat');
    peer.send(rejected('m1', 'unknown_message'));
  }
  assert.equal(await codeOf(answer.done), 'unknown_message');
  await peer.quiet();
});

test('rejected: the code, the position and the time to wait reach the caller', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  const ended = nextEvent(client, 'ended');
  await peer.next('chat');
  peer.send(rejected('m1', 'queue_full', { temporary: true, retryAfterMs: 1500, position: 100 }));
  const error = await errorOf(answer.done);
  assert.deepEqual(
    [error.code, error.temporary, error.retryAfterMs, error.position],
    ['queue_full', true, 1500, 100],
  );
  await assert.rejects(readAll(answer), { code: 'queue_full' });
  assert.equal((await ended).error, error);
  assert.equal(answer.status, 'failed');
  assert.equal(client.answers.size, 0);
});

test('failed: the iterator gives the text that came, then throws', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'half'));
  peer.send({
    type: 'failed',
    messageId: 'm1',
    id: '1-2',
    code: 'model_error',
    message: 'no',
    temporary: false,
  });
  const texts: string[] = [];
  await assert.rejects(
    (async () => {
      for await (const text of answer) texts.push(text);
    })(),
    { code: 'model_error' },
  );
  assert.deepEqual(texts, ['half']);
});

test('a resume refused for the moment is tried again, not failed', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.resume('m1');
  await peer.next('resume');
  peer.send(rejected('m1', 'internal', { temporary: true }));
  await peer.next('resume');
  peer.send(resumed('m1'), start('m1', 1), done('m1', '1-1', 0));
  await answer.done;
});

test('resume after the last frame of an ended answer: read whole instead of waiting for ever', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.resume('m1', '1-2', { text: 'ab' });
  assert.equal((await peer.next('resume')).after, '1-2');
  peer.send(resumed('m1', { status: 'done' }));
  assert.equal((await peer.next('resume')).after, undefined);
  peer.send(
    resumed('m1', { status: 'done' }),
    start('m1', 1),
    token('m1', '1-1', 'ab'),
    done('m1', '1-2', 2),
  );
  assert.equal((await answer.done).text, 'ab');
});

test('a draining node: the request moves to the next URL', async (t) => {
  const first = await startServer(t);
  const second = await startServer(t);
  const client = startClient(t, [first.url, second.url]);
  const answer = client.chat('x', { messageId: 'm1' });
  const one = await first.accept();
  await one.ready();
  await one.next('chat');
  one.send(rejected('m1', 'shutting_down', { temporary: true }));
  const two = await second.accept();
  await two.ready();
  await two.next('chat');
  two.send(accepted('m1'), start('m1', 1), done('m1', '1-1', 0));
  await answer.done;
});

test('cancel: waits for accepted, keeps the partial text', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  void answer.cancel();
  await peer.quiet();
  peer.send(accepted('m1'));
  assert.deepEqual(await peer.next('cancel'), { type: 'cancel', messageId: 'm1' });
  peer.send(start('m1', 1), token('m1', '1-1', 'part'), done('m1', '2-0', 4, { finishReason: 'cancelled' }));
  const result = await answer.cancel();
  assert.deepEqual([result.status, result.finishReason, result.text], ['cancelled', 'cancelled', 'part']);
});

test('cancel in the queue, before any attempt: done with the first id', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1', { position: 5 }));
  await nextEvent(client, 'accepted');
  void answer.cancel();
  await peer.next('cancel');
  peer.send(done('m1', '1-0', 0, { finishReason: 'cancelled' }));
  assert.equal((await answer.done).status, 'cancelled');
});

test('cancel while away: sent after the reconnect; of a request that got lost: ended here', async (t) => {
  const { server, client, peer } = await connected(t);
  const known = client.chat('x', { messageId: 'm1' });
  const lost = client.chat('y', { messageId: 'm2' });
  await peer.next('chat');
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'a'));
  await nextEvent(client, 'token');
  peer.kill();
  await nextEvent(client, 'disconnected');
  void known.cancel();
  void lost.cancel();
  const unsent = client.chat('never sent', { messageId: 'm3' });
  assert.equal((await unsent.cancel()).status, 'cancelled');
  const again = await server.accept();
  await again.ready();
  assert.equal((await again.next('resume')).messageId, 'm1');
  assert.equal((await again.next('cancel')).messageId, 'm1');
  assert.equal((await again.next('resume')).messageId, 'm2');
  assert.equal((await again.next('cancel')).messageId, 'm2');
  again.send(
    resumed('m1'),
    done('m1', '2-0', 1, { finishReason: 'cancelled' }),
    rejected('m2', 'unknown_message'),
  );
  assert.equal((await known.done).text, 'a');
  assert.equal((await lost.done).status, 'cancelled');
});

test('break leaves the answer running; cancelOnBreak and signal stop it', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), token('m1', '1-1', 'a'));
  for await (const _ of answer) break;
  await peer.quiet();
  peer.send(token('m1', '1-2', 'b'), done('m1', '1-3', 2));
  assert.equal((await answer.done).text, 'ab');

  const stopped = client.chat('x', { messageId: 'm2', cancelOnBreak: true });
  await peer.next('chat');
  peer.send(accepted('m2'), start('m2', 1), token('m2', '1-1', 'a'));
  for await (const _ of stopped) break;
  await peer.next('cancel');
  peer.send(done('m2', '2-0', 1, { finishReason: 'cancelled' }));
  await stopped.done;

  const controller = new AbortController();
  const aborted = client.chat('x', { messageId: 'm3', signal: controller.signal });
  await peer.next('chat');
  peer.send(accepted('m3'));
  await nextEvent(client, 'accepted');
  controller.abort();
  await peer.next('cancel');
  peer.send(done('m3', '1-0', 0, { finishReason: 'cancelled' }));
  assert.equal((await aborted.done).status, 'cancelled');
  assert.equal((await client.chat('x', { signal: controller.signal }).done).status, 'cancelled');
  await peer.quiet();
});

test('close codes: 4000–4499 and broken connections reconnect, 4500–4999 are final', async (t) => {
  const { server, client, peer } = await connected(t);
  const reconnecting = nextEvent(client, 'reconnecting');
  peer.close(4000, 'shutting down');
  assert.equal((await reconnecting).code, 4000);
  const second = await server.accept();
  await second.ready();
  second.close(1011);
  const third = await server.accept();
  await third.ready();
  const answer = client.chat('x');
  await third.next('chat');
  const gone = nextEvent(client, 'disconnected');
  third.send({ type: 'error', code: 'banned', message: 'This account is banned.' });
  third.close(4502, 'banned');
  assert.deepEqual(await gone, { code: 4502, reason: 'banned', final: true });
  const error = await errorOf(answer.done);
  assert.deepEqual([error.code, error.message, error.closeCode], ['banned', 'This account is banned.', 4502]);
  assert.equal(client.state, 'closed');
  assert.equal(await codeOf(client.connect()), 'banned');
  assert.equal(await codeOf(client.chat('x').done), 'banned');
  assert.equal(await codeOf(client.send({ user: 20002 }, 'x')), 'banned');
  await sleep(60);
  assert.equal(server.waiting.length, 0, 'no further connection');
});

test('a refused user id is told by connect()', async (t) => {
  const server = await startServer(t);
  const client = startClient(t, server.url, { userId: 7 });
  const connecting = client.connect();
  const peer = await server.accept();
  await peer.next('init');
  peer.send({ type: 'error', code: 'invalid_frame', message: 'userId 7 is reserved' });
  peer.close(4500, 'bad user id');
  await assert.rejects(connecting, {
    code: 'invalid_frame',
    message: 'userId 7 is reserved',
    closeCode: 4500,
  });
});

test('nobody there: connect() gives up after its time, the client goes on trying', async (t) => {
  const server = await startServer(t);
  const dead = await startServer(t);
  dead.server.close();
  await once(dead.server, 'close');
  const client = startClient(t, [dead.url]);
  assert.equal(await codeOf(client.connect({ timeoutMs: 100 })), 'timeout');
  assert.notEqual(client.state, 'closed');
  const tries: number[] = [];
  client.on('reconnecting', (event) => tries.push(event.delayMs));
  await nextEvent(client, 'reconnecting');
  assert.ok(tries.every((delayMs) => delayMs <= 40));
  client.setUrls([dead.url, server.url]);
  await (await server.accept()).ready();
  await client.connect();
});

test('a silent server is noticed, and the heartbeat keeps a quiet connection', async (t) => {
  const server = await startServer(t);
  const client = startClient(t, server.url);
  const ready = client.connect();
  const peer = await server.accept();
  await peer.ready({ heartbeatMs: 40 });
  await ready;
  for (let i = 0; i < 3; i++) {
    await peer.next('heartbeat');
    peer.send({ type: 'heartbeat', time: 1 });
  }
  await peer.next('heartbeat');
  const lost = await nextEvent(client, 'disconnected');
  assert.match(lost.reason, /silent/);
  const again = await server.accept();
  await again.ready({ heartbeatMs: 60_000 });
  await client.connect();
  client.wake();
  await again.next('heartbeat');
  again.send({ type: 'heartbeat', time: 1 });
  await again.quiet();
});

test('a server that never says ready is left for the next', async (t) => {
  const mute = await startServer(t);
  const good = await startServer(t);
  const client = startClient(t, [mute.url, good.url], { connectTimeoutMs: 50 });
  const ready = client.connect();
  await (await mute.accept()).next('init');
  await (await good.accept()).ready();
  await ready;
});

test('a request above the limit of the server is refused here', async (t) => {
  const server = await startServer(t);
  const client = startClient(t, server.url);
  const answer = client.chat('é'.repeat(300));
  const peer = await server.accept();
  await peer.ready({ maxFrameBytes: 500 });
  assert.equal(await codeOf(answer.done), 'payload_too_large');
  await peer.quiet();
  assert.equal(await codeOf(client.chat('x', { messageId: 'no spaces' }).done), 'invalid_frame');
});

test('a message to people above the limit is refused here, and harms nothing else', async (t) => {
  const server = await startServer(t);
  const client = startClient(t, server.url);
  const tooLong = client.send({ user: 20002 }, 'é'.repeat(300));
  const short = client.send({ user: 20002 }, 'hi', { messageId: 'd1' });
  const peer = await server.accept();
  await peer.ready({ maxFrameBytes: 500 });
  await assert.rejects(tooLong, { code: 'payload_too_large' });
  await peer.next('send');
  peer.send({ type: 'sent', messageId: 'd1', id: '1-0', online: 0 });
  assert.equal((await short).id, '1-0');
  await peer.quiet();
});

test('an answer that ends inside chat() is over only when its asker holds it', async (t) => {
  const server = await startServer(t);
  const client = startClient(t, server.url, { maxOpenAnswers: 1 });
  const ready = client.connect();
  await (await server.accept()).ready({ maxFrameBytes: 500 });
  await ready;
  const held = new Set<string>();
  const ended: unknown[] = [];
  client.on('ended', ({ messageId, status, error }) =>
    ended.push([messageId, held.has(messageId), status, error?.code]),
  );
  const hold = (answer: Answer) => {
    held.add(answer.messageId);
    return answer.done.catch(() => {});
  };
  await hold(client.chat('é'.repeat(300), { messageId: 'long' }));
  await hold(client.chat('x', { messageId: 'aborted', signal: AbortSignal.abort() }));
  void hold(client.chat('x', { messageId: 'open' }));
  await hold(client.chat('x', { messageId: 'second' }));
  assert.deepEqual(ended, [
    ['long', true, 'failed', 'payload_too_large'],
    ['aborted', true, 'cancelled', undefined],
    ['second', true, 'failed', 'too_many_pending'],
  ]);
});

test('bounds: open answers, and the same id twice is one answer', async (t) => {
  const { client, peer } = await connected(t, { maxOpenAnswers: 1 });
  const answer = client.chat('x', { messageId: 'm1' });
  assert.equal(client.chat('x', { messageId: 'm1' }), answer);
  assert.equal(await codeOf(client.chat('y').done), 'too_many_pending');
  await peer.next('chat');
  await peer.quiet();
});

test('people: send until sent, messages once, presence, groups, ack', async (t) => {
  const { server, client, peer } = await connected(t, { inboxAfter: '5-0' });
  const sending = client.send({ user: 20002 }, 'hi', { messageId: 'd1' });
  assert.deepEqual(await peer.next('send'), {
    type: 'send',
    messageId: 'd1',
    to: { user: '20002' },
    contents: 'hi',
  });
  const got: string[] = [];
  client.on('message', (frame) => got.push(frame.contents));
  const message = { type: 'message', from: '20002', sentAt: 1 };
  peer.send({ ...message, id: '6-0', messageId: 'a', contents: 'one' });
  await nextEvent(client, 'message');
  peer.kill();
  await nextEvent(client, 'disconnected');
  client.join('g1');
  client.ack('6-0');
  client.ack('6-1');
  const online = client.presence([20002, 'x']);
  const again = await server.accept();
  assert.equal((await again.ready()).inboxAfter, '6-0');
  assert.equal((await again.next('ack')).id, '6-1');
  await again.next('join');
  assert.equal((await again.next('send')).messageId, 'd1', 'not confirmed: sent again under the same id');
  assert.deepEqual((await again.next('presence')).userIds, ['20002', 'x']);
  again.send({ ...message, id: '6-0', messageId: 'a', contents: 'one' });
  again.send({ ...message, id: '7-0', messageId: 'b', contents: 'two' });
  again.send({ type: 'sent', messageId: 'd1', id: '9-0', online: 2 });
  again.send({ type: 'presence', online: { 20002: [{ device: 'phone', node: 'n1' }] } });
  assert.equal((await sending).online, 2);
  assert.deepEqual(await online, { 20002: [{ device: 'phone', node: 'n1' }] });
  assert.deepEqual(got, ['one', 'two']);
  const refused = client.send({ group: 'g1' }, 'x', { messageId: 'd2' });
  again.send(rejected('d2', 'forbidden'));
  assert.equal(await codeOf(refused), 'forbidden');
});

test('an answer about presence that comes late or twice is not taken for another question', async (t) => {
  const { client, peer } = await connected(t);
  await assert.rejects(client.presence(['a'], { timeoutMs: 1 }), { code: 'timeout' });
  const online = client.presence(['b', 'a']);
  for (let asked = 0; asked < 2; asked++) await peer.next('presence');
  const there = { b: [{ device: 'phone', node: 'n1' }] };
  peer.send({ type: 'presence', userIds: ['a'], online: {} });
  peer.send({ type: 'presence', userIds: ['b', 'a'], online: there });
  peer.send({ type: 'presence', userIds: ['b', 'a'], online: there });
  assert.deepEqual(await online, there);
});

test('questions about groups: answered, refused by name, asked again after a reconnect', async (t) => {
  const { server, client, peer } = await connected(t);
  const [joining, leaving, members, groups] = [
    client.join('g1'),
    client.leave('g2'),
    client.members('g1'),
    client.groups(),
  ];
  for (const type of ['join', 'leave', 'members', 'groups']) await peer.next(type);
  peer.send({ type: 'joined', group: 'g1', members: 3 });
  peer.send({ type: 'error', code: 'forbidden', message: 'leave: groups are managed by the operators' });
  assert.equal((await joining).members, 3);
  assert.equal(await codeOf(leaving), 'forbidden');
  peer.kill();
  const again = await server.accept();
  await again.ready();
  assert.deepEqual(await again.next('members'), { type: 'members', group: 'g1' });
  await again.next('groups');
  again.send({ type: 'members', group: 'g1', count: 2, userIds: ['a', 'b'] });
  again.send({ type: 'groups', groups: ['g1'] });
  assert.deepEqual((await members).userIds, ['a', 'b']);
  assert.deepEqual(await groups, ['g1']);
  assert.equal(await codeOf(client.join('no spaces')), 'invalid_frame');
  await again.quiet();
  const last = client.join('g9');
  await again.next('join');
  await client.close();
  assert.equal(await codeOf(last), 'closed');
  assert.equal(await codeOf(client.leave('g9')), 'closed');
});

test('a long line: open answers and new questions first, the rest as replies come', async (t) => {
  const server = await startServer(t);
  const client = startClient(t, server.url);
  const sending = Array.from({ length: 200 }, (_, index) =>
    client.send({ user: 20002 }, 'hi', { messageId: `d${index}` }),
  );
  const presences = Array.from({ length: 40 }, () => client.presence(['20002']));
  const joins = Array.from({ length: 40 }, (_, index) => client.join(`g${index}`));
  const answer = client.chat('x', { messageId: 'm1' });
  const peer = await server.accept();
  await peer.ready();
  await peer.next('chat');
  peer.send(accepted('m1'), start('m1', 1), done('m1', '1-1', 0));
  await answer.done;
  const written: string[] = [];
  for (let left = 280; left > 0; left--) {
    const frame = await peer.next(left > 240 ? 'join' : left > 40 ? 'send' : 'presence');
    peer.socket.ping();
    await once(peer.socket, 'pong');
    assert.ok(peer.waitingFrames.length <= 31, `${peer.waitingFrames.length + 1} frames without a reply`);
    if (frame.type === 'join') peer.send({ type: 'joined', group: frame.group, members: 1 });
    else if (frame.type === 'presence') peer.send({ type: 'presence', online: {} });
    else {
      written.push(frame.messageId as string);
      peer.send({ type: 'sent', messageId: frame.messageId, id: '9-0', online: 0 });
    }
  }
  await Promise.all([...sending, ...presences, ...joins]);
  assert.deepEqual(
    written,
    sending.map((_, index) => `d${index}`),
  );
  await peer.quiet();
});

test('refused as too fast: what was refused is written again after the time that the server names', async (t) => {
  const { client, peer } = await connected(t);
  const refusal = { temporary: true, retryAfterMs: 150 };
  const first = client.send({ user: 20002 }, 'first', { messageId: 'd1' });
  const second = client.send({ user: 20002 }, 'second', { messageId: 'd2' });
  const answer = client.chat('x', { messageId: 'm1' });
  const group = client.join('g1');
  const online = client.presence(['20002']);
  for (const type of ['send', 'send', 'chat', 'join', 'presence']) await peer.next(type);
  const before = Date.now();
  peer.send(rejected('d1', 'rate_limited', refusal), rejected('d2', 'rate_limited', refusal));
  peer.send(rejected('m1', 'rate_limited', refusal));
  peer.send({ type: 'error', code: 'rate_limited', message: 'slow down', retryAfterMs: 150 });
  const event = nextEvent(client, 'error');
  await event;
  const third = client.send({ user: 20002 }, 'third', { messageId: 'd3' });
  await peer.quiet();
  assert.equal((await peer.next('chat')).messageId, 'm1');
  assert.ok(Date.now() - before >= 140, 'nothing before that, not even what is new');
  await peer.next('join');
  for (const id of ['d1', 'd2', 'd3']) {
    assert.equal((await peer.next('send')).messageId, id, 'in their order');
    peer.send({ type: 'sent', messageId: id, id: '9-0', online: 0 });
  }
  await peer.next('presence');
  peer.send({ type: 'presence', online: {} });
  peer.send({ type: 'joined', group: 'g1', members: 1 }, accepted('m1'), start('m1', 1));
  peer.send(done('m1', '1-1', 0));
  await Promise.all([first, second, third, group, online, answer.done]);
});

test('refused as too fast for ever: told after a bounded number of tries; cancelled meanwhile, it ends', async (t) => {
  const { client, peer } = await connected(t, { reconnectBaseMs: 1, reconnectMaxMs: 1 });
  const refusal = { temporary: true, retryAfterMs: 5 };
  const sending = client.send({ user: 20002 }, 'x', { messageId: 'd1' });
  for (let tries = 0; tries < 9; tries++) {
    await peer.next('send');
    peer.send(rejected('d1', 'rate_limited', refusal));
  }
  const error = await errorOf(sending);
  assert.deepEqual([error.code, error.temporary, error.retryAfterMs], ['rate_limited', true, 5]);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.send(rejected('m1', 'rate_limited', { ...refusal, retryAfterMs: 50 }));
  await nextEvent(client, 'rejected');
  const cancelled = answer.cancel();
  await peer.next('resume');
  await peer.next('cancel');
  peer.send(rejected('m1', 'unknown_message'), rejected('m1', 'unknown_message'));
  assert.equal((await cancelled).status, 'cancelled');
});

test('close is final, ends everything, and leaves nothing behind', async (t) => {
  const { server, client, peer } = await connected(t);
  const before = process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length;
  const answer = client.chat('x', { messageId: 'm1' });
  const presence = client.presence(['20002']);
  await peer.next('chat');
  const reading = assert.rejects(readAll(answer), { code: 'closed' });
  const asked = assert.rejects(presence, { code: 'closed' });
  await client.close();
  await Promise.all([reading, asked, client.close()]);
  const [code] = await peer.closed;
  assert.equal(code, 1000);
  assert.equal(client.answers.size, 0);
  await sleep(60);
  assert.equal(server.waiting.length, 0);
  const after = process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length;
  assert.ok(after <= before, `timers: ${before} before, ${after} after`);

  const waiting = startClient(t, 'ws://127.0.0.1:1/ws');
  const connecting = waiting.connect();
  const closed = assert.rejects(connecting, { code: 'closed' });
  await nextEvent(waiting, 'reconnecting');
  await waiting.close();
  await closed;
});

test('garbage from the server changes nothing', async (t) => {
  const { client, peer } = await connected(t);
  const answer = client.chat('x', { messageId: 'm1' });
  await peer.next('chat');
  peer.socket.send('not json');
  peer.socket.send('null');
  peer.socket.send(Buffer.from([1, 2, 3]));
  peer.send(
    { type: 'token', messageId: 'm1', id: 'x', text: 'a' },
    { type: 'token', id: '1-1' },
    { type: '?' },
  );
  peer.send(token('other', '1-1', 'not mine'), accepted('m1'), start('m1', 1), done('m1', '1-1', 0));
  assert.equal((await answer.done).text, '');
});

test('urls are checked when the client is made', () => {
  for (const url of ['nonsense', 'ftp://x', []])
    assert.throws(() => createClient({ url, userId: 'ann', WebSocket }), ClientError);
  const client = createClient({ url: 'https://chat.example/?a=1', userId: 'ann@x', WebSocket });
  assert.equal(client.url, 'wss://chat.example/ws?a=1&userId=ann%40x');
});

test('the file has no import left when its types are stripped', async () => {
  const source = await readFile(new URL('../../shared/client.ts', import.meta.url), 'utf8');
  const { code } = await transform(source, { loader: 'ts', format: 'esm', target: 'es2022' });
  assert.doesNotMatch(code, /^\s*import\s/m);
  assert.doesNotMatch(code, /from\s+['"]/);
});

test('what the server would refuse without saying whose it was is refused here', async (t) => {
  const { client } = await connected(t);
  const long = 'x'.repeat(129);
  for (const asked of [
    client.send({ user: '20002' }, 'hi', { messageId: 'with space' }),
    client.send({ user: '20002' }, 'hi', { messageId: long }),
    client.send({ user: 'ü' }, 'hi'),
    client.send({ group: '' }, 'hi'),
    client.presence([]),
    client.presence(Array(101).fill('20002')),
    client.presence(['20002', 'a b']),
  ])
    await assert.rejects(asked, { code: 'invalid_frame' });
  assert.equal(await codeOf(client.chat('hi', { messageId: long }).done), 'invalid_frame');
});
