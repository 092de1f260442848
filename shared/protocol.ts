import { z } from 'zod';
import type { ErrorCode } from './errors.ts';
import { parseFrameId } from './frame-id.ts';

/**
 * The wire vocabulary: client frames with their schemas, server frames as types, close codes. No I/O here.
 * The page for readers is shared/PROTOCOL.md.
 */

const ID_PATTERN = /^[A-Za-z0-9._:@-]+$/;

/** Close codes as reconnect advice: 4000–4499 reconnect, 4500–4999 do not. */
export const CLOSE = {
  shuttingDown: 4000,
  slowClient: 4001,
  noHeartbeat: 4002,
  tooManyConnections: 4003,
  unavailable: 4004,
  replaced: 4010,
  badUserId: 4500,
  unauthorized: 4501,
  banned: 4502,
  protocolViolation: 4503,
  payloadTooLarge: 4504,
} as const;

/** All-digit user ids up to this number are kept for systems. */
const RESERVED_USER_IDS = 10_000;

/**
 * Reads a user id as clients send it (string or integer) and returns its one spelling, or the reason why it is
 * refused.
 */
export function parseUserId(value: unknown): { userId: string } | { reason: string } {
  let text: string;
  if (typeof value === 'number') {
    if (!Number.isSafeInteger(value)) return { reason: 'userId must be an integer below 2^53, or a string' };
    text = String(value);
  } else if (typeof value === 'string') {
    text = value;
  } else {
    return { reason: value === undefined ? 'userId is missing' : 'userId must be an integer or a string' };
  }
  if (text.length < 1 || text.length > 64) return { reason: 'userId must have 1 to 64 characters' };
  if (!ID_PATTERN.test(text)) return { reason: 'userId may hold only A-Z a-z 0-9 . _ : @ -' };
  if (/^-?\d+$/.test(text) && Number(text) <= RESERVED_USER_IDS)
    return { reason: `userId ${text} is reserved: whole numbers must be above ${RESERVED_USER_IDS}` };
  return { userId: text };
}

const id = (name: string, max: number) =>
  z
    .string(`${name} must be a string`)
    .min(1, `${name} must not be empty`)
    .max(max, `${name} must have at most ${max} characters`)
    .regex(ID_PATTERN, `${name} may hold only A-Z a-z 0-9 . _ : @ -`);

export const messageIdSchema = id('messageId', 128);
export const groupIdSchema = id('group', 64);
/** User ids inside frames (recipients): an integer means its decimal string. */
export const userIdSchema = z.union(
  [z.int().transform(String), id('user', 64)],
  'must be a user id: 1 to 64 of A-Z a-z 0-9 . _ : @ -, or an integer',
);
const frameIdSchema = z
  .string()
  .max(40)
  .refine((text) => parseFrameId(text) !== null, 'after must look like 1-42');

const historySchema = z
  .array(
    z.object({
      role: z.enum(['user', 'assistant', 'system']),
      content: z.string(),
    }),
  )
  .max(1000, 'history may hold at most 1000 messages');

export const contentsSchema = z.string('contents must be a string').min(1, 'contents must not be empty');

export const clientFrameSchema = z.discriminatedUnion('type', [
  z.object({
    type: z.literal('init'),
    userId: z.unknown().optional(),
    token: z.string().max(8192).optional(),
    device: id('device', 64).optional(),
    inboxAfter: z
      .union([z.int().min(0).transform(String), z.string().max(64)], 'must be an inbox id')
      .optional(),
  }),
  z.object({
    type: z.literal('chat'),
    messageId: messageIdSchema,
    contents: contentsSchema,
    history: historySchema.optional(),
    conversationId: id('conversationId', 128).optional(),
    model: z.string().min(1).max(128).optional(),
    parameters: z.record(z.string(), z.unknown()).optional(),
  }),
  z.object({ type: z.literal('resume'), messageId: messageIdSchema, after: frameIdSchema.optional() }),
  z.object({ type: z.literal('cancel'), messageId: messageIdSchema }),
  z.object({
    type: z.literal('send'),
    messageId: messageIdSchema,
    to: z
      .object({ user: userIdSchema.nullish(), group: groupIdSchema.nullish() })
      .transform(({ user, group }, context): { user: string } | { group: string } => {
        if (typeof user === 'string' && typeof group !== 'string') return { user };
        if (typeof group === 'string' && typeof user !== 'string') return { group };
        context.addIssue('to must have one of user, group');
        return z.NEVER;
      }),
    contents: contentsSchema,
  }),
  z.object({ type: z.literal('ack'), id: z.string().max(64) }),
  z.object({ type: z.literal('join'), group: groupIdSchema }),
  z.object({ type: z.literal('leave'), group: groupIdSchema }),
  z.object({ type: z.literal('members'), group: groupIdSchema }),
  z.object({ type: z.literal('groups') }),
  z.object({ type: z.literal('presence'), userIds: z.array(userIdSchema).min(1).max(100) }),
  z.object({ type: z.literal('heartbeat') }),
]);

export type ClientFrame = z.infer<typeof clientFrameSchema>;
export type ClientFrameOf<T extends ClientFrame['type']> = Extract<ClientFrame, { type: T }>;
export type HistoryMessage = z.infer<typeof historySchema>[number];

/** What a worker needs to answer: kept in the record until the generation ends. */
export interface ChatPayload {
  contents: string;
  history?: HistoryMessage[];
  conversationId?: string;
  model?: string;
  parameters?: Record<string, unknown>;
}

