import { RivuletError } from '../../shared/errors.ts';

/**
 * What went wrong at a provider, as one of our errors. Whether a retry is worth it is decided here and nowhere
 * else.
 */

/** Refusals that pass by themselves: timeout, conflict, too early, too many requests. All 5xx do too. */
const TEMPORARY_STATUSES = new Set([408, 409, 425, 429]);
/** Longest provider message that is passed on, characters. */
const LONGEST_MESSAGE = 300;
/** A provider that asks for more is not waited for any longer. */
const LONGEST_RETRY_AFTER_MS = 3_600_000;

/** An HTTP answer other than 2xx. `body` is what could be read of it. */
export function errorFromStatus(
  status: number,
  headers: Headers,
  body: string,
  apiKey: string | undefined,
): RivuletError {
  const temporary = isTemporaryStatus(status);
  const said = cleanMessage(messageFromBody(body), apiKey);
  const message = `The model server answered ${status}${said ? `: ${said}` : ''}`;
  return new RivuletError('model_error', message, {
    temporary,
    retryAfterMs: temporary ? readRetryAfter(headers, Date.now()) : undefined,
  });
}

/** An error object inside a stream that began well. Without a status in it, it counts as a passing trouble. */
export function errorFromStream(error: unknown, apiKey: string | undefined): RivuletError {
  const fields = typeof error === 'object' && error !== null ? (error as Record<string, unknown>) : {};
  const status = Number(fields.code ?? fields.status);
  const final =
    (status >= 400 && status < 500 && !isTemporaryStatus(status)) ||
    fields.type === 'invalid_request_error' ||
    fields.type === 'BadRequestError' ||
    fields.code === 'context_length_exceeded';
  const said = cleanMessage(messageFrom(error), apiKey);
  return new RivuletError('model_error', `The model server reported an error${said ? `: ${said}` : ''}`, {
    temporary: !final,
  });
}

/** A connection that was refused or broke. */
export function errorFromNetwork(cause: unknown): RivuletError {
  const code = networkCode(cause);
  if (code?.endsWith('_TIMEOUT') || code === 'ETIMEDOUT')
    return new RivuletError('model_timeout', 'The model server did not answer in time.', {
      temporary: true,
      cause,
    });
  return new RivuletError(
    'model_error',
    `The connection to the model server failed${code ? ` (${code})` : ''}.`,
    { temporary: true, cause },
  );
}

/**
 * How long a provider wants us to wait, ms: `Retry-After` in seconds or as an HTTP date, or the finer
 * `retry-after-ms` of some providers. Undefined when there is nothing readable.
 */
export function readRetryAfter(headers: Headers, now: number): number | undefined {
  const fine = headers.get('retry-after-ms');
  if (fine !== null && /^\d+(\.\d+)?$/.test(fine)) return bounded(Number(fine));
  const text = headers.get('retry-after')?.trim();
  if (!text) return undefined;
  if (/^\d+(\.\d+)?$/.test(text)) return bounded(Number(text) * 1000);
  const date = /^[A-Za-z]{3,9},? /.test(text) ? Date.parse(text) : Number.NaN;
  return Number.isNaN(date) ? undefined : bounded(date - now);
}

function bounded(ms: number): number {
  return Math.min(Math.max(Math.ceil(ms), 0), LONGEST_RETRY_AFTER_MS);
}

function isTemporaryStatus(status: number): boolean {
  return TEMPORARY_STATUSES.has(status) || status >= 500;
}

function messageFromBody(body: string): string {
  try {
    return messageFrom(JSON.parse(body));
  } catch {
    // A proxy's HTML page says nothing to a user; a line of plain text may.
    return body.trimStart().startsWith('<') ? '' : body;
  }
}

/** Providers put their message in `error.message`, `error`, `message` or `detail`. */
function messageFrom(value: unknown): string {
  if (typeof value === 'string') return value;
  if (typeof value !== 'object' || value === null) return '';
  const { error, message, detail } = value as Record<string, unknown>;
  if (typeof message === 'string') return message;
  if (error !== undefined) return messageFrom(error);
  return typeof detail === 'string' ? detail : detail === undefined ? '' : JSON.stringify(detail);
}

/** One short line that never holds the key, nor what some providers quote of it. */
function cleanMessage(message: string, apiKey: string | undefined): string {
  const unkeyed = apiKey ? message.replaceAll(apiKey, '[key]') : message;
  const line = unkeyed
    .replace(/\bsk-[\w*.-]+/g, '[key]')
    .replace(/\s+/g, ' ')
    .trim();
  return line.length > LONGEST_MESSAGE ? `${line.slice(0, LONGEST_MESSAGE)}…` : line;
}

function networkCode(error: unknown): string | undefined {
  for (let current = error, depth = 0; current instanceof Error && depth < 4; depth++) {
    const { code } = current as NodeJS.ErrnoException;
    if (typeof code === 'string') return code;
    current = current instanceof AggregateError ? current.errors[0] : current.cause;
  }
  return undefined;
}
