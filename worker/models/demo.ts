import { z } from 'zod';
import { RivuletError } from '../../shared/errors.ts';
import { describeIssues } from '../../shared/protocol.ts';
import type { Handler, HandlerContext, HandlerRequest, HandlerResult } from '../handler.ts';
import { composeDemoAnswer } from './demo-answers.ts';
import { cancelWait, type Slot, type Waiter, waitUntil } from './pace.ts';

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

function runScript({ contents, parameters }: HandlerRequest, context: HandlerContext): ReturnType<Handler> {
  const parsed = scriptSchema.safeParse(parameters);
  return parsed.success ? new Script(contents, parsed.data, context) : refuse(describeIssues(parsed.error));
}

// biome-ignore lint/correctness/useYield: it fails as a handler does, when it is asked for its first word
async function* refuse(issues: string): ReturnType<Handler> {
  throw new RivuletError('invalid_frame', `parameters: ${issues}`, { temporary: false });
}

/**
 * An async generator by hand. Under load a generator function's promises, and a timer for each word, would be half of
 * what a worker does: the load model has to cost less than what it is there to load.
 *
 * Words are due at their time counted from the first, as a model elsewhere would have it: a worker that is late for a
 * moment catches up, and its answers do not fall into step with each other. Calls of `next` must not overlap.
 */
class Script implements AsyncGenerator<string, HandlerResult, undefined>, Waiter {
  private readonly script: z.infer<typeof scriptSchema>;
  private readonly signal: AbortSignal;
  private readonly attempt: number;
  private readonly promptTokens: number;
  /** Words that this attempt says. */
  private readonly count: number;
  private readonly nextWord: (words: string[]) => string;
  private index = 0;
  private ended = false;
  private dueMs = performance.now();
  private slot: Slot | null = null;
  /** Who waits for the next word. */
  private waiting: {
    resolve(next: Spoken): void;
    reject(reason: unknown): void;
  } | null = null;
  private readonly onAbort = () => this.stop(this.signal.reason);

  constructor(contents: string, script: z.infer<typeof scriptSchema>, { signal, attempt }: HandlerContext) {
    this.script = script;
    this.signal = signal;
    this.attempt = attempt;
    this.promptTokens = Math.ceil(contents.length / 4);
    this.count = attempt <= script.failAttempts ? Math.floor(script.tokens / 2) : script.tokens;
    this.nextWord = wordsFor(contents, script.seed);
    signal.addEventListener('abort', this.onAbort);
  }

  next(): Promise<Spoken> {
    const { index } = this;
    if (this.ended) return Promise.resolve(NOTHING_MORE);
    if (this.signal.aborted || (index > 0 && index === this.count)) return this.leave();
    const waitMs = index === 0 ? this.script.firstTokenMs : this.script.intervalMs;
    if (waitMs > 0) {
      this.dueMs += waitMs;
      return new Promise((resolve, reject) => {
        this.waiting = { resolve, reject };
        this.slot = waitUntil(this.dueMs, this);
      });
    }
    if (index > 0 && index % WORDS_PER_TURN === 0) {
      return new Promise((resolve, reject) => {
        this.waiting = { resolve, reject };
        setImmediate(() => this.wake());
      });
    }
    return index < this.count ? Promise.resolve(this.say()) : this.leave();
  }

  wake(): void {
    this.slot = null;
    const { waiting } = this;
    this.waiting = null;
    if (!waiting) return;
    if (this.index < this.count) waiting.resolve(this.say());
    else this.leave().then(waiting.resolve, waiting.reject);
  }

  return(): Promise<Spoken> {
    this.stop(undefined);
    return Promise.resolve(NOTHING_MORE);
  }

  throw(reason: unknown): Promise<Spoken> {
    this.stop(reason);
    return Promise.reject(reason);
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  private say(): Spoken {
    return { done: false, value: this.nextWord(this.index++ === 0 ? WORDS : SPACED_WORDS) };
  }

  /** How it ends: aborted, failed as asked, or complete. */
  private leave(): Promise<Spoken> {
    const { signal, count, attempt } = this;
    this.stop(undefined);
    if (signal.aborted) return Promise.reject(signal.reason);
    if (attempt <= this.script.failAttempts)
      return Promise.reject(
        new RivuletError(
          'model_error',
          `The demo model failed attempt ${attempt} after ${count} words, as asked.`,
          { temporary: true },
        ),
      );
    const usage = { promptTokens: this.promptTokens, completionTokens: count };
    return Promise.resolve({ done: true, value: { finishReason: 'stop', usage } });
  }

  /** Says no more; whoever waits hears the reason, or, without one, that it is over. */
  private stop(reason: unknown): void {
    this.ended = true;
    this.signal.removeEventListener('abort', this.onAbort);
    if (this.slot) cancelWait(this.slot, this);
    this.slot = null;
    const { waiting } = this;
    this.waiting = null;
    if (reason === undefined) waiting?.resolve(NOTHING_MORE);
    else waiting?.reject(reason);
  }
}

type Spoken = IteratorResult<string, HandlerResult>;

const NOTHING_MORE: Spoken = { done: true, value: {} };

/** Waits of so many milliseconds after each other, that end at once when the signal aborts. */
function createPacer(signal: AbortSignal): (ms: number) => Promise<void> {
  let dueMs = performance.now();
  return (ms) =>
    new Promise((resolve, reject) => {
      if (signal.aborted) {
        reject(signal.reason);
        return;
      }
      const abort = () => {
        cancelWait(slot, waiter);
        reject(signal.reason);
      };
      const waiter = {
        wake() {
          signal.removeEventListener('abort', abort);
          resolve();
        },
      };
      dueMs += ms;
      const slot = waitUntil(dueMs, waiter);
      signal.addEventListener('abort', abort, { once: true });
    });
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
  const wait = createPacer(signal);
  let index = 0;
  for (const word of words) {
    // The first word goes out at once; the rest sway a little, the same way each time.
    if (index > 0) await wait(WORD_MS.least + ((index * 7) % WORD_MS.spread));
    signal.throwIfAborted();
    yield word;
    index++;
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
