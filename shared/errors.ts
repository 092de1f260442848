/**
 * The one table of error codes. `message` is the default text for people, `temporary` says whether the same
 * request may succeed later. Every `rejected`, `failed` and `error` frame takes its code from here.
 */
export const ERRORS = {
  invalid_frame: { message: 'The frame could not be understood.', temporary: false },
  not_ready: { message: 'Send an init frame first.', temporary: false },
  unauthorized: { message: 'The credentials are missing or not valid.', temporary: false },
  forbidden: { message: 'This is not allowed.', temporary: false },
  banned: { message: 'This account is banned.', temporary: false },
  locked: { message: 'This account is locked for now.', temporary: true },
  quota_exhausted: { message: 'No conversations are left for today.', temporary: true },
  content_refused: { message: 'The contents were refused by moderation.', temporary: false },
  payload_too_large: { message: 'The message is too large.', temporary: false },
  rate_limited: { message: 'Too many frames; slow down.', temporary: true },
  too_many_active: { message: 'Too many answers are open for this user.', temporary: true },
  conversation_busy: { message: 'An answer of this conversation is still open.', temporary: true },
  queue_full: { message: 'The queue is full; try again later.', temporary: true },
  unknown_message: { message: 'There is no such message, or it is no longer kept.', temporary: false },
  duplicate_recipient: { message: 'A recipient is named more than once.', temporary: false },
  model_error: { message: 'The model failed.', temporary: false },
  model_timeout: { message: 'The model took too long.', temporary: true },
  attempts_exhausted: { message: 'Every attempt to answer failed.', temporary: true },
  shutting_down: { message: 'This node is shutting down; reconnect.', temporary: true },
  internal: { message: 'Something went wrong on our side.', temporary: true },
} as const satisfies Record<string, { message: string; temporary: boolean }>;

export type ErrorCode = keyof typeof ERRORS;

export interface RivuletErrorOptions {
  /** Overrides the table's flag, where the place that raises the error knows better. */
  temporary?: boolean;
  /** How long to wait before trying again, ms. */
  retryAfterMs?: number;
  cause?: unknown;
}

/** An error with a code from the table. Whether it is worth a retry is decided here, where it is born. */
export class RivuletError extends Error {
  readonly code: ErrorCode;
  readonly temporary: boolean;
  readonly retryAfterMs: number | undefined;

  constructor(code: ErrorCode, message?: string, options: RivuletErrorOptions = {}) {
    super(message ?? ERRORS[code].message, { cause: options.cause });
    this.name = 'RivuletError';
    this.code = code;
    this.temporary = options.temporary ?? ERRORS[code].temporary;
    this.retryAfterMs = options.retryAfterMs;
  }
}
