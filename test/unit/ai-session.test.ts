import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import type { AiStream, Sink } from '../../gateway/ai/ai-desk.ts';
import { AiSession, type AiSessionParts } from '../../gateway/ai/ai-session.ts';
import {
  type AiPost,
  parseAiFrame,
  parseAiPost,
  type Question,
  readQuestion,
} from '../../gateway/ai/questions.ts';
import type { GatewayMetrics } from '../../gateway/metrics.ts';

/** A session of the AI SDK whose every question is answered at once, or comes to an error. */
function openSession(error?: Error) {
  const pings: string[] = [];
  const settled: string[] = [];
  const cancelled: string[] = [];
  const closes: number[] = [];
  const sent: { type: string }[] = [];
  const logged: [level: string, facts: { err: unknown }][] = [];
  const connection = {
    open: true,
    slow: false,
    send: (text: string) => sent.push(JSON.parse(text)),
    close: (code: number) => closes.push(code),
    ping: (payload: string) => pings.push(payload),
  };
  const parts = {
    aiDesk: {
      async ask(user: string, { messageId, conversationId }: Question, sink: Sink) {
        if (error) throw error;
        sink.end();
        return { user, chat: conversationId, messageId } as AiStream;
      },
      async resume(user: string, chat: string) {
        return { user, chat, messageId: 'm' } as AiStream;
      },
      leave() {},
      async cancel(_: string, chat: string) {
        cancelled.push(chat);
        return true;
      },
      async settle(_: string, chat: string) {
        settled.push(chat);
      },
    },
    door: { enter() {}, leave() {} },
    authenticate: async (userId: string) => ({ userId, expiresMs: null }),
    metrics: { protocolErrors: { inc() {} } } as GatewayMetrics,
    rates: { take: () => 0 },
    addressLimit: { leave() {} },
    maxFrameBytes: 10_000,
    log: {
      warn: (facts: { err: unknown }) => logged.push(['warn', facts]),
      error: (facts: { err: unknown }) => logged.push(['error', facts]),
    },
  } as unknown as AiSessionParts;
  const session = new AiSession(connection, { userId: '20001', token: '', address: '' }, parts);
  const ask = async (chat: string) => {
    const messages = [{ id: 'u1', role: 'user', parts: [{ type: 'text', text: 'x' }] }];
    session.onText(JSON.stringify({ type: 'send', requestId: chat, id: chat, messages }));
    await turn();
    await turn();
  };
  return { session, ask, pings, settled, cancelled, closes, sent, logged };
}

test('an end counts as arrived when the ping behind it is answered', async () => {
  const { session, ask, pings, settled } = openSession();
  await ask('a');
  await ask('b');
  assert.deepEqual([pings.length, settled], [2, []]);
  session.onPong(pings[1]!);
  session.onPong(pings[1]!);
  session.onPong('something else');
  assert.deepEqual(settled, ['b']);
});

test('a client that answers no pings is remembered for its last answers only', async () => {
  const { session, ask, pings, settled, closes } = openSession();
  for (let index = 1; index <= 100; index++) await ask(`chat-${index}`);
  assert.equal(pings.length, 100);
  for (const payload of pings) session.onPong(payload);
  assert.equal(settled.length, 64);
  assert.equal(settled.at(-1), 'chat-100');
  assert.deepEqual(closes, []);
});

test('frames that make no sense, 20 in a row, close it', async () => {
  const { session, ask, closes } = openSession();
  const nonsense = (count: number) => {
    for (let index = 0; index < count; index++) session.onText('{"type":"send","requestId":"r","id":"x"}');
  };
  nonsense(19);
  await ask('a');
  nonsense(19);
  assert.deepEqual(closes, []);
  nonsense(1);
  assert.deepEqual(closes, [4503]);
});

test('a stop that waits in line is carried out when the client leaves; what else waits is not', async () => {
  const { session, ask, cancelled, sent } = openSession();
  await ask('first'); // bound
  session.onText('{"type":"resume","requestId":"r1","id":"a"}');
  session.onText('{"type":"resume","requestId":"r2","id":"b"}');
  session.onText('{"type":"abort","requestId":"r1"}');
  session.onText('{"type":"abort","requestId":"r2"}');
  session.onClose();
  await turn();
  assert.deepEqual(cancelled, ['a']);
  assert.equal(sent.filter(({ type }) => type === 'error').length, 0);
});

