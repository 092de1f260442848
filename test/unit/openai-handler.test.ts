import assert from 'node:assert/strict';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { test as nodeTest, type TestContext } from 'node:test';
import { setTimeout as wait } from 'node:timers/promises';
import { RivuletError } from '../../shared/errors.ts';
import type { HandlerRequest } from '../../worker/handler.ts';
import { chatCompletionsUrl, createOpenAiHandler, type OpenAiOptions } from '../../worker/models/openai.ts';
import { readRetryAfter } from '../../worker/models/openai-errors.ts';
import { callHandler } from '../helpers/handler-call.ts';
import { type ScriptedCall, startScriptedOpenAi } from '../helpers/scripted-openai.ts';

const KEY = 'sk-test-0123456789';

/** A connection that is not closed shows as a test that hangs: it fails here, by its name. */
const test = (name: string, run: (t: TestContext) => Promise<void> | void) =>
  nodeTest(name, { timeout: 10_000 }, run);

/** A server, and a way to ask it. Fails the test if a call leaves a listener on the signal. */
async function setUp(t: TestContext, options: Partial<OpenAiOptions> = {}) {
  const server = await startScriptedOpenAi(t);
  const handler = createOpenAiHandler({
    baseUrl: server.baseUrl,
    apiKey: KEY,
    model: 'model-a',
    contextTokens: 8192,
    timeouts: { firstTokenMs: 10_000, betweenTokensMs: 10_000 },
    ...options,
  });
  const ask = async (request: Partial<HandlerRequest> = {}) => {
    const answer = callHandler(handler, request);
    t.after(() => assert.equal(answer.listeners(), 0, 'a listener is left on the signal'));
    // A generator runs only when it is read: the first read sends the request.
    const first = answer.next();
    first.catch(() => {});
    const call = await server.next();
    return { answer, first, call };
  };
  return { server, handler, ask };
}

/** Asks, lets the script run, and gives the error that came of it. */
async function failureOf(
  t: TestContext,
  script: (call: ScriptedCall) => void,
  options: Partial<OpenAiOptions> = {},
) {
  const { server, handler } = await setUp(t, options);
  const answer = callHandler(handler, {});
  const failure = answer.failure();
  failure.catch(() => {});
  const call = await server.next();
  script(call);
  const { pieces, error } = await failure;
  assert.ok(error instanceof RivuletError, `not a RivuletError: ${error}`);
  assert.equal(answer.listeners(), 0);
  assert.ok(!error.message.includes(KEY), 'the key is in the message');
  return { pieces, error, call, server };
}

test('streams token by token, as they come, and returns finish reason and usage', async (t) => {
  const { ask } = await setUp(t, { systemPrompt: 'Be brief.' });
  const { answer, first, call } = await ask({
    contents: 'How deep is it?',
    history: [{ role: 'user', content: 'hi' }],
  });
  assert.equal(call.path, '/v1/chat/completions');
  assert.equal(call.headers.authorization, `Bearer ${KEY}`);
  assert.deepEqual(call.body, {
    model: 'model-a',
    messages: [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: 'hi' },
      { role: 'user', content: 'How deep is it?' },
    ],
    stream: true,
    stream_options: { include_usage: true },
  });
  call.chunk({ choices: [{ index: 0, delta: { role: 'assistant', content: '' } }] });
  call.token('Very');
  assert.equal(await first, 'Very');
  call.token(' deep 🌊');
  assert.equal(await answer.next(), ' deep 🌊');
  call.finishReason('length');
  call.usage(12, 3);
  call.done();
  assert.deepEqual(await answer.rest(), {
    pieces: [],
    text: '',
    result: { finishReason: 'length', usage: { promptTokens: 12, completionTokens: 3 } },
  });
});

