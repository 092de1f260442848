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
 * With any of `tokens`, `intervalMs`, `firstTokenMs`, `failAttempts`, `seed` in `parameters` it becomes a load and
 * failure model (README.md, "Your model"): exactly `tokens` words, each yielded alone, every one but the first with
 * a space before it (so the text is N words with N-1 spaces). Word k depends on contents, seed and k only: an
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
/** And how many before it looks whether it is still wanted: its signal costs as much as forty words. */
const WORDS_PER_LOOK = 4 * WORDS_PER_TURN;

function runScript({ contents, parameters }: HandlerRequest, context: HandlerContext): ReturnType<Handler> {
  const parsed = scriptSchema.safeParse(parameters);
  if (!parsed.success) return refuse(describeIssues(parsed.error));
  const { tokens, intervalMs, firstTokenMs, failAttempts, seed } = parsed.data;
  const { attempt } = context;
  const fails = attempt <= failAttempts;
  const count = fails ? Math.floor(tokens / 2) : tokens;
  const nextWord = wordsFor(contents, seed);
  return new Recital(context, {
    count,
    word: (index) => nextWord(index === 0 ? WORDS : SPACED_WORDS),
    waitMs: (index) => (index === 0 ? firstTokenMs : intervalMs),
    end() {
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
    },
  });
}

// biome-ignore lint/correctness/useYield: it fails as a handler does, when it is asked for its first word
async function* refuse(issues: string): ReturnType<Handler> {
  throw new RivuletError('invalid_frame', `parameters: ${issues}`, { temporary: false });
}

/** What is said, each word asked for once and in order. */
interface Text {
  count: number;
  word(index: number): string;
  /** How long after the word before, or after the start. */
  waitMs(index: number): number;
  /** Throws where the answer is to fail after its last word. */
  end(): HandlerResult;
}

/**
 * An async generator by hand. Under load a generator function's promises, a timer and an abort listener for each word
 * would be half of what a worker does: the load model has to cost less than what it is there to load.
 *
 * Words are due at their time counted from the first, as a model elsewhere would have it: a worker that is late for a
 * moment catches up, and its answers do not fall into step with each other. Calls of `next` must not overlap.
 */
class Recital implements AsyncGenerator<string, HandlerResult, undefined>, Waiter {
  private readonly context: HandlerContext;
  private readonly text: Text;
  /** Asked for when there is something to wait for. */
  private signal: AbortSignal | null = null;
  private index = 0;
  private ended = false;
  private dueMs = performance.now();
  private slot: Slot | null = null;
  /** Who waits for the next word. */
  private waiting: {
    resolve(next: Spoken): void;
    reject(reason: unknown): void;
  } | null = null;
  private readonly onAbort = () => this.stop(this.signal!.reason);

  constructor(context: HandlerContext, text: Text) {
    this.context = context;
    this.text = text;
  }

  next(): Promise<Spoken> {
    const { index, text } = this;
    if (this.ended) return Promise.resolve(NOTHING_MORE);
    if (index > 0 && index === text.count) return this.leave();
    const waitMs = text.waitMs(index);
    const looks = waitMs > 0 || (index > 0 && index % WORDS_PER_LOOK === 0);
    if (looks && !this.signal && this.isAborted()) return this.leave();
    if (waitMs > 0 || (index > 0 && index % WORDS_PER_TURN === 0))
      return new Promise((resolve, reject) => {
        this.waiting = { resolve, reject };
        this.dueMs += waitMs;
        if (waitMs > 0) this.slot = waitUntil(this.dueMs, this);
        else setImmediate(() => this.wake());
      });
    return index < text.count ? Promise.resolve(this.say()) : this.leave();
  }

  wake(): void {
    this.slot = null;
    const { waiting } = this;
    this.waiting = null;
    if (!waiting) return;
    if (this.index < this.text.count) waiting.resolve(this.say());
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
    return { done: false, value: this.text.word(this.index++) };
  }

  /** The first look whether it is still wanted; from then on `onAbort` ends it. */
  private isAborted(): boolean {
    this.signal = this.context.signal;
    if (!this.signal.aborted) this.signal.addEventListener('abort', this.onAbort);
    return this.signal.aborted;
  }

  /** Aborted, or at its end. */
  private async leave(): Promise<Spoken> {
    this.stop(undefined);
    this.signal?.throwIfAborted();
    return { done: true, value: this.text.end() };
  }

  /** Says no more; whoever waits hears the reason, or, without one, that it is over. */
  private stop(reason: unknown): void {
    this.ended = true;
    this.signal?.removeEventListener('abort', this.onAbort);
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

function answerNaturally(request: HandlerRequest, context: HandlerContext): ReturnType<Handler> {
  const words = composeDemoAnswer(request).match(/\s*\S+/g) ?? [];
  return new Recital(context, {
    count: words.length,
    word: (index) => words[index]!,
    // The first word goes out at once; the rest sway a little, the same way each time.
    waitMs: (index) => (index === 0 ? 0 : WORD_MS.least + ((index * 7) % WORD_MS.spread)),
    end() {
      const prompt = [request.contents, ...(request.history ?? []).map((message) => message.content)];
      return {
        finishReason: 'stop',
        usage: {
          // Characters by four: the demo has no tokenizer, and the number only has to be plausible.
          promptTokens: prompt.reduce((sum, text) => sum + Math.ceil(text.length / 4), 0),
          completionTokens: words.length,
        },
      };
    },
  });
}
