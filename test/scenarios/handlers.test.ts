import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import type { ServerFrameOf } from '../../shared/protocol.ts';
import { type Stack, startStack } from '../helpers/stack.ts';

/** What a handler of somebody else's may do wrong, and what its users and operators are told. */

const BODIES: Record<string, string> = {
  secret: `return (async function* () { yield 'a'; throw new Error('postgres://user:secret@db'); })();`,
  plain: `return Promise.resolve('not a generator');`,
  forgotten: `return (async () => { throw new Error('the star was forgotten'); })();`,
  odd: `return (async function* () { yield 'x'; return { finishReason: 5, usage: { promptTokens: -1 } }; })();`,
  endless: `return (async function* () { for (;;) yield 'é'.repeat(300_000); })();`,
  changed: `request.history.push({ role: 'user', content: request.contents }, 1n); throw { status: 500, why: 'quota' };`,
  nameless: `throw Object.create(null);`,
  fetched: `return (async function* () { throw new TypeError('fetch failed', { cause: { code: 'ECONNREFUSED' } }); })();`,
  dated: `return (async function* () {
    throw new RivuletError('model_error', 'busy', { temporary: true, retryAfterMs: Number('Sun, 29 Nov') });
  })();`,
  context: `return (async function* () {
    context.signal = AbortSignal.any([context.signal, AbortSignal.timeout(60_000)]);
    const derived = Object.create(context);
    yield [context.signal.aborted, derived.signal === context.signal, typeof derived.log.info].join();
  })();`,
  iterator: `const words = ['a', 'b']; return { next: () => words.length ? { value: words.shift() } : { done: true } };`,
};

let stack: Stack;
let dir: string;
before(async (t) => {
  dir = mkdtempSync(join(tmpdir(), 'rivulet-handlers-'));
  const HANDLER = join(dir, 'handler.mjs');
  const cases = Object.entries(BODIES).map(([name, body]) => `case '${name}': { ${body} }`);
  writeFileSync(
    HANDLER,
    `import { RivuletError } from ${JSON.stringify(new URL('../../shared/errors.ts', import.meta.url))};
    export default (request, context) => { switch (request.contents) { ${cases.join('\n')} } };`,
  );
  stack = await startStack(t as never, {
    workers: 1,
    workerEnv: { HANDLER, MAX_ATTEMPTS: '2', RETRY_BASE_MS: '20', MAX_ANSWER_BYTES: '100000' },
  });
});
after(() => rmSync(dir, { recursive: true, force: true }));

async function ask(contents: string, history?: { role: 'user'; content: string }[]) {
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: contents, contents, history });
  const { text, end } = await client.answer(contents);
  return {
    text,
    end: end as Partial<Omit<ServerFrameOf<'done'>, 'type'> & Omit<ServerFrameOf<'failed'>, 'type'>>,
  };
}

test('what an error says is for operators: users are told that the model failed', async () => {
  const { end } = await ask('secret');
  assert.equal(end.code, 'attempts_exhausted');
  assert.equal(end.message, '2 attempts failed; the last one: The model failed.');
  assert.match(
    (await stack.workers[0]!.logged(({ msg }) => msg === 'failed for good')).err as string,
    /secret@db/,
  );
  const [letter] = await stack.look.client.xrange(stack.keys.dead('n1'), '-', '+');
  assert.match(letter![1].join(' '), /secret@db/);
});

/** The dead letter of a message, as one text. */
async function letterOf(messageId: string): Promise<string> {
  const letters = await stack.look.client.xrange(stack.keys.dead('n1'), '-', '+');
  return letters.map(([, fields]) => fields.join(' ')).find((text) => text.includes(` ${messageId} `))!;
}

test('whatever is thrown, and whatever becomes of the request: it fails in time, and the letter has what was sent', async () => {
  const history = [{ role: 'user' as const, content: 'before' }];
  for (const [name, reason] of [
    ['changed', /quota/],
    ['nameless', /\[Object: null prototype\]/],
    ['fetched', /fetch failed: ECONNREFUSED/],
    ['dated', /busy/],
  ] as const) {
    const since = performance.now();
    const { end } = await ask(name, history);
    assert.equal(end.code, 'attempts_exhausted', name);
    assert.ok(performance.now() - since < 15_000, `${name} waited for the lease`);
    const letter = await letterOf(name);
    assert.match(letter, reason);
    assert.ok(letter.includes(JSON.stringify({ contents: name, history })), letter);
  }
});

test('a handler may set its own signal, and pass on an object made of its context', async () => {
  assert.equal((await ask('context')).text, 'false,true,function');
});

test('what is no generator fails at once, and says so', async () => {
  const { end } = await ask('plain');
  assert.deepEqual([end.code, end.id], ['model_error', '1-1']);
  assert.match(end.message!, /no async generator/);
});

test('an async function that fails takes no worker with it', async () => {
  assert.match((await ask('forgotten')).end.message!, /no async generator/);
  assert.equal((await ask('iterator')).text, 'ab');
});

test('a result of other types is left out', async () => {
  const { end } = await ask('odd');
  assert.equal(end.finishReason, 'stop');
  assert.equal(end.usage, undefined);
});

test('the bound of an answer holds within one piece of text too', async () => {
  const { text, end } = await ask('endless');
  assert.equal(end.finishReason, 'length');
  assert.ok(Math.abs(Buffer.byteLength(text) - 100_000) < 8, `${Buffer.byteLength(text)} bytes`);
});

test('an iterator without `return`', async () => {
  const client = await stack.client(20002);
  client.send({ type: 'chat', messageId: 'again', contents: 'iterator' });
  assert.equal((await client.answer('again')).text, 'ab');
});

test('parameters that are nested too deeply are the mistake of who sent them', async () => {
  const client = await stack.client(20001);
  const deep = '['.repeat(9_000) + ']'.repeat(9_000);
  client.send(`{"type":"chat","messageId":"deep","contents":"x","parameters":{"a":${deep}}}`);
  const { code, message } = await client.next('rejected', 'deep');
  assert.deepEqual([code, message], ['invalid_frame', 'parameters are nested too deeply']);
});