test('a request id that is being answered: the same again is silent, anything else is told', async () => {
  const { session, ask, sent } = openSession();
  await ask('bound');
  const errors = () => sent.filter(({ type }) => type === 'error');
  const resume = async (chat: string) => {
    session.onText(JSON.stringify({ type: 'resume', requestId: 'r1', id: chat }));
    await turn();
  };
  await resume('a');
  await resume('a');
  assert.deepEqual(errors(), []);
  await resume('b');
  session.onText(JSON.stringify({ type: 'send', requestId: 'r1', id: 'a', messages: [message()] }));
  await turn();
  const errorText = 'requestId r1 has another answer under way';
  const told = { type: 'error', requestId: 'r1', errorText };
  assert.deepEqual(errors(), [told, told]);
});

test('while Redis is away a frame fails with a warning, without a stack', async () => {
  const away = openSession(Object.assign(new Error('x'), { name: 'MaxRetriesPerRequestError' }));
  await away.ask('a');
  assert.deepEqual(
    away.sent.map(({ type }) => type),
    ['error'],
  );
  const [[level, { err }]] = away.logged as [(typeof away.logged)[0]];
  assert.deepEqual([level, err], ['warn', 'Redis does not answer']);
  const ours = openSession(new TypeError('a mistake of ours'));
  await ours.ask('a');
  assert.equal(ours.logged[0]![0], 'error');
});

const message = (more: object = {}) => ({
  id: 'u',
  role: 'user',
  parts: [{ type: 'text', text: 'x' }],
  ...more,
});
const reasonOf = (messages: unknown) => {
  const parsed = parseAiPost(JSON.stringify({ id: 'x', messages }));
  return 'reason' in parsed ? parsed.reason : 'none';
};

test('messages are looked at one by one, up to the first wrong one', () => {
  const wrong = Array.from({ length: 99_999 }, () => ({}));
  assert.match(reasonOf(wrong), /^messages\.98998\.id is missing$/);
  assert.match(reasonOf([message(), message({ role: 'x' }), {}]), /^messages\.1\.role must be one of [^;]*$/);
  assert.match(
    reasonOf([message({ parts: [{ type: 'text' }, {}, {}] })]),
    /^messages\.0\.parts\.1\.type is missing$/,
  );
  assert.match(
    reasonOf([message({ parts: wrong })]),
    /^messages\.0\.parts must be a list of at most 1000 parts$/,
  );
  for (const none of [undefined, null, {}, [], 'x']) assert.match(reasonOf(none), /^messages[^;]*$/);
  const headers = Object.fromEntries(wrong.map((_, index) => [index, index]));
  const frame = { type: 'resume', requestId: 'r', id: 'x', headers };
  assert.deepEqual(parseAiFrame(JSON.stringify(frame)), { frame: { ...frame, headers: {} } });
});

test('of a long chat the last thousand messages before the question are read, older ones are not looked at', () => {
  const messages = [{}, ...Array.from({ length: 1_000 }, () => message({ role: 'assistant' })), message()];
  const parsed = parseAiPost(JSON.stringify({ id: 'x', messages }));
  assert.ok('post' in parsed);
  assert.equal(parsed.post.messages.length, 1_001);
});

test('null is what is absent', () => {
  const ask = { id: 'x', messages: [message()] };
  const none = { trigger: null, messageId: null };
  const extras = { model: null, parameters: null, userId: null };
  const { post } = parseAiPost(JSON.stringify({ ...ask, ...none, ...extras })) as { post: AiPost };
  const read = readQuestion(post, 10_000);
  assert.deepEqual(read, readQuestion((parseAiPost(JSON.stringify(ask)) as { post: AiPost }).post, 10_000));
  assert.ok('question' in read);
  const head = { requestId: 'r', id: 'x', headers: null, body: null };
  for (const frame of [
    { type: 'send', ...head, ...none, messages: [message()] },
    { type: 'send', ...head, body: extras, headers: { authorization: null }, messages: [message()] },
    { type: 'resume', ...head, lastSequence: null },
  ])
    assert.ok('frame' in parseAiFrame(JSON.stringify(frame)), JSON.stringify(frame));
});