test('the request may name the model and harmless parameters, and nothing else', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask({
    model: 'model-b',
    parameters: {
      temperature: 0.5,
      max_tokens: 9,
      stop: ['\n'],
      n: 50,
      tools: [{}],
      stream: false,
      tokens: 3,
    },
  });
  assert.equal(call.body.model, 'model-b');
  assert.equal(call.body.temperature, 0.5);
  assert.equal(call.body.max_tokens, 9);
  assert.deepEqual(call.body.stop, ['\n']);
  assert.equal(call.body.stream, true);
  for (const field of ['n', 'tools', 'tokens']) assert.equal(field in call.body, false, field);
  call.token('x');
  call.finish();
  await first;
  await answer.rest();
});

test('a parameter of the wrong type is refused with its name, before any request', async (t) => {
  const { server, handler } = await setUp(t);
  const { error } = await callHandler(handler, { parameters: { temperature: 'hot' } }).failure();
  assert.ok(error instanceof RivuletError);
  assert.equal(error.code, 'invalid_frame');
  assert.equal(error.temporary, false);
  assert.match(error.message, /parameters\.temperature/);
  assert.equal(server.requests, 0);
});

test('multi-byte characters and events cut anywhere arrive whole', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask();
  const bytes = Buffer.from(
    `: keep-alive\r\n\r\ndata: ${JSON.stringify({ choices: [{ delta: { content: 'né 🌊' } }] })}\r\n\r\n`,
  );
  for (const byte of bytes) {
    call.raw(Uint8Array.of(byte));
    if (byte > 127) await wait(1); // gives the network a chance to deliver the halves apart
  }
  call.finish();
  assert.equal(await first, 'né 🌊');
  await answer.rest();
});

test('abort between tokens closes the connection to the provider at once', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask();
  call.token('one');
  await first;
  const reading = answer.next();
  const reason = new Error('cancelled');
  answer.abort(reason);
  await assert.rejects(reading, reason);
  assert.equal(await call.closed, 'aborted');
});

test('abort while nobody reads closes the connection too', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask();
  call.token('one');
  await first;
  answer.abort();
  assert.equal(await call.closed, 'aborted');
  await assert.rejects(answer.next());
});

test('abort before the head of the answer closes the connection', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask();
  const reason = new Error('takeover');
  answer.abort(reason);
  assert.equal(await call.closed, 'aborted');
  await assert.rejects(first, reason);
});

test('a reader that leaves closes the connection', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask();
  call.token('one');
  await first;
  await answer.leave();
  assert.equal(await call.closed, 'aborted');
});

test('calls after one another share connections', async (t) => {
  const { server, ask } = await setUp(t);
  for (let round = 0; round < 10; round++) {
    const { answer, first, call } = await ask();
    call.token('x');
    await first;
    call.finish();
    await answer.rest();
    assert.equal(await call.closed, 'complete');
  }
  // Not 1: plain fetch, read to the end ten times, opens two as well.
  assert.ok(server.connections <= 2, `${server.connections} connections`);
});

for (const status of [408, 409, 425, 429, 500, 502, 503, 529])
  test(`${status} is temporary`, async (t) => {
    const { error } = await failureOf(t, (call) =>
      call.respond(status, { error: { message: 'try later' } }, { 'retry-after': '7' }),
    );
    assert.equal(error.code, 'model_error');
    assert.equal(error.temporary, true);
    assert.equal(error.retryAfterMs, 7_000);
    assert.match(error.message, new RegExp(`${status}: try later`));
  });

for (const status of [400, 401, 403, 404, 422, 307])
  test(`${status} is final, with the provider's message but not the key`, async (t) => {
    const { error, server } = await failureOf(t, (call) =>
      call.respond(status, { error: { message: `no use with ${KEY}\n or sk-ab***yz ${'x'.repeat(5_000)}` } }),
    );
    assert.equal(error.code, 'model_error');
    assert.equal(error.temporary, false);
    assert.equal(error.retryAfterMs, undefined);
    assert.match(error.message, new RegExp(`${status}: no use with \\[key\\] or \\[key\\] xxx`));
    assert.ok(error.message.length < 400);
    assert.equal(server.requests, 1);
  });

