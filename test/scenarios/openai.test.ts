import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { type ScriptedOpenAi, startScriptedOpenAi } from '../helpers/scripted-openai.ts';
import { type Stack, startStack } from '../helpers/stack.ts';

/** The openai handler in a real worker, against a server that is led by hand. */

let model: ScriptedOpenAi;
let stack: Stack;
before(async (t) => {
  model = await startScriptedOpenAi(t as never);
  stack = await startStack(null, {
    workers: 1,
    workerEnv: {
      HANDLER: 'openai',
      OPENAI_BASE_URL: model.baseUrl,
      OPENAI_API_KEY: 'sk-secret',
      MODEL: 'test-model',
      RETRY_BASE_MS: '10',
      FIRST_TOKEN_TIMEOUT_MS: '2000',
    },
  });
});
after(async () => {
  await stack.stop();
  await model.stop();
});

test('tokens reach the client while the model still speaks', async () => {
  const client = await stack.client(20001);
  client.send({
    type: 'chat',
    messageId: 'm1',
    contents: 'hello',
    history: [{ role: 'user', content: 'before' }],
  });
  const call = await model.next();
  call.token('Hel');
  assert.equal((await client.next('token', 'm1')).text, 'Hel');
  call.token('lo');
  assert.equal((await client.next('token', 'm1')).text, 'lo');
  call.finish();
  const answer = await client.answer('m1');
  assert.equal(answer.text, 'Hello');
});

test('cancel aborts the upstream HTTP call, in the middle and before a first token', async () => {
  const client = await stack.client(20002);
  client.send({ type: 'chat', messageId: 'c1', contents: 'hello' });
  const call = await model.next();
  call.token('one');
  await client.next('token', 'c1');
  client.send({ type: 'cancel', messageId: 'c1' });
  assert.equal((await client.answer('c1')).text, 'one');
  assert.equal(await call.closed, 'aborted');

  client.send({ type: 'chat', messageId: 'c2', contents: 'hello' });
  const silent = await model.next();
  client.send({ type: 'cancel', messageId: 'c2' });
  await client.answer('c2');
  assert.equal(await silent.closed, 'aborted');
});

test('disconnecting is not cancelling', async () => {
  const client = await stack.client(20003);
  client.send({ type: 'chat', messageId: 'd1', contents: 'hello' });
  const call = await model.next();
  call.token('still');
  await client.next('token', 'd1');
  client.close();
  call.token(' here');
  call.finish();
  const again = await stack.client(20003);
  again.send({ type: 'resume', messageId: 'd1' });
  assert.equal((await again.answer('d1')).text, 'still here');
});

test('a cut connection and a 429 are retried; a 400 is final', async () => {
  const client = await stack.client(20004);
  client.send({ type: 'chat', messageId: 'r1', contents: 'hello' });
  const cut = await model.next();
  cut.token('half');
  cut.cut();
  const busy = await model.next();
  busy.respond(429, { error: { message: 'slow down' } }, { 'retry-after': '0' });
  const good = await model.next();
  good.token('whole');
  good.finish();
  const answer = await client.answer('r1');
  assert.deepEqual([answer.text, answer.starts], ['whole', 3]);

  client.send({ type: 'chat', messageId: 'r2', contents: 'hello' });
  (await model.next()).respond(400, { error: { message: 'no such model' } });
  const failed = await client.answer('r2');
  assert.ok(failed.end.type === 'failed');
  assert.deepEqual([failed.end.code, failed.end.temporary, failed.starts], ['model_error', false, 1]);
  assert.match(failed.end.message, /no such model/);
});

test('an answer that takes too long fails for good: nobody waits that long twice', async () => {
  const worker = await stack.addWorker({ GENERATION_TIMEOUT_MS: '1500', MAX_ATTEMPTS: '3' });
  await stack.workers[0]!.kill();
  const before = model.requests;
  const client = await stack.client(20005);
  client.send({ type: 'chat', messageId: 't1', contents: 'hello' });
  const call = await model.next();
  call.token('slow');
  const { end, text, starts } = await client.answer('t1');
  assert.ok(end.type === 'failed');
  assert.deepEqual([end.code, text, starts], ['model_timeout', 'slow', 1]);
  assert.equal(await call.closed, 'aborted');
  assert.equal(model.requests, before + 1);
  await worker.kill();
});
