import { createParser } from 'eventsource-parser';
import { z } from 'zod';
import type { Usage } from '../../shared/protocol.ts';

/**
 * From the text of an event stream to what a chat completion says, one step after the other: text → events →
 * JSON → schema. What does not fit comes out as a value (`malformed`), so that the reader of the events decides.
 */
export type CompletionEvent =
  | { type: 'text'; text: string }
  /** A sign of life without text for the user: reasoning or a tool call. */
  | { type: 'progress' }
  | { type: 'finish'; finishReason: string }
  | { type: 'usage'; usage: Usage }
  | { type: 'end' }
  | { type: 'error'; error: unknown }
  | { type: 'malformed'; reason: string };

/** One event above this is no chat completion any more, characters. */
const LONGEST_EVENT = 1_048_576;

/** Feeds text as it comes from the network and returns what became complete. */
export function createCompletionReader(): (text: string) => CompletionEvent[] {
  let events: CompletionEvent[] = [];
  const parser = createParser({
    maxBufferSize: LONGEST_EVENT,
    onEvent: ({ event, data }) => {
      if (event === 'error') events.push({ type: 'error', error: readError(data) });
      else readData(data, events);
    },
    onError: (error) => {
      if (error.type === 'max-buffer-size-exceeded')
        events.push({ type: 'malformed', reason: `an event is longer than ${LONGEST_EVENT} characters` });
      // llama.cpp reports its errors in a field of this name. Other unknown fields are legal and mean nothing.
      else if (error.type === 'unknown-field' && error.field === 'error')
        events.push({ type: 'error', error: parseJson(error.value ?? '') ?? error.value });
    },
  });
  return (text) => {
    parser.feed(text);
    const complete = events;
    events = [];
    return complete;
  };
}

/** True for what begins like an event stream, whatever it is labelled. */
export function isEventStream(text: string): boolean {
  return /^\s*(data|event)?:/.test(text);
}

/** Reads a whole completion that came without streaming. */
export function readWholeCompletion(body: string): CompletionEvent[] {
  const events: CompletionEvent[] = [];
  readData(body, events);
  return events;
}

/** What an `event: error` says: bare, or in a field as elsewhere. */
function readError(data: string): unknown {
  const value = parseJson(data) as { error?: unknown } | null | undefined;
  return value?.error || value || data;
}

function readData(data: string, events: CompletionEvent[]): void {
  if (data.trim() === '') return;
  if (data.trim() === '[DONE]') {
    events.push({ type: 'end' });
    return;
  }
  const value = parseJson(data);
  if (value === undefined) {
    events.push({ type: 'malformed', reason: 'a chunk is not valid JSON' });
    return;
  }
  const parsed = chunkSchema.safeParse(value);
  if (!parsed.success) {
    events.push({
      type: 'malformed',
      reason: `a chunk has a wrong ${parsed.error.issues[0]?.path.join('.') || 'shape'}`,
    });
    return;
  }
  const chunk = parsed.data;
  if (chunk.error) events.push({ type: 'error', error: chunk.error });
  else if (chunk.object === 'error') events.push({ type: 'error', error: value });

  // Only the first choice: we never ask for more.
  const choice = chunk.choices?.find((candidate) => (candidate.index ?? 0) === 0);
  const delta = choice?.delta ?? choice?.message;
  if (delta) {
    // A refusal is what the model wants the user to read.
    const text = textOf(delta.content) || delta.refusal || '';
    if (text) events.push({ type: 'text', text });
    // An array of content without text: the model is thinking.
    else if (delta.reasoning_content || delta.reasoning || delta.tool_calls?.length || delta.content?.length)
      events.push({ type: 'progress' });
  }
  if (choice?.finish_reason) events.push({ type: 'finish', finishReason: choice.finish_reason });
  if (chunk.usage)
    events.push({
      type: 'usage',
      usage: {
        promptTokens: chunk.usage.prompt_tokens,
        completionTokens: chunk.usage.completion_tokens,
      },
    });
}

const contentSchema = z.union([
  z.string(),
  z.array(z.looseObject({ type: z.string().optional(), text: z.string().nullish() })),
]);

const deltaSchema = z.object({
  content: contentSchema.nullish(),
  refusal: z.string().nullish(),
  reasoning_content: z.unknown().optional(),
  reasoning: z.unknown().optional(),
  tool_calls: z.array(z.unknown()).nullish().catch(null),
});

const chunkSchema = z.object({
  object: z.string().nullish(),
  error: z.unknown().optional(),
  choices: z
    .array(
      z.object({
        index: z.number().nullish(),
        delta: deltaSchema.nullish(),
        message: deltaSchema.nullish(),
        finish_reason: z.string().nullish(),
      }),
    )
    .nullish(),
  usage: z
    .object({ prompt_tokens: z.number(), completion_tokens: z.number().default(0) })
    .nullish()
    // Statistics in another shape are no reason to lose an answer.
    .catch(null),
});

/** Content parts, as Mistral sends them, hold text and thinking side by side. */
function textOf(content: z.infer<typeof contentSchema> | null | undefined): string {
  if (typeof content === 'string') return content;
  return (content ?? []).map((part) => (part.type === 'text' ? (part.text ?? '') : '')).join('');
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