test('Retry-After: seconds, an HTTP date, milliseconds, nonsense', () => {
  const now = Date.parse('2026-03-01T10:00:00Z');
  const read = (headers: Record<string, string>) => readRetryAfter(new Headers(headers), now);
  assert.equal(read({ 'retry-after': '2' }), 2_000);
  assert.equal(read({ 'retry-after': '0.5' }), 500);
  assert.equal(read({ 'retry-after': 'Sun, 01 Mar 2026 10:00:30 GMT' }), 30_000);
  assert.equal(read({ 'retry-after': 'Sun, 01 Mar 2026 09:00:00 GMT' }), 0);
  assert.equal(read({ 'retry-after': '9', 'retry-after-ms': '120' }), 120);
  assert.equal(read({ 'retry-after': '999999999' }), 3_600_000);
  for (const text of ['', 'soon', '-1', 'NaN']) assert.equal(read({ 'retry-after': text }), undefined, text);
  assert.equal(read({}), undefined);
});

test('a server that refuses stream_options is asked again without, and not bothered again', async (t) => {
  const { server, ask } = await setUp(t);
  {
    const { answer, first, call } = await ask();
    call.respond(422, {
      detail: [{ loc: ['body', 'stream_options'], msg: 'Extra inputs are not permitted' }],
    });
    const again = await server.next();
    assert.equal('stream_options' in again.body, false);
    again.token('fine');
    again.finish();
    assert.equal(await first, 'fine');
    assert.deepEqual((await answer.rest()).result, { finishReason: 'stop', usage: undefined });
  }
  const { answer, first, call } = await ask();
  assert.equal('stream_options' in call.body, false);
  call.token('x');
  call.finish();
  await first;
  await answer.rest();
  assert.equal(server.requests, 3);
});

test('a refusal of stream_options that stays a refusal is final', async (t) => {
  const { server, ask } = await setUp(t);
  const { first, call } = await ask();
  call.respond(400, { error: "property 'stream_options' is unsupported" });
  (await server.next()).respond(400, { error: "property 'stream_options' is unsupported" });
  await assert.rejects(first, { code: 'model_error', temporary: false });
  assert.equal(server.requests, 2);
});

test('a user who names a model include_usage does not switch off usage', async (t) => {
  const { server, ask } = await setUp(t);
  const refusal = { error: 'Invalid model name passed in model=include_usage' };
  const { first, call } = await ask({ model: 'include_usage' });
  call.respond(400, refusal);
  (await server.next()).respond(400, refusal);
  await assert.rejects(first, { code: 'model_error', temporary: false });
  const next = await ask();
  assert.deepEqual(next.call.body.stream_options, { include_usage: true });
  next.call.token('x');
  next.call.finish();
  await next.first;
  await next.answer.rest();
});

test('connection refused is temporary', async (t) => {
  const { server, handler } = await setUp(t);
  await server.stop();
  const { error } = await callHandler(handler, {}).failure();
  assert.ok(error instanceof RivuletError);
  assert.equal(error.code, 'model_error');
  assert.equal(error.temporary, true);
  assert.match(error.message, /ECONNREFUSED/);
});

test('a connection cut in the middle is temporary; the text before it arrived', async (t) => {
  const { server, ask } = await setUp(t);
  const { answer, first, call } = await ask();
  call.token('half');
  assert.equal(await first, 'half');
  call.cut();
  await assert.rejects(answer.next(), { code: 'model_error', temporary: true });
  assert.equal(server.requests, 1);
});

test('a connection cut before the head is temporary', async (t) => {
  const { error } = await failureOf(t, (call) => call.cut());
  assert.deepEqual([error.code, error.temporary], ['model_error', true]);
});

