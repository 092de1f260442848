import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import workerThreads, { type Worker, type WorkerOptions } from 'node:worker_threads';
import { createAdmission } from '../../gateway/admission.ts';
import { createPeopleDesk } from '../../gateway/people-desk.ts';
import { createModerationHook } from '../../gateway/policy/moderation-hook.ts';
import { type PolicyRequest, UNAVAILABLE } from '../../gateway/policy/policy.ts';
import { createWordList } from '../../gateway/policy/word-list.ts';
import { ConfigError } from '../../shared/config.ts';
import { createLogger } from '../../shared/logger.ts';
import { eventually } from '../helpers/eventually.ts';

/** Policies that cannot decide: a word list whose thread ends, and a hook that does not answer. */

const log = createLogger('silent', {});
const dir = mkdtempSync(join(tmpdir(), 'rivulet-words-'));
after(() => rmSync(dir, { recursive: true, force: true }));

/** Threads that load TypeScript as in a gateway (tsx is for the main thread only), and can be ended from here. */
const threads: Worker[] = [];
const hooks = new URL('../../infra/typescript.mjs', import.meta.url).href;
class KnownWorker extends workerThreads.Worker {
  constructor(file: URL, options: WorkerOptions) {
    super(file, { ...options, execArgv: ['--import', hooks] });
    threads.push(this);
  }
}
workerThreads.Worker = KnownWorker;
syncBuiltinESMExports();

const chat = (contents: string): PolicyRequest & { frame: { type: 'chat' } } => ({
  userId: 'u',
  frame: { type: 'chat', messageId: 'm', contents },
});
const send: PolicyRequest & { frame: { type: 'send' } } = {
  userId: 'u',
  frame: { type: 'send', messageId: 'm', to: { user: 'v' }, contents: 'hi' },
};

async function openList(name: string, onFailure: 'open' | 'closed' = 'closed') {
  const path = join(dir, name);
  writeFileSync(path, 'badword\n');
  const list = await createWordList({ path, onFailure, log });
  return { list, path, thread: () => threads.at(-1)! };
}

test('a word list that is not there is a wrong setting, and named', async () => {
  const path = join(dir, 'nope');
  await assert.rejects(
    createWordList({ path, onFailure: 'closed', log }),
    new ConfigError(`Wrong settings: MODERATION_WORDS ${path} cannot be read (ENOENT)`),
  );
});

test('a question to a word list without a thread is answered as its failure says', async (t) => {
  for (const [onFailure, outcome] of [
    ['closed', UNAVAILABLE],
    ['open', null],
  ] as const) {
    const { list, thread } = await openList(onFailure, onFailure);
    t.after(() => list.stop());
    const underWay = Promise.all([1, 2].map(() => list.check(chat('badword'))));
    await thread().terminate();
    await underWay; // before or after its thread's end, but answered
    assert.deepEqual(await list.check(chat('badword')), outcome);
    assert.deepEqual(await list.check(chat('fine')), outcome);
  }
});

test('the thread of a word list is started until it has the list, whenever it ends', async (t) => {
  const { list, path, thread } = await openList('again');
  t.after(() => list.stop());
  rmSync(path);
  const first = threads.length;
  await thread().terminate();
  await eventually('second try without a file', async () => {
    assert.deepEqual(await list.check(chat('badword')), UNAVAILABLE);
    return threads.length >= first + 2;
  });
  assert.deepEqual(await list.check(chat('fine')), UNAVAILABLE);
  const isBack = () => eventually('list', async () => (await list.check(chat('fine'))) === null);
  writeFileSync(path, 'badword\n');
  await isBack();
  assert.deepEqual(await list.check(chat('badword')), { code: 'content_refused' });
  await thread().terminate();
  assert.deepEqual(await list.check(chat('fine')), UNAVAILABLE);
  await isBack();
  assert.deepEqual(await list.check(chat('badword')), { code: 'content_refused' });
});

test('a word list that could not be read again is tried again, also when the file stays as it is', async (t) => {
  const { list, path, thread } = await openList('unread');
  t.after(() => list.stop());
  const worker = thread();
  const post = worker.postMessage.bind(worker);
  let reloads = 0;
  worker.postMessage = (call) => {
    if ('reload' in call && ++reloads === 1) worker.emit('message', { failed: 'EMFILE' });
    else post(call);
  };
  writeFileSync(path, 'other word\n');
  await eventually('the new list', async () => (await list.check(chat('badword'))) === null);
  assert.deepEqual(await list.check(chat('other word')), { code: 'content_refused' });
  assert.equal(reloads, 2);
});

test('questions that wait for the word list are bounded', async (t) => {
  const { list } = await openList('full');
  t.after(() => list.stop());
  const long = chat('x '.repeat(500_000));
  const refusals = await Promise.all(Array.from({ length: 40 }, () => list.check(long)));
  assert.equal(refusals[0], null);
  assert.deepEqual(refusals.at(-1), UNAVAILABLE);
  assert.equal(await list.check(long), null);
});

test('a hook that does not answer is a temporary rejection, to a question and to a message', async () => {
  const hook = createModerationHook({
    url: 'http://127.0.0.1:1/',
    timeoutMs: 1_000,
    onFailure: 'closed',
    log,
  });
  const store = { inspect: async () => null }; // it was never accepted
  const parts = { policies: [hook], messageBytes: 100, isDraining: () => false, store, log };
  const admission = createAdmission(parts as never);
  const { code, ...rest } = UNAVAILABLE;
  assert.deepEqual(await admission.admit('u', chat('hi').frame), { state: 'rejected', code, ...rest });
  const counted: string[] = [];
  const counters = { sent() {}, refused: (refused: string) => counted.push(refused) };
  const desk = createPeopleDesk({ ...parts, counters } as never);
  assert.deepEqual(await desk.handle('u', 'd', send.frame), {
    type: 'rejected',
    messageId: 'm',
    code,
    ...rest,
  });
  assert.deepEqual(counted, ['content_refused']);
});
