import { RivuletError } from '../../shared/errors.ts';
import type { HistoryMessage } from '../../shared/protocol.ts';

/**
 * Fits a conversation into a token budget. The system prompt and the question always stay; of the history only
 * the newest messages do, as many as fit.
 *
 * What it costs: a conversation that fits even at one token a byte (the worst case) is never tokenized. For the
 * rest, counting stops where the budget does, so the price follows the budget, not the history. The tokenizer is
 * `cl100k_base`, loaded on first use: 90 ms and 40 MB, where `o200k_base` takes 215 ms and 67 MB. It is not the
 * tokenizer of every model behind the endpoint; for the newer ones it counts a little too much, which is the
 * safe side. The budget covers the prompt: leave room for the answer when you set it.
 */

/** Role and delimiters around each message, as chat templates add them. */
const TOKENS_PER_MESSAGE = 4;
/** The opening of the answer. */
const TOKENS_FOR_REPLY = 3;

/**
 * Text is counted in slices of this many characters. Byte-pair merging is quadratic in the length of one run
 * without a word break, so 256 KB of one letter in one piece would take half a minute; in slices, 256 KB of
 * random letters take 0.2 s. A slice also is the distance between two looks at the limit.
 */
const SLICE = 512;
/** How far a cut moves back to fall before a space, where it does not change the count, characters. */
const SLICE_GIVE = 128;
/** The tokenizer remembers pieces it merged; its default of 100,000 would hold strings of strangers for long. */
const MERGE_CACHE_SIZE = 5_000;

/** `count(text, limit)` counts tokens and stops soon after `limit`: a result above it means "more than". */
export type CountTokens = (text: string, limit?: number) => number;

let loading: Promise<CountTokens> | undefined;

/** Loads the tokenizer once. Call it at start-up where a first request should not wait for it. */
export function loadTokenizer(): Promise<CountTokens> {
  loading ??= import('gpt-tokenizer/encoding/cl100k_base').then((encoding) => {
    encoding.setMergeCacheSize(MERGE_CACHE_SIZE);
    // Text that looks like a special token is text: by default the library throws on it.
    const options = { disallowedSpecial: new Set<string>() };
    return (text, limit = Number.POSITIVE_INFINITY) => {
      let tokens = 0;
      for (const slice of sliceForCounting(text)) {
        tokens += encoding.countTokens(slice, options);
        if (tokens > limit) break;
      }
      return tokens;
    };
  });
  return loading;
}

/** Cuts before a space where one is near. A cut in a run without breaks adds a token or two to the count. */
function* sliceForCounting(text: string): Generator<string> {
  for (let start = 0; start < text.length; ) {
    let end = Math.min(start + SLICE, text.length);
    if (end < text.length) {
      const space = text.slice(end - SLICE_GIVE, end).lastIndexOf(' ');
      if (space > 0) end = end - SLICE_GIVE + space;
      else if (splitsPair(text, end)) end--;
    }
    yield text.slice(start, end);
    start = end;
  }
}

/** True where a cut at `index` would halve a surrogate pair. */
function splitsPair(text: string, index: number): boolean {
  const before = text.charCodeAt(index - 1);
  const after = text.charCodeAt(index);
  return before >= 0xd800 && before < 0xdc00 && after >= 0xdc00 && after < 0xe000;
}

export interface Conversation {
  systemPrompt?: string | undefined;
  history?: readonly HistoryMessage[] | undefined;
  question: string;
}

export interface FittedConversation {
  /** System prompt, kept history, question: ready to send. */
  messages: HistoryMessage[];
  /** How many history messages were left out. */
  dropped: number;
}

/**
 * Trims the history, oldest first, to what fits in `budget` tokens.
 *
 * A trimmed history never begins with an answer whose question is gone: some chat templates refuse that. Throws
 * `payload_too_large` when the system prompt and the question alone do not fit.
 */
export async function fitConversation(
  { systemPrompt, history = [], question }: Conversation,
  budget: number,
): Promise<FittedConversation> {
  const frame = (kept: readonly HistoryMessage[]): HistoryMessage[] => [
    ...(systemPrompt ? [{ role: 'system' as const, content: systemPrompt }] : []),
    ...kept,
    { role: 'user', content: question },
  ];

  if (mostTokens(frame(history)) <= budget) return { messages: frame(history), dropped: 0 };

  const count = await loadTokenizer();
  const systemTokens = systemPrompt ? count(systemPrompt) + TOKENS_PER_MESSAGE : 0;
  const questionRoom = budget - systemTokens - TOKENS_PER_MESSAGE - TOKENS_FOR_REPLY;
  const questionTokens = count(question, questionRoom);
  if (questionTokens > questionRoom)
    throw new RivuletError(
      'payload_too_large',
      `contents is too long for the model: ${Math.max(questionRoom, 0)} tokens are left for the question (context of ${budget}, system prompt ${systemTokens}) and its ${question.length} characters take more.`,
      { temporary: false },
    );

  let room = questionRoom - questionTokens;
  let first = history.length;
  while (first > 0) {
    const message = history[first - 1]!;
    const available = room - TOKENS_PER_MESSAGE;
    if (available < 0) break;
    const tokens = count(message.content, available);
    if (tokens > available) break;
    room = available - tokens;
    first--;
  }
  if (first > 0) while (history[first]?.role === 'assistant') first++;
  return { messages: frame(history.slice(first)), dropped: first };
}

/** Tokens of a prompt as counted here: what `fitConversation` compares with its budget. */
export async function countPromptTokens(messages: readonly HistoryMessage[]): Promise<number> {
  const count = await loadTokenizer();
  return messages.reduce(
    (sum, message) => sum + count(message.content) + TOKENS_PER_MESSAGE,
    TOKENS_FOR_REPLY,
  );
}

/** An upper bound without tokenizing: no token is shorter than a byte. */
function mostTokens(messages: readonly HistoryMessage[]): number {
  return messages.reduce(
    (sum, message) => sum + Buffer.byteLength(message.content) + TOKENS_PER_MESSAGE,
    TOKENS_FOR_REPLY,
  );
}
