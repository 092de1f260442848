import { createHash, randomUUID } from 'node:crypto';
import { z } from 'zod';
import { type ErrorCode, RivuletError } from '../../shared/errors.ts';
import { encodePayload } from '../../shared/generation-store.ts';
import {
  type ClientFrameOf,
  clientFrameSchema,
  describeIssues,
  type HistoryMessage,
  IN_WORDS,
} from '../../shared/protocol.ts';

/**
 * What the AI SDK's client sends, as questions of ours.
 *
 * The generation's id is made from the chat, the last message of the user and its text: sending it again joins the
 * answer instead of asking twice, editing it asks anew, and `regenerate` asks anew every time.
 */

const MOST_HISTORY = 1_000; // of our own protocol; older messages are left out
const MOST_PARTS = 1_000; // of a message; an answer of ours has a few
const chatIdSchema = z.string('id must be a string').min(1, 'id must not be empty').max(512);
const requestIdSchema = z.string('requestId must be a string').min(1).max(256);

/** What need not be there, or is null: many a JSON library writes that for what is absent. */
const optional = <T extends z.ZodType>(schema: T) =>
  schema
    .nullable()
    .transform((value) => value ?? undefined)
    .optional();

/**
 * The last `most` items of a list, looked at one by one up to the first wrong one: a client that nobody knows yet could
 * have zod describe a hundred thousand of them.
 */
const eachOf =
  <T>(item: z.ZodType<T>, most: number) =>
  (all: unknown[], context: z.RefinementCtx): T[] => {
    const list: T[] = [];
    for (let index = Math.max(0, all.length - most); index < all.length; index++) {
      const parsed = item.safeParse(all[index], IN_WORDS);
      if (!parsed.success) {
        const { path, message } = parsed.error.issues[0]!;
        context.addIssue({ code: 'custom', path: [index, ...path], message });
        return z.NEVER;
      }
      list.push(parsed.data);
    }
    return list;
  };

const partSchema = z.object({ type: z.string(), text: z.unknown().optional() });

const uiMessageSchema = z.object({
  id: z.string().max(512),
  role: z.enum(['system', 'user', 'assistant']),
  parts: z
    .custom<unknown[]>(
      (value) => Array.isArray(value) && value.length <= MOST_PARTS,
      `must be a list of at most ${MOST_PARTS} parts`,
    )
    .transform(eachOf(partSchema, MOST_PARTS)),
});

const extrasSchema = z.object({
  model: optional(z.string().min(1).max(128)),
  parameters: optional(z.record(z.string(), z.unknown())),
  userId: z.unknown().optional(),
});

const headersSchema = z.object({ authorization: optional(z.string()) });

const askShape = {
  id: chatIdSchema,
  trigger: optional(z.enum(['submit-message', 'regenerate-message'])),
  messageId: optional(z.string().max(512)),
  messages: z
    .custom<unknown[]>((value) => Array.isArray(value) && value.length > 0, 'must be a list of messages')
    .transform(eachOf(uiMessageSchema, MOST_HISTORY + 1)),
};

const frameSchema = z.discriminatedUnion('type', [
  z.object({
    type: z.literal('send'),
    requestId: requestIdSchema,
    ...askShape,
    headers: optional(headersSchema),
    body: optional(extrasSchema),
  }),
  z.object({
    type: z.literal('resume'),
    requestId: requestIdSchema,
    id: chatIdSchema,
    lastSequence: optional(z.int()),
    headers: optional(headersSchema),
    body: optional(extrasSchema),
  }),
  z.object({ type: z.literal('abort'), requestId: requestIdSchema }),
]);

/** The HTTP twin puts the extras of `body` beside the rest. */
const postSchema = z.object({ ...askShape, ...extrasSchema.shape });

export type AiFrame = z.infer<typeof frameSchema>;
export type AiFrameOf<T extends AiFrame['type']> = Extract<AiFrame, { type: T }>;
export type AiPost = z.infer<typeof postSchema>;
export type UiMessage = z.infer<typeof uiMessageSchema>;

