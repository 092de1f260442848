import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { test } from 'node:test';
import { promisify } from 'node:util';
import { createDeadLetters, type DeadLetter } from '../../shared/dead-letters.ts';
import { compareFrameIds } from '../../shared/frame-id.ts';
import { createGenerationStore } from '../../shared/generation-store.ts';
import { startStack } from '../helpers/stack.ts';

/** `npm run dead` against a real stack: the letters of a request that failed every time, and its second life. */

const run = promisify(execFile);

test('dead letters: listed, shown, replayed under the same message id, twice without harm, dropped', async (t) => {
  const stack = await startStack(t, {
    workerEnv: { MAX_ATTEMPTS: '2', RETRY_BASE_MS: '20', LEASE_MS: '1500', COMPACT_AFTER_MS: '0' },
  });
  const env = { ...process.env };
  const dead = async (...args: string[]) => {
    const { stdout } = await run(
      process.execPath,
      ['--import', './infra/typescript.mjs', 'infra/dead.ts', ...args, '--redis', stack.redisUrl],
      { cwd: new URL('../../', import.meta.url).pathname, env },
    );
    return stdout.trim();
  };
  const chat = await stack.client(20001);
  // Fails its first three attempts: two are allowed, so it dies; a replay begins at attempt 3, and succeeds at 4.
  const parameters = { tokens: 10, intervalMs: 1, failAttempts: 3, seed: 5 };
  chat.send({ type: 'chat', messageId: 'm1', contents: 'hello\u009b2J', parameters });
  const first = await chat.answer('m1');
  assert.equal(first.end.type, 'failed');
  assert.equal((first.end as { code: string }).code, 'attempts_exhausted');

  const letters = createDeadLetters({ redis: stack.look, keys: stack.keys });
  let letter: DeadLetter | undefined;
  while (!letter) for await (const one of letters.list()) letter = one;
  assert.equal(letter.messageId, 'm1');
  assert.equal(letter.lastAttempt, 2);
  assert.match(await dead('list'), new RegExp(`^${letter.name} .* 20001/m1 +2 attempts +attempts_exhausted`));
  assert.deepEqual(JSON.parse(await dead('show', letter.name)).payload.parameters, parameters);
  assert.match(await dead('show', letter.name), /hello\u009b2J/);
  env.NODE_OPTIONS = '--import=data:text/javascript,process.stdout.isTTY=true';
  assert.match(await dead('show', letter.name), /hello2J/, 'a terminal gets nothing that it would obey');
  env.NODE_OPTIONS = '';
  for (const action of ['show', 'replay', 'drop'])
    await assert.rejects(dead(action, 'n1/1-0'), { code: 1, stderr: 'n1/1-0: there is no such letter\n' });

  // A replay that was cut short after its first step: the record is open, the request is in no stream.
  const store = createGenerationStore({ redis: stack.look, keys: stack.keys, retentionMs: 60_000 });
  const { user, messageId, payload, lastAttempt } = letter;
  const reopened = await store.replay({ user, messageId, node: 'n1', payload, lastAttempt });
  assert.deepEqual(reopened, { state: 'reopened', node: 'n1' });
  assert.equal(
    await dead('replay', letter.name),
    '0 replayed, 1 were open already, 0 had an answer, 0 were gone',
  );
  chat.send({ type: 'resume', messageId: 'm1', after: first.end.id });
  const resumed = await chat.next('resumed', 'm1');
  assert.equal(resumed.recovered, false, 'what it had said before is gone');
  const done = await chat.next('done', 'm1');
  const ids = chat.frames
    .slice(chat.frames.indexOf(resumed))
    .flatMap((frame) =>
      'messageId' in frame && frame.messageId === 'm1' && 'id' in frame ? [frame.id] : [],
    );
  assert.ok(
    ids.every(
      (id, index) => compareFrameIds(String(id), index === 0 ? first.end.id : String(ids[index - 1])) > 0,
    ),
    `ids rise above those of the first life: ${ids.join(' ')}`,
  );

  // Again: the letter is gone, and a copy of it finds the answer and does nothing.
  assert.match(await dead('list'), /No dead letters/);
  await stack.look.client.xadd(
    stack.keys.dead('n1'),
    '*',
    'user',
    user,
    'message',
    messageId,
    'attempts',
    2,
    'last',
    2,
    'code',
    'attempts_exhausted',
    'reason',
    'a copy',
    'payload',
    JSON.stringify(payload),
  );
  assert.equal(
    await dead('replay', '--all'),
    '0 replayed, 0 were open already, 1 had an answer, 0 were gone',
  );
  const other = await stack.client(20001);
  other.send({ type: 'chat', messageId: 'm1', contents: 'hello', parameters });
  const again = await other.answer('m1');
  assert.equal(again.end.id, done.id, 'one answer, the replayed one');

  // The record has expired: the replay starts above the last attempt that the letter names.
  await stack.look.client.xadd(
    stack.keys.dead('n1'),
    '*',
    'user',
    '20002',
    'message',
    'old',
    'attempts',
    2,
    'last',
    7,
    'code',
    'attempts_exhausted',
    'reason',
    'long ago',
    'payload',
    JSON.stringify({ contents: 'hi', parameters: { tokens: 3 } }),
  );
  assert.equal(
    await dead('replay', '--all'),
    '1 replayed, 0 were open already, 0 had an answer, 0 were gone',
  );
  const late = await stack.client(20002);
  late.send({ type: 'resume', messageId: 'old', after: '7-1' });
  assert.equal((await late.next('start', 'old')).id, '8-0');
  assert.equal((await late.next('done', 'old')).finishReason, 'stop');

  await stack.look.client.xadd(
    stack.keys.dead('n1'),
    '*',
    'user',
    '20003',
    'message',
    'x',
    'attempts',
    2,
    'last',
    2,
    'code',
    'attempts_exhausted',
    'reason',
    'r',
    'payload',
    '{"contents":"x"}',
  );
  assert.equal(await dead('drop', '--all'), '1 dropped');
});

test('a request that nobody holds for the moment gets its letter from whoever is given it, not none', async (t) => {
  const stack = await startStack(t, { workerEnv: { MAX_ATTEMPTS: '1', WORKER_CONCURRENCY: '1' } });
  const chat = await stack.client(20001);
  const parameters = { tokens: 4, intervalMs: 300, failAttempts: 1 };
  chat.send({ type: 'chat', messageId: 'm1', contents: 'hi', parameters });
  await chat.next('token', 'm1');
  // As after a failover that knew of the request, and not yet that it was given to somebody.
  const requests = stack.keys.requests('n1');
  const [[entry]] = (await stack.look.client.xrange(requests, '-', '+')) as [[string, string[]]];
  await stack.look.client
    .multi()
    .xack(requests, 'workers', entry)
    .xgroup('SETID', requests, 'workers', '0')
    .exec();
  const { end } = await chat.answer('m1');
  assert.equal((end as { code: string }).code, 'attempts_exhausted');
  assert.equal(await stack.look.client.xlen(stack.keys.dead('n1')), 1);
});
