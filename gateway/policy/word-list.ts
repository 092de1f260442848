import { stat } from 'node:fs/promises';
import { Worker } from 'node:worker_threads';
import type { Logger } from 'pino';
import type { Policy, Refusal } from './policy.ts';
import { moderatedTexts } from './texts.ts';
import type { MatcherAnswer, MatcherCall } from './word-matcher.ts';

/**
 * Refuses texts with a word of a list. The list is read again when the file changes; a file that cannot be read
 * then leaves the old list in force. Matching runs in a thread of its own (see word-matcher.ts); when that ends
 * unexpectedly a new one is started, and questions meanwhile are answered as `onFailure` says.
 */

const LOOK_MS = 1_000; // a poll also sees renames and the symlinks of mounted config maps
const RESTART_MS = 1_000;
const REFUSAL: Refusal = { code: 'content_refused' };

export interface WordList extends Policy {
  readonly words: number;
  stop(): Promise<void>;
}

/** @throws Error when the list cannot be read at the start */
export async function createWordList(options: {
  path: string;
  onFailure: 'open' | 'closed';
  log: Logger;
}): Promise<WordList> {
  const { path, log } = options;
  const failure = options.onFailure === 'open' ? null : REFUSAL;
  const waiting = new Map<number, (refusal: Refusal | null) => void>();
  let lastId = 0;
  let words = 0;
  let stopped = false;
  let worker: Worker;
  let seen = await stamp(path);
  if (seen === null) throw new Error(`MODERATION_WORDS: ${path} cannot be read`);

  async function start(): Promise<void> {
    worker = new Worker(new URL('./word-matcher.ts', import.meta.url), { workerData: { wordList: path } });
    worker.unref();
    await new Promise<void>((resolve, reject) => {
      worker.on('message', (answer: MatcherAnswer) => {
        if ('loaded' in answer) {
          words = answer.loaded;
          log.info({ path, words }, 'word list loaded');
          resolve();
        } else if ('failed' in answer) {
          log.warn({ path, err: answer.failed }, 'word list not loaded; the old one stays');
          reject(new Error(`MODERATION_WORDS: ${answer.failed}`));
        } else {
          waiting.get(answer.id)?.(answer.word === null ? null : REFUSAL);
          waiting.delete(answer.id);
        }
      });
      worker.on('error', reject);
      worker.on('exit', () => {
        reject(new Error('the word list thread ended'));
        for (const answer of waiting.values()) answer(failure);
        waiting.clear();
      });
    });
    worker.on('exit', (code) => {
      if (stopped) return;
      log.error({ code }, 'the word list thread ended; starting it again');
      setTimeout(() => {
        if (!stopped) start().catch((error: Error) => log.error({ err: error.message }, 'word list'));
      }, RESTART_MS).unref();
    });
  }
  await start();

  const post = (call: MatcherCall) => worker.postMessage(call);
  const looking = setInterval(async () => {
    const now = await stamp(path);
    if (now === seen || now === null) return;
    seen = now;
    post({ reload: true });
  }, LOOK_MS);
  looking.unref();

  return {
    name: 'word-list',
    check(request) {
      return new Promise((resolve) => {
        const id = ++lastId;
        waiting.set(id, resolve);
        post({ id, text: moderatedTexts(request.frame).join('\n') });
      });
    },
    get words() {
      return words;
    },
    async stop() {
      stopped = true;
      clearInterval(looking);
      await worker.terminate();
    },
  };
}

/** Changes when the file does; null when it cannot be read. */
async function stamp(path: string): Promise<string | null> {
  try {
    const { mtimeMs, size, ino } = await stat(path);
    return `${mtimeMs} ${size} ${ino}`;
  } catch {
    return null;
  }
}