test('a stream that ends without finish reason and [DONE] was cut', async (t) => {
  const { error, pieces } = await failureOf(t, (call) => {
    call.token('half');
    call.end();
  });
  assert.deepEqual(pieces, ['half']);
  assert.deepEqual([error.code, error.temporary], ['model_error', true]);
  assert.match(error.message, /cut in the middle/);
});

test('a body that ends in the middle of an event was cut', async (t) => {
  const { error } = await failureOf(t, (call) => {
    call.raw('data: {"choices":[{"del');
    call.end();
  });
  assert.equal(error.temporary, true);
  assert.match(error.message, /cut in the middle/);
});

test('after the finish reason the answer is complete, whatever the trailer does', async (t) => {
  const { ask } = await setUp(t, {
    timeouts: { firstTokenMs: 10_000, betweenTokensMs: 30 },
  });
  const trailers: ((call: ScriptedCall) => void)[] = [
    (call) => call.end(),
    (call) => call.cut(),
    (call) => call.raw('data: {oops\n\n'),
    () => {}, // leaves the connection open
  ];
  for (const trailer of trailers) {
    const { answer, first, call } = await ask();
    call.token('all');
    assert.equal(await first, 'all');
    call.finishReason('stop');
    trailer(call);
    assert.equal((await answer.rest()).result?.finishReason, 'stop');
    await call.closed;
  }
});

test('[DONE] without a finish reason counts as stop', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask();
  call.token('x');
  call.done();
  await first;
  assert.equal((await answer.rest()).result?.finishReason, 'stop');
});

for (const [name, bytes] of [
  ['broken JSON', 'data: {"choices":[{"del\n\n'],
  ['a wrong shape', 'data: {"choices":"none"}\n\n'],
  ['text that is no string', 'data: {"choices":[{"delta":{"content":7}}]}\n\n'],
  ['an endless event', `data: ${'x'.repeat(1_100_000)}`],
] as const)
  test(`malformed chunk: ${name} is temporary, and the connection is closed`, async (t) => {
    const { error, pieces, call } = await failureOf(t, (scripted) => {
      scripted.token('good');
      scripted.raw(bytes);
    });
    assert.deepEqual(pieces, ['good']);
    assert.deepEqual([error.code, error.temporary], ['model_error', true]);
    assert.equal(await call.closed, 'aborted');
  });

test('an error object inside the stream ends the answer, temporary unless it says otherwise', async (t) => {
  const cases: [unknown, boolean][] = [
    [{ error: { message: 'overloaded' } }, true],
    [{ error: { message: 'overloaded', code: 503 } }, true],
    [{ error: { message: 'overloaded', code: 400 } }, false],
    [{ object: 'error', message: 'overloaded', type: 'BadRequestError' }, false],
    [{ error: 'overloaded' }, true],
  ];
  for (const [chunk, temporary] of cases) {
    const { error, pieces } = await failureOf(t, (call) => {
      call.token('a');
      call.chunk(chunk);
    });
    assert.deepEqual(pieces, ['a']);
    assert.deepEqual([error.code, error.temporary], ['model_error', temporary], JSON.stringify(chunk));
    assert.match(error.message, /overloaded/);
  }
  const { error } = await failureOf(t, (call) => call.raw('error: {"code":500,"message":"slot lost"}\n\n'));
  assert.match(error.message, /slot lost/);
});

test('an empty answer is temporary, except when a content filter took it', async (t) => {
  const { error } = await failureOf(t, (call) => call.finish('stop'));
  assert.deepEqual([error.code, error.temporary], ['model_error', true]);
  assert.match(error.message, /empty/);

  const { server, handler } = await setUp(t);
  const answer = callHandler(handler, {});
  const rest = answer.rest();
  (await server.next()).finish('content_filter');
  assert.deepEqual((await rest).result, { finishReason: 'content_filter', usage: undefined });
});

test('no text within max_tokens is final: it would be the same again', async (t) => {
  const { error } = await failureOf(t, (call) => call.finish('length'));
  assert.deepEqual([error.code, error.temporary], ['model_error', false]);
  assert.match(error.message, /length/);
});