/** Reads one text frame. `requestId` is given where it could be read, so that it can be answered. */
export function parseAiFrame(text: string): { frame: AiFrame } | { reason: string; requestId?: string } {
  const value = parseJson(text);
  if (value === undefined) return { reason: 'the frame is not a JSON object' };
  const parsed = frameSchema.safeParse(value, IN_WORDS);
  if (parsed.success) return { frame: parsed.data };
  const requestId = requestIdSchema.safeParse(value.requestId);
  return {
    reason: describeIssues(parsed.error),
    ...(requestId.success ? { requestId: requestId.data } : {}),
  };
}

export function parseAiPost(text: string): { post: AiPost } | { reason: string } {
  const value = parseJson(text);
  if (value === undefined) return { reason: 'the body is not a JSON object' };
  const parsed = postSchema.safeParse(value, IN_WORDS);
  return parsed.success ? { post: parsed.data } : { reason: describeIssues(parsed.error) };
}

function parseJson(text: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === 'object' && value !== null && !Array.isArray(value))
      return value as Record<string, unknown>;
  } catch {}
  return undefined;
}

/** The chat's id as a conversation id of ours: itself where it can be one. */
export function conversationOf(chatId: string): string {
  return /^[A-Za-z0-9._:@-]{1,128}$/.test(chatId) ? chatId : `ai.${digest([chatId])}`;
}

export type Question = ClientFrameOf<'chat'>;

/** Makes the question, or says why it is none. */
export function readQuestion(
  ask: Pick<AiPost, 'id' | 'trigger' | 'messages' | 'model' | 'parameters'>,
  mostBytes: number,
): { question: Question } | { code: ErrorCode; message: string } {
  const { messages } = ask;
  const last = messages.at(-1)!;
  if (last.role !== 'user')
    return { code: 'invalid_frame', message: 'the last message must be the user’s: tools are not supported' };
  if (last.parts.some((part) => part.type === 'file'))
    return { code: 'invalid_frame', message: 'files are not supported: a message may hold text only' };
  const contents = textOf(last);
  if (contents === '') return { code: 'invalid_frame', message: 'the last message holds no text' };
  const history: HistoryMessage[] = [];
  for (const message of messages.slice(0, -1)) {
    const content = textOf(message);
    if (content !== '') history.push({ role: message.role, content });
  }
  const nonce = ask.trigger === 'regenerate-message' ? randomUUID() : '';
  const parsed = clientFrameSchema.safeParse(
    {
      type: 'chat',
      messageId: `ai.${digest([ask.id, last.id, contents, nonce])}`,
      contents,
      ...(history.length > 0 ? { history } : {}),
      conversationId: conversationOf(ask.id),
      model: ask.model,
      parameters: ask.parameters,
    },
    IN_WORDS,
  );
  if (!parsed.success) return { code: 'invalid_frame', message: describeIssues(parsed.error) };
  const question = parsed.data as Question;
  let bytes: number;
  try {
    bytes = Buffer.byteLength(encodePayload(question));
  } catch (error) {
    if (!(error instanceof RivuletError)) throw error;
    return { code: error.code, message: error.message };
  }
  if (bytes > mostBytes)
    return {
      code: 'payload_too_large',
      message: `The question and its history have ${bytes} bytes; ${mostBytes} are allowed.`,
    };
  return { question };
}

/** The text of a message; what an attempt that was started over had written is void. */
function textOf(message: UiMessage): string {
  let text = '';
  for (const part of message.parts) {
    if (part.type === 'data-restart') text = '';
    else if (part.type === 'text' && typeof part.text === 'string') text += part.text;
  }
  return text;
}

function digest(parts: string[]): string {
  return createHash('sha256').update(JSON.stringify(parts)).digest('base64url');
}