export type GenerationStatus = 'queued' | 'running' | 'done' | 'failed' | 'cancelled';
/** Whether it has not ended yet. */
export const isOpenStatus = (status: GenerationStatus) => status === 'queued' || status === 'running';
export type FinishReason = 'stop' | 'length' | 'cancelled' | (string & {});
export interface Usage {
  promptTokens: number;
  completionTokens: number;
}

/** Frames that live in a log. */
export type LogFrame =
  | { type: 'start'; messageId: string; id: string; attempt: number }
  | { type: 'token'; messageId: string; id: string; text: string }
  | {
      type: 'done';
      messageId: string;
      id: string;
      finishReason: FinishReason;
      /** UTF-16 units of the attempt's text. */
      length: number;
      usage?: Usage;
    }
  | { type: 'failed'; messageId: string; id: string; code: ErrorCode; message: string; temporary: boolean };

export type ServerFrame =
  | LogFrame
  | {
      type: 'ready';
      userId: string;
      connectionId: string;
      node: string;
      heartbeatMs: number;
      limits: { maxFrameBytes: number; userActive: number; queue: number; messageBytes: number };
    }
  | { type: 'accepted'; messageId: string; position: number; duplicate: boolean }
  | { type: 'queued'; messageId: string; position: number }
  | {
      type: 'resumed';
      messageId: string;
      recovered: boolean;
      compacted: boolean;
      status: GenerationStatus;
    }
  | {
      type: 'rejected';
      messageId: string;
      code: ErrorCode;
      message: string;
      temporary: boolean;
      retryAfterMs?: number;
      position?: number;
    }
  | {
      type: 'message';
      id: string;
      messageId: string;
      from: string;
      group?: string;
      contents: string;
      sentAt: number;
    }
  | { type: 'sent'; messageId: string; id: string; online: number }
  | { type: 'notice'; contents: string; [field: string]: unknown }
  /** Messages up to this inbox id were dropped (too many, or too old) before this device had them. */
  | { type: 'inbox'; dropped: true; upTo: string }
  | { type: 'joined'; group: string; members: number }
  | { type: 'left'; group: string }
  | { type: 'members'; group: string; count: number; userIds: string[] }
  /** The groups of the user who asks. */
  | { type: 'groups'; groups: string[] }
  /** `userIds` as they were asked for. */
  | { type: 'presence'; userIds: string[]; online: Record<string, { device: string; node: string }[]> }
  | { type: 'heartbeat'; time: number }
  | { type: 'error'; code: ErrorCode; message: string; messageId?: string; retryAfterMs?: number };

export type ServerFrameOf<T extends ServerFrame['type']> = Extract<ServerFrame, { type: T }>;

/** Reads one text frame. The reason names the field that was wrong; `messageId` is given where it could be read. */
export function parseClientFrame(
  text: string,
): { frame: ClientFrame } | { reason: string; type?: string; messageId?: string } {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return { reason: 'the frame is not valid JSON' };
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    return { reason: 'the frame must be a JSON object' };
  let parsed = clientFrameSchema.safeParse(value, IN_WORDS);
  if (!parsed.success)
    // Many a JSON library writes null for what is absent.
    parsed = clientFrameSchema.safeParse(
      Object.fromEntries(Object.entries(value).filter(([, field]) => field !== null)),
      IN_WORDS,
    );
  if (parsed.success) return { frame: parsed.data };
  const { type, messageId } = value as Record<string, unknown>;
  const known = {
    ...(typeof type === 'string' ? { type } : {}),
    ...(messageIdSchema.safeParse(messageId).success ? { messageId: messageId as string } : {}),
  };
  if (typeof type !== 'string') return { reason: 'type is missing or not a string', ...known };
  if (!FRAME_TYPES.has(type)) return { reason: `type "${type.slice(0, 40)}" is not known`, ...known };
  return { reason: describeIssues(parsed.error), ...known };
}

const FRAME_TYPES = new Set<string>(clientFrameSchema.options.map((option) => option.shape.type.value));

const NAMES: Partial<Record<string, string>> = {
  array: 'a list',
  boolean: 'true or false',
  int: 'an integer',
  number: 'a number',
  object: 'an object',
  record: 'an object',
  string: 'a string',
};

/** Says what is wrong with what people sent; where a schema has words of its own, those are said. */
export const IN_WORDS: z.core.ParseContext<z.core.$ZodIssue> = {
  error(issue) {
    switch (issue.code) {
      case 'invalid_type': {
        if (issue.input === undefined) return 'is missing';
        const name = NAMES[issue.expected];
        return name && `must be ${name}`;
      }
      case 'invalid_value':
        return `must be one of ${issue.values.join(', ')}`;
      case 'too_small':
        if (issue.origin === 'number') return `must be at least ${issue.minimum}`;
        return issue.minimum === 1 ? 'must not be empty' : undefined;
      case 'too_big':
        if (issue.origin === 'string') return `must have at most ${issue.maximum} characters`;
        return issue.origin === 'array' ? `must hold at most ${issue.maximum}` : undefined;
      default:
        return undefined;
    }
  },
};

/** One line that names each wrong field: `history.2.role must be one of user, assistant, system`. */
export function describeIssues(error: z.ZodError): string {
  return error.issues
    .slice(0, 3)
    .map((issue) => {
      const path = issue.path.join('.');
      if (!path || issue.message.startsWith(path)) return issue.message;
      return /^(must|is) /.test(issue.message) ? `${path} ${issue.message}` : `${path}: ${issue.message}`;
    })
    .join('; ');
}