const WHOLE = '{"choices":[{"delta":{"content":"whole"},"finish_reason":"stop"}]}';
for (const [name, body, type] of [
  ['a last event without a blank line', `data: ${WHOLE}`],
  ['[DONE] without a newline', 'data: {"choices":[{"delta":{"content":"whole"}}]}\n\ndata: [DONE]'],
  ['an empty event', `data:\n\ndata: ${WHOLE}\n\n`],
  [
    'a content part without text',
    `data: {"choices":[{"delta":{"content":[{"type":"text","text":null}]}}]}\n\ndata: ${WHOLE}\n\n`,
  ],
  ['tool calls of another shape', `data: {"choices":[{"delta":{"tool_calls":{}}}]}\n\ndata: ${WHOLE}\n\n`],
  ['an empty error', `data: {"error":"","choices":[]}\n\ndata: {"error":null}\n\ndata: ${WHOLE}\n\n`],
  ['events labelled as JSON', `: hello\n\ndata: ${WHOLE}\n\n`, 'application/json'],
] as const)
  test(`${name} does not fail the answer`, async (t) => {
    const { ask } = await setUp(t);
    const { answer, first, call } = await ask();
    call.respond(200, body, { 'content-type': type ?? 'text/event-stream' });
    assert.equal(await first, 'whole');
    assert.equal((await answer.rest()).result?.finishReason, 'stop');
  });

test('events labelled as JSON are read as they come', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask();
  call.open({ 'content-type': 'application/json' });
  call.token('one');
  assert.equal(await first, 'one');
  call.finish();
  await answer.rest();
});

test('the provider keeps its words: an event named error, a final error that ends the body', async (t) => {
  for (const [body, temporary] of [
    ['event: error\ndata: {"message":"overloaded"}\n\n', true],
    ['event: error\ndata: {"error":{"message":"overloaded","code":400}}\n\n', false],
    ['data: {"error":{"message":"overloaded","code":400}}', false],
  ] as const) {
    const { error } = await failureOf(t, (call) =>
      call.respond(200, body, { 'content-type': 'text/event-stream' }),
    );
    assert.deepEqual([error.code, error.temporary], ['model_error', temporary], body);
    assert.match(error.message, /overloaded/);
  }
});

test('reasoning and tool calls are no text but signs of life', async (t) => {
  for (const delta of [
    { reasoning_content: 'hm' },
    { tool_calls: [{ index: 0 }] },
    { content: [{ type: 'thinking', thinking: [{ type: 'text', text: 'hm' }] }] },
  ]) {
    // The first-token limit is over with the sign of life: now the limit between tokens applies.
    const { error, pieces, call } = await failureOf(
      t,
      (scripted) => scripted.chunk({ choices: [{ delta }] }),
      {
        timeouts: { firstTokenMs: 2_000, betweenTokensMs: 30 },
      },
    );
    assert.deepEqual([error.code, error.temporary, pieces], ['model_timeout', true, []]);
    assert.match(error.message, /fell silent/);
    assert.equal(await call.closed, 'aborted');
  }
});

test('no first token in time: keep-alive comments and empty deltas do not count', async (t) => {
  const { error, call } = await failureOf(
    t,
    (scripted) => {
      scripted.raw(': waiting\n\n');
      scripted.chunk({ choices: [{ delta: { role: 'assistant', content: '' } }] });
    },
    { timeouts: { firstTokenMs: 40, betweenTokensMs: 10_000 } },
  );
  assert.deepEqual([error.code, error.temporary], ['model_timeout', true]);
  assert.match(error.message, /no token within 40 ms/);
  assert.equal(await call.closed, 'aborted');
});

test('no head in time is the same', async (t) => {
  const { error, call } = await failureOf(t, () => {}, {
    timeouts: { firstTokenMs: 40, betweenTokensMs: 10_000 },
  });
  assert.equal(error.code, 'model_timeout');
  assert.equal(await call.closed, 'aborted');
});

