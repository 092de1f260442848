import assert from 'node:assert/strict';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { z } from 'zod';
import { ConfigError, parseConfig } from '../../shared/config.ts';
import { demoHandler } from '../../worker/models/demo.ts';
import exampleHandler from '../../worker/models/example-handler.ts';
import { loadHandler } from '../../worker/models/load-handler.ts';
import { modelSettings } from '../../worker/models/settings.ts';
import { callHandler } from '../helpers/handler-call.ts';
import { startScriptedOpenAi } from '../helpers/scripted-openai.ts';

const settings = (env: Record<string, string>) => parseConfig(z.object(modelSettings), env);
const load = async (env: Record<string, string>) => loadHandler(settings(env));

async function moduleWith(t: TestContext, name: string, text: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'rivulet-handler-'));
  t.after(() => rm(folder, { recursive: true }));
  const file = join(folder, name);
  await writeFile(file, text);
  return file;
}

test('the demo is the default', async () => {
  assert.equal(await load({}), demoHandler);
  assert.equal(await load({ HANDLER: 'demo' }), demoHandler);
});

test('openai, from settings to an answer', async (t) => {
  const server = await startScriptedOpenAi(t);
  const handler = await load({
    HANDLER: 'openai',
    OPENAI_BASE_URL: `http://127.0.0.1:${server.port}/`,
    MODEL: 'm',
    SYSTEM_PROMPT: 'Be kind.',
  });
  const rest = callHandler(handler, {}).rest();
  const call = await server.next();
  assert.equal(call.headers.authorization, undefined);
  assert.equal(call.body.messages[0].content, 'Be kind.');
  call.token('hi');
  call.finish();
  assert.equal((await rest).text, 'hi');
});

test('a module by absolute and by relative path, .ts, .js and CommonJS', async (t) => {
  const text = 'export default async function* () { yield "mine"; }';
  const cases = [
    await moduleWith(t, 'handler.ts', text.replace('()', '(_request: unknown)')),
    await moduleWith(t, 'handler.mjs', text),
    await moduleWith(t, 'handler.cjs', 'exports.default = async function* () { yield "mine"; }'),
  ];
  for (const file of cases) {
    const handler = await load({ HANDLER: file });
    assert.equal((await callHandler(handler, {}).rest()).text, 'mine', file);
  }
  assert.equal(await load({ HANDLER: 'worker/models/example-handler.ts' }), exampleHandler);
});

test('the example types back, and continues from a partial text', async () => {
  const first = await callHandler(exampleHandler, { contents: 'hello there' }).rest();
  assert.equal(first.text, 'HELLO THERE');
  const second = await callHandler(
    exampleHandler,
    { contents: 'hello there' },
    { attempt: 2, partial: 'HELLO TH' },
  ).rest();
  assert.deepEqual(second.pieces, ['HELLO TH', 'ERE']);
});

test('mistakes name the variable', async (t) => {
  const noFunction = await moduleWith(t, 'none.ts', 'export const handler = 1;');
  const broken = await moduleWith(t, 'broken.mjs', 'throw new Error("no luck");');
  const syntax = await moduleWith(t, 'syntax.ts', 'export default {{');
  const cases: [Record<string, string>, RegExp][] = [
    [{ HANDLER: './nowhere.ts' }, /HANDLER: there is no file .*nowhere\.ts/],
    [{ HANDLER: noFunction }, /HANDLER: .*none\.ts has no function as its default export/],
    [{ HANDLER: broken }, /HANDLER: .*broken\.mjs does not load: no luck/],
    [{ HANDLER: syntax }, /HANDLER: .*syntax\.ts does not load/],
    [{ HANDLER: tmpdir() }, /HANDLER: .* does not load/],
    [{ HANDLER: 'openai' }, /OPENAI_BASE_URL is required/],
    [{ HANDLER: 'openai', OPENAI_BASE_URL: 'ftp://h' }, /OPENAI_BASE_URL/],
    [{ HANDLER: 'openai', OPENAI_BASE_URL: 'http://u:p@h' }, /OPENAI_BASE_URL/],
    [{ OPENAI_API_KEY: 'a b' }, /OPENAI_API_KEY/],
    [{ CONTEXT_TOKENS: 'many' }, /CONTEXT_TOKENS/],
    [{ FIRST_TOKEN_TIMEOUT_MS: '0' }, /FIRST_TOKEN_TIMEOUT_MS/],
    [
      {
        HANDLER: 'openai',
        OPENAI_BASE_URL: 'http://h',
        SYSTEM_PROMPT: 'be kind '.repeat(50),
        CONTEXT_TOKENS: '64',
      },
      /SYSTEM_PROMPT .* CONTEXT_TOKENS/,
    ],
  ];
  for (const [env, message] of cases)
    await assert.rejects(load(env), (error: unknown) => {
      assert.ok(error instanceof ConfigError, String(error));
      assert.match(error.message, message);
      return true;
    });
});
