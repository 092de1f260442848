import assert from 'node:assert/strict';
import { test } from 'node:test';
import { RivuletError } from '../../shared/errors.ts';
import { demoHandler } from '../../worker/models/demo.ts';
import { composeDemoAnswer } from '../../worker/models/demo-answers.ts';
import { callHandler } from '../helpers/handler-call.ts';

const fast = { tokens: 100, intervalMs: 0 };

test('answers from the conversation and says that it is the demo', async () => {
  const answer = await callHandler(demoHandler, { contents: 'Count words: one two' }).rest();
  assert.match(answer.text, /2 words/);
  assert.match(answer.text, /demo model/);
  assert.equal(answer.result?.finishReason, 'stop');
  assert.equal(answer.result?.usage?.completionTokens, answer.pieces.length);
  assert.ok(answer.result!.usage!.promptTokens > 0);
});

test('what it can do', () => {
  const history = [
    { role: 'user' as const, content: 'Is the river cold?' },
    { role: 'assistant' as const, content: 'Yes.' },
  ];
  const cases: [string, RegExp][] = [
    ['What is (3 + 4) * 12?', /= 84\b/],
    ['2 ^ 3 ^ 2', /= 512\b/],
    ['-2^2 - -4', /= 0\b/],
    ['1,000 / 8 =', /= 125\b/],
    ['1000000000001+1', /= 1000000000002\./],
    ['9007199254740990 + 1', /= 9007199254740991\./],
    ['9007199254740993 + 0', /= about 9007199254741000\./],
    ['2 ^ 100', /= about 1\.2676506002282e\+30\./],
    ['0.1 + 0.2', /= 0\.3\./],
    ['1000000000001 / 2', /= 500000000000\.5\./],
    ['4.35 * 100', /= 435\./],
    ['1/0', /no finite value/],
    ['Repeat: "good morning"', /good morning/],
    ['reverse abc', /cba/],
    ['How does Rivulet work?', /Redis/],
    ['Hello there!', /Hello!/],
    ['help', /calculate/],
    ['why is the sky blue?', /You asked: "why is the sky blue\?".*5 words/],
    ['2024-01-02 was a day', /4 words/],
    ['((((', /demo model/],
    ['', /demo model/],
    ['42', /1 word\b/],
  ];
  for (const [contents, expected] of cases) {
    const answer = composeDemoAnswer({ contents });
    assert.match(answer, expected);
    assert.match(answer, /demo model/);
  }
  assert.match(composeDemoAnswer({ contents: 'What did I ask before?', history }), /Is the river cold\?/);
  assert.match(composeDemoAnswer({ contents: 'hello', history }), /one earlier message/);
});

test('a huge question gets a short answer soon', () => {
  for (const contents of [
    'x'.repeat(260_000),
    '(-'.repeat(130_000),
    ' '.repeat(260_000),
    'what is '.repeat(30_000),
  ]) {
    const since = performance.now();
    assert.ok(composeDemoAnswer({ contents }).length < 5_000);
    const took = performance.now() - since;
    assert.ok(took < 5_000, `${took} ms`); // what grows with the square takes minutes
  }
});

test('parameters: exactly N words, one a piece, the first without and the others with a space before', async () => {
  const { pieces, text, result } = await callHandler(demoHandler, { parameters: fast }).rest();
  assert.equal(pieces.length, 100);
  assert.match(pieces[0]!, /^[a-z]+$/);
  for (const piece of pieces.slice(1)) assert.match(piece, /^ [a-z]+$/);
  assert.equal(text.split(' ').length, 100);
  assert.deepEqual(result, { finishReason: 'stop', usage: { promptTokens: 2, completionTokens: 100 } });
});

test('the words depend on contents and seed, not on the attempt', async () => {
  const say = async (contents: string, seed: number | string, attempt = 1) =>
    (await callHandler(demoHandler, { contents, parameters: { ...fast, seed } }, { attempt }).rest()).text;
  const text = await say('a', 1);
  assert.equal(await say('a', 1), text);
  assert.equal(await say('a', 1, 4), text);
  assert.notEqual(await say('a', 2), text);
  assert.notEqual(await say('b', 1), text);
  assert.equal(await say('a', 'x'), await say('a', 'x'));
  const { text: longer } = await callHandler(demoHandler, {
    contents: 'a',
    parameters: { ...fast, tokens: 150, seed: 1 },
  }).rest();
  assert.ok(longer.startsWith(text));
});

