import { access, constants, stat } from 'node:fs/promises';
import { Worker } from 'node:worker_threads';
import type { Logger } from 'pino';
import { ConfigError } from '../../shared/config.ts';
import { type Policy, type Refusal, UNAVAILABLE } from './policy.ts';
import { moderatedTexts } from './texts.ts';
import type { MatcherAnswer, MatcherCall } from './word-matcher.ts';

/**
 * Refuses texts with a word of a list. The list is read again when the file changes; a file that cannot be read
 * then leaves the old list in force. Matching runs in a thread of its own (see word-matcher.ts); when that ends
 * unexpectedly new ones are started until one has the list, and questions meanwhile are answered as `onFailure` says.
 */

const LOOK_MS = 1_000; // a poll also sees renames and the symlinks of mounted config maps
const RESTART_MS = 1_000;
const WAITING_UNITS = 16 * 1024 * 1024; // of text that the thread has not answered yet: some seconds of its work
const QUESTION_UNITS = 1_024; // what a question takes beside its text
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
  const failure = options.onFailure === 'open' ? null : UNAVAILABLE;
  const waiting = new Map<number, { answer: (refusal: Refusal | null) => void; units: number }>();
  let waitingUnits = 0;
  let lastId = 0;
  let words = 0;
  let stopped = false;
  let newest: Worker;
  /** The thread that has the list. */
  let matcher: Worker | null = null;
  let failed = '';
  await access(path, constants.R_OK).catch((error: NodeJS.ErrnoException) => {
    throw new ConfigError(`Wrong settings: MODERATION_WORDS ${path} cannot be read (${error.code})`);
  });
  let seen = await stamp(path);

  function answer(id: number, refusal: Refusal | null): void {
    const question = waiting.get(id);
    if (!question) return;
    waiting.delete(id);
    waitingUnits -= question.units;
    question.answer(refusal);
  }

  /** Resolves when a new thread has the list; that one is replaced when it ends. */
  async function start(): Promise<void> {
    const worker = new Worker(new URL('./word-matcher.ts', import.meta.url), {
      workerData: { wordList: path },
    });
    newest = worker;
    worker.unref();
    return new Promise((resolve, reject) => {
      worker.on('message', (message: MatcherAnswer) => {
        if ('loaded' in message) {
          matcher = worker;
          words = message.loaded;
          failed = '';
          log.info({ path, words }, 'word list loaded');
          resolve();
        } else if ('id' in message) answer(message.id, message.word === null ? null : REFUSAL);
        else if (matcher === worker) {
          seen = ''; // tried again at every look, told once
          if (message.failed !== failed)
            log.warn({ path, err: message.failed }, 'word list not loaded; the old one stays');
          failed = message.failed;
        } else {
          reject(new Error(`MODERATION_WORDS: ${message.failed}`));
          void worker.terminate();
        }
      });
      worker.on('error', reject);
      worker.on('exit', (code) => {
        reject(new Error('the word list thread ended'));
        if (matcher !== worker) return;
        matcher = null;
        for (const id of waiting.keys()) answer(id, failure);
        if (stopped) return;
        log.error({ code }, 'the word list thread ended; starting it again');
        restart('');
      });
    });
  }

  /** @param failed what was said already of the tries before */
  function restart(failed: string): void {
    setTimeout(() => {
      if (stopped) return;
      start().catch(({ message }: Error) => {
        if (message !== failed) log.error({ err: message, failure: options.onFailure }, 'no word list');
        restart(message);
      });
    }, RESTART_MS).unref();
  }
  await start();

  const post = (call: MatcherCall) => matcher?.postMessage(call);
  const looking = setInterval(async () => {
    const now = await stamp(path);
    if (!matcher || now === seen || now === null) return;
    seen = now;
    post({ reload: true });
  }, LOOK_MS);
  looking.unref();

  return {
    name: 'word-list',
    check(request) {
      const text = moderatedTexts(request.frame).join('\n');
      const units = text.length + QUESTION_UNITS;
      if (!matcher || (waiting.size > 0 && waitingUnits + units > WAITING_UNITS)) return failure;
      return new Promise((resolve) => {
        const id = ++lastId;
        waiting.set(id, { answer: resolve, units });
        waitingUnits += units;
        post({ id, text });
      });
    },
    get words() {
      return words;
    },
    async stop() {
      stopped = true;
      clearInterval(looking);
      await newest.terminate();
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
