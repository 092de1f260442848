import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import type { AiStream, Sink } from '../../gateway/ai/ai-desk.ts';
import { AiSession, type AiSessionParts } from '../../gateway/ai/ai-session.ts';
import type { Question } from '../../gateway/ai/questions.ts';
import { createLogger } from '../../shared/logger.ts';

/** A session of the AI SDK whose every question is answered at once. */
function openSession() {
  const pings: string[] = [];
  const settled: string[] = [];
  const connection = {
    open: true,
    slow: false,
    send() {},
    close: (_: number, reason: string) => assert.fail(reason),
    ping: (payload: string) => pings.push(payload),
  };
  const parts = {
    aiDesk: {
      async ask(user: string, { messageId, conversationId }: Question, sink: Sink) {
        sink.end();
        return { user, chat: conversationId, messageId } as AiStream;
      },
      async settle(_: string, chat: string) {
        settled.push(chat);
      },
    },
    door: { enter() {}, leave() {} },
    authenticate: async (userId: string) => ({ userId, expiresMs: null }),
    rates: { take: () => 0 },
    addressLimit: { leave() {} },
    maxFrameBytes: 10_000,
    log: createLogger('silent', {}),
  } as unknown as AiSessionParts;
  const session = new AiSession(connection, { userId: '20001', token: '', address: '' }, parts);
  const ask = async (chat: string) => {
    const messages = [{ id: 'u1', role: 'user', parts: [{ type: 'text', text: 'x' }] }];
    session.onText(JSON.stringify({ type: 'send', requestId: chat, id: chat, messages }));
    await turn();
    await turn();
  };
  return { session, ask, pings, settled };
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
  const { session, ask, pings, settled } = openSession();
  for (let index = 1; index <= 100; index++) await ask(`chat-${index}`);
  assert.equal(pings.length, 100);
  for (const payload of pings) session.onPong(payload);
  assert.equal(settled.length, 64);
  assert.equal(settled.at(-1), 'chat-100');
});
