import { setImmediate as nextTurn } from 'node:timers/promises';
import { z } from 'zod';
import { RivuletError } from '../../shared/errors.ts';
import { describeIssues } from '../../shared/protocol.ts';
import type { Handler, HandlerContext, HandlerRequest, HandlerResult } from '../handler.ts';
import { composeDemoAnswer } from './demo-answers.ts';

/**
 * The demo model: needs no key and no network, answers from the conversation it is given, and says what it is.
 * The same conversation always gets the same answer.
 *
 * With any of `tokens`, `intervalMs`, `firstTokenMs`, `failAttempts`, `seed` in `parameters` it becomes the load
 * and failure model of PROTOCOL.md: exactly `tokens` words, each yielded alone, every one but the first with a
 * space before it (so the text is N words with N-1 spaces). Word k depends on contents, seed and k only: an
 * attempt repeats the one before, and a longer answer begins like a shorter one.
 */
export const demoHandler: Handler = (request, context) => {
  const asked = request.parameters;
  const scripted = asked !== undefined && SCRIPT_FIELDS.some((field) => asked[field] !== undefined);
  return scripted ? runScript(request, context) : answerNaturally(request, context);
};

/** One hour: longer waits in a check are mistakes. */
const LONGEST_WAIT_MS = 3_600_000;

const wholeNumber = (name: string, max: number) =>
  z
    .int(`${name} must be a whole number`)
    .min(0, `${name} must not be negative`)
    .max(max, `${name} must be at most ${max}`);

const scriptSchema = z.object({
  tokens: wholeNumber('tokens', 1_000_000).default(32),
  intervalMs: wholeNumber('intervalMs', LONGEST_WAIT_MS).default(20),
  firstTokenMs: wholeNumber('firstTokenMs', LONGEST_WAIT_MS).default(0),
  failAttempts: wholeNumber('failAttempts', 1_000).default(0),
  seed: z
    .union([z.number(), z.string().max(256)], 'seed must be a number or a string of at most 256 characters')
    .default(0),
});
const SCRIPT_FIELDS = Object.keys(scriptSchema.shape);

/** How many words of a full-speed script go out before other work gets a turn: under 0.1 ms of it. */
const WORDS_PER_TURN = 64;

async function* runScript(
  { contents, parameters }: HandlerRequest,
  { signal, attempt }: HandlerContext,
): AsyncGenerator<string, HandlerResult> {
  const parsed = scriptSchema.safeParse(parameters);
  if (!parsed.success)
    throw new RivuletError('invalid_frame', `parameters: ${describeIssues(parsed.error)}`, {
      temporary: false,
    });
  const { tokens, intervalMs, firstTokenMs, failAttempts, seed } = parsed.data;
  const fails = attempt <= failAttempts;
  const count = fails ? Math.floor(tokens / 2) : tokens;
  const nextWord = wordsFor(contents, seed);

  signal.throwIfAborted();
  const pacer = createPacer(signal);
  try {
    if (firstTokenMs > 0) await pacer.wait(firstTokenMs);
    for (let index = 0; index < count; index++) {
      if (index > 0) {
        if (intervalMs > 0) await pacer.wait(intervalMs);
        else if (index % WORDS_PER_TURN === 0) await nextTurn();
      }
      if (signal.aborted) throw signal.reason;
      yield nextWord(index === 0 ? WORDS : SPACED_WORDS);
    }
  } finally {
    pacer.stop();
  }
  if (fails)
    throw new RivuletError(
      'model_error',
      `The demo model failed attempt ${attempt} after ${count} words, as asked.`,
      { temporary: true },
    );
  return {
    finishReason: 'stop',
    usage: { promptTokens: Math.ceil(contents.length / 4), completionTokens: count },
  };
}

/**
 * Waits that end at once when the signal aborts. They are counted from when the one before was due, as a model elsewhere
 * would have it: a worker that is late for a moment catches up, and its answers do not fall into step with each other.
 * One listener for all of an answer's waits, and one timer while they are equally long: under load, these for each word
 * are what the time of a worker goes into.
 */
function createPacer(signal: AbortSignal): { wait(ms: number): Promise<void>; stop(): void } {
  let timer: NodeJS.Timeout | undefined;
  let timerMs = 0;
  let dueMs = performance.now();
  let wake: () => void = () => {};
  let fail: (reason: unknown) => void = () => {};
  const abort = () => {
    clearTimeout(timer);
    fail(signal.reason);
  };
  signal.addEventListener('abort', abort);
  return {
    wait: (ms) =>
      new Promise((resolve, reject) => {
        if (signal.aborted) reject(signal.reason);
        wake = resolve;
        fail = reject;
        dueMs += ms;
        const leftMs = Math.max(1, Math.ceil(dueMs - performance.now()));
        if (timer && timerMs === leftMs) {
          timer.refresh();
          return;
        }
        clearTimeout(timer);
        timer = setTimeout(() => wake(), leftMs);
        timerMs = leftMs;
      }),
    stop() {
      clearTimeout(timer);
      signal.removeEventListener('abort', abort);
    },
  };
}

const WORDS =
  'river stone light water cloud north window paper morning bridge garden signal harbour winter copper silver meadow engine lantern valley thunder marble feather island compass orchard velvet canyon ember willow falcon summit'.split(
    ' ',
  );

const SPACED_WORDS = WORDS.map((word) => ` ${word}`);

/** An endless, repeatable list of places in a list of words. */
function wordsFor(contents: string, seed: number | string): (words: string[]) => string {
  // FNV-1a over the text, then a Weyl sequence through a mixer (as in splitmix32): 32 bits are plenty here.
  let state = 0x811c9dc5;
  const key = `${seed}\n${contents}`;
  for (let index = 0; index < key.length; index++)
    state = Math.imul(state ^ key.charCodeAt(index), 0x01000193);
  return (words) => {
    state = (state + 0x9e3779b9) | 0;
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    return words[((mixed ^ (mixed >>> 15)) >>> 0) % words.length]!;
  };
}

/** A brisk reader's pace, so that a page looks alive. */
const WORD_MS = { least: 20, spread: 11 };

async function* answerNaturally(
  request: HandlerRequest,
  { signal }: HandlerContext,
): AsyncGenerator<string, HandlerResult> {
  const words = composeDemoAnswer(request).match(/\s*\S+/g) ?? [];
  const pacer = createPacer(signal);
  try {
    let index = 0;
    for (const word of words) {
      // The first word goes out at once; the rest sway a little, the same way each time.
      if (index > 0) await pacer.wait(WORD_MS.least + ((index * 7) % WORD_MS.spread));
      signal.throwIfAborted();
      yield word;
      index++;
    }
  } finally {
    pacer.stop();
  }
  const prompt = [request.contents, ...(request.history ?? []).map((message) => message.content)];
  return {
    finishReason: 'stop',
    usage: {
      // Characters by four: the demo has no tokenizer, and the number only has to be plausible.
      promptTokens: prompt.reduce((sum, text) => sum + Math.ceil(text.length / 4), 0),
      completionTokens: words.length,
    },
  };
}