test('the first K attempts fail after half of the words, temporarily', async () => {
  const parameters = { tokens: 11, intervalMs: 0, failAttempts: 2 };
  const whole = await callHandler(demoHandler, { parameters }, { attempt: 3 }).rest();
  assert.equal(whole.pieces.length, 11);
  for (const attempt of [1, 2]) {
    const { pieces, error } = await callHandler(demoHandler, { parameters }, { attempt }).failure();
    assert.deepEqual(pieces, whole.pieces.slice(0, 5));
    assert.ok(error instanceof RivuletError);
    assert.deepEqual([error.code, error.temporary], ['model_error', true]);
  }
});

test('no words are no words', async () => {
  const { pieces, result } = await callHandler(demoHandler, { parameters: { tokens: 0 } }).rest();
  assert.deepEqual(pieces, []);
  assert.equal(result?.usage?.completionTokens, 0);
});

test('waits before the first word and between words', async () => {
  const since = performance.now();
  await callHandler(demoHandler, { parameters: { tokens: 3, intervalMs: 20, firstTokenMs: 40 } }).rest();
  const took = performance.now() - since;
  assert.ok(took >= 75, `${took} ms`); // 40 + 20 + 20, less the rounding of timers
});

test('wrong parameters are refused with the name of the field', async () => {
  const cases: [Record<string, unknown>, string][] = [
    [{ tokens: -1 }, 'tokens'],
    [{ tokens: 1.5 }, 'tokens'],
    [{ tokens: '5' }, 'tokens'],
    [{ tokens: 1e9 }, 'tokens'],
    [{ intervalMs: 'fast' }, 'intervalMs'],
    [{ firstTokenMs: Number.NaN }, 'firstTokenMs'],
    [{ failAttempts: null }, 'failAttempts'],
    [{ seed: {} }, 'seed'],
  ];
  for (const [parameters, field] of cases) {
    const { pieces, error } = await callHandler(demoHandler, { parameters }).failure();
    assert.deepEqual(pieces, []);
    assert.ok(error instanceof RivuletError, field);
    assert.deepEqual([error.code, error.temporary], ['invalid_frame', false]);
    assert.match(error.message, new RegExp(`parameters.*${field}`));
  }
});

test('parameters for real models do not make a script of it', async () => {
  const answer = callHandler(demoHandler, { contents: '1 + 1', parameters: { temperature: 1 } });
  assert.equal(await answer.next(), '1');
  await answer.leave();
});

for (const [name, parameters] of [
  ['before the first word', { tokens: 5, firstTokenMs: 3_600_000 }],
  ['between words', { tokens: 5, intervalMs: 3_600_000 }],
] as const)
  test(`abort ends the wait ${name} at once`, async () => {
    const answer = callHandler(demoHandler, { parameters });
    if (name === 'between words') await answer.next();
    const reading = answer.next();
    answer.abort();
    await assert.rejects(reading);
    assert.equal(answer.listeners(), 0);
  });

test('abort ends a full-speed script, and a natural answer', async () => {
  for (const parameters of [{ tokens: 1_000_000, intervalMs: 0 }, undefined]) {
    const answer = callHandler(demoHandler, { parameters });
    await answer.next();
    const reason = new Error('stop');
    answer.abort(reason);
    const { pieces, error } = await answer.failure();
    assert.equal(error, reason);
    assert.ok(pieces.length <= (parameters ? 256 : 0), `${pieces.length} more`);
    assert.equal(answer.listeners(), 0);
  }
});

test('a full-speed script leaves turns to others', async () => {
  let turns = 0;
  let running = true;
  const count = () => {
    turns++;
    if (running) setImmediate(count);
  };
  setImmediate(count);
  await callHandler(demoHandler, { parameters: { tokens: 6_400, intervalMs: 0 } }).rest();
  running = false;
  assert.ok(turns >= 90, `${turns} turns`);
});