test('a busy reader is no silence of the model', async (t) => {
  const { ask } = await setUp(t, {
    timeouts: { firstTokenMs: 10_000, betweenTokensMs: 40 },
  });
  const { answer, first, call } = await ask();
  call.token('one');
  await first;
  await wait(120); // three times the limit; time itself is the subject here
  call.token('two');
  call.finish();
  assert.equal(await answer.next(), 'two');
  await answer.rest();
});

test('a server that does not stream is understood', async (t) => {
  const { ask } = await setUp(t);
  const { answer, first, call } = await ask();
  call.respond(200, {
    choices: [{ index: 0, message: { role: 'assistant', content: 'whole' }, finish_reason: 'stop' }],
    usage: { prompt_tokens: 1, completion_tokens: 1 },
  });
  assert.equal(await first, 'whole');
  assert.deepEqual((await answer.rest()).result, {
    finishReason: 'stop',
    usage: { promptTokens: 1, completionTokens: 1 },
  });
});

test('a web page in place of an answer is a final error that names the setting', async (t) => {
  const { error } = await failureOf(t, (call) =>
    call.respond(200, '<html>welcome</html>', { 'content-type': 'text/html' }),
  );
  assert.equal(error.temporary, false);
  assert.match(error.message, /OPENAI_BASE_URL/);
});

test('a question that is too long is refused before any request', async (t) => {
  const { server, handler } = await setUp(t, { contextTokens: 50 });
  const { error } = await callHandler(handler, { contents: 'word '.repeat(500) }).failure();
  assert.ok(error instanceof RivuletError);
  assert.deepEqual([error.code, error.temporary], ['payload_too_large', false]);
  assert.equal(server.requests, 0);
});

test('no timer outlives a call', async (t) => {
  const timers = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length;
  const { ask } = await setUp(t);
  // The HTTP client keeps a timer of its own for idle connections, so compare a second call with a first.
  const counts: number[] = [];
  for (let round = 0; round < 4; round++) {
    const { answer, first, call } = await ask();
    call.token('x');
    await first;
    call.finish();
    await answer.rest();
    await call.closed;
    counts.push(timers());
  }
  assert.ok(counts.at(-1)! <= counts[0]! + 1, `timers pile up: ${counts}`);
});

test('base addresses with and without /v1 and slash', () => {
  const cases: [string, string][] = [
    ['http://h:11434', 'http://h:11434/v1/chat/completions'],
    ['http://h:11434/', 'http://h:11434/v1/chat/completions'],
    ['http://h:11434/v1', 'http://h:11434/v1/chat/completions'],
    ['http://h:11434/v1//', 'http://h:11434/v1/chat/completions'],
    ['http://h/v1/chat/completions', 'http://h/v1/chat/completions'],
    ['https://h/chat/completions/', 'https://h/chat/completions'],
    ['https://h/compatible-mode/v1', 'https://h/compatible-mode/v1/chat/completions'],
    ['https://h/compatible-mode', 'https://h/compatible-mode/v1/chat/completions'],
    ['https://h/v1beta/openai/', 'https://h/v1beta/openai/chat/completions'],
    ['https://h/api/v1?api-version=2', 'https://h/api/v1/chat/completions?api-version=2'],
  ];
  for (const [base, url] of cases) assert.equal(chatCompletionsUrl(base), url);
});

test('the key goes to no redirect target', async (t) => {
  let reached = 0;
  const other = createServer((_, response) => {
    reached++;
    response.end();
  });
  await new Promise<void>((resolve) => other.listen(0, '127.0.0.1', resolve));
  t.after(() => new Promise((resolve) => other.close(resolve)));
  const { port } = other.address() as AddressInfo;
  const { error } = await failureOf(t, (call) =>
    call.respond(307, {}, { location: `http://127.0.0.1:${port}/` }),
  );
  assert.equal(error.temporary, false);
  assert.equal(reached, 0);
});
