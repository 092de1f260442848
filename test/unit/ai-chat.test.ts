import assert from 'node:assert/strict';
import { test } from 'node:test';
import { type AiChatParts, createAiChat } from '../../gateway/http/ai-chat.ts';
import type { HttpCall } from '../../gateway/socket-server.ts';

/** The HTTP of the AI SDK alone. */

/** Calls that all come to this error. */
function openChat(error: Error) {
  const warnings: object[] = [];
  const fail = async () => {
    throw error;
  };
  const aiChat = createAiChat({
    aiDesk: { ask: fail, resume: fail, stop: fail },
    door: { enter() {}, leave() {} },
    authenticate: async (userId: string) => ({ userId, expiresMs: null }),
    rates: { takeUser: () => 0 },
    addressLimit: { enter: () => true, leave() {} },
    addressOf: () => '',
    origins: { allows: () => true },
    maxFrameBytes: 262_144,
    log: { warn: (facts: object) => warnings.push(facts) },
  } as unknown as AiChatParts);
  const call = (method: string, path: string, body: object | string = '') =>
    aiChat.answer({
      method,
      path,
      query: new URLSearchParams('userId=20001'),
      headers: new Map([['origin', 'https://page.example']]),
      body: Buffer.from(typeof body === 'string' ? body : JSON.stringify(body)),
      address: '',
    } satisfies HttpCall)!;
  return { call, warnings };
}

const question = { id: 'x', messages: [{ id: 'u1', role: 'user', parts: [{ type: 'text', text: 'x' }] }] };

test('while Redis is away the answer is 503, in the words and with the headers of every refusal', async () => {
  const error = Object.assign(new Error('x'), { name: 'MaxRetriesPerRequestError' });
  const { call, warnings } = openChat(error);
  for (const answer of [
    await call('POST', '/api/chat', question),
    await call('GET', '/api/chat/x/stream'),
    await call('POST', '/api/chat/x/stop'),
  ]) {
    assert.equal(answer.status, 503);
    const { error } = JSON.parse(String(answer.body));
    assert.deepEqual([error.code, error.temporary], ['internal', true]);
    assert.ok(Number(answer.headers!['retry-after']) > 0);
    assert.equal(answer.headers!['access-control-allow-origin'], 'https://page.example');
    assert.equal(answer.headers!['access-control-expose-headers'], 'retry-after');
  }
  const err = 'Redis does not answer';
  assert.deepEqual(
    warnings,
    ['ask', 'stream', 'stop'].map((what) => ({ err, call: what })),
  );
  await assert.rejects(openChat(new TypeError('a mistake of ours')).call('POST', '/api/chat', question));
});

test('a page of another origin may send what the SDK sends, its user agent too', async () => {
  const { call } = openChat(new Error('x'));
  const { status, headers } = await call('OPTIONS', '/api/chat');
  assert.equal(status, 204);
  const allowed = headers!['access-control-allow-headers']!.split(', ');
  for (const name of ['authorization', 'content-type', 'user-agent']) assert.ok(allowed.includes(name), name);
});

test('parameters that are nested too deeply are refused', async () => {
  const { call } = openChat(new Error('not reached'));
  const deep = `${'['.repeat(100_000)}${']'.repeat(100_000)}`;
  const body = `${JSON.stringify(question).slice(0, -1)},"parameters":{"deep":${deep}}}`;
  const answer = await call('POST', '/api/chat', body);
  assert.equal(answer.status, 400);
  assert.match(String(answer.body), /invalid_frame.*nested too deeply/);
});

test('its timer ends with it', (t) => {
  const made = t.mock.method(globalThis, 'setInterval');
  const cleared = t.mock.method(globalThis, 'clearInterval');
  const aiChat = createAiChat({} as AiChatParts);
  aiChat.stop();
  assert.equal(made.mock.calls.length, 1);
  assert.equal(cleared.mock.calls[0]!.arguments[0], made.mock.calls[0]!.result);
});
