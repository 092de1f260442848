import type { Logger } from 'pino';
import { ERRORS, type ErrorCode, RivuletError } from '../../shared/errors.ts';
import { describeError, isConnectionError } from '../../shared/redis.ts';
import type { AiDesk, AiStream, Sink } from '../ai/ai-desk.ts';
import type { AiDoor, AiGuest } from '../ai/ai-door.ts';
import { readClaim } from '../ai/ai-session.ts';
import { parseAiPost, readQuestion } from '../ai/questions.ts';
import { type Authenticate, type Identity, readBearer, whenExpired } from '../authenticate.ts';
import type { Origins } from '../origins.ts';
import type { AddressLimit, FrameRates } from '../rate-limits.ts';
import type { HttpAnswer, HttpCall, HttpStream, StreamPeer } from '../socket-server.ts';
import { json } from './routes.ts';

/**
 * The HTTP that the AI SDK's DefaultChatTransport expects, on the same generations as the sockets:
 *
 *   POST /api/chat               asks; the answer is a stream of events
 *   GET  /api/chat/:id/stream    what runs, or has ended unseen, from its beginning; 204 when there is nothing
 *   POST /api/chat/:id/stop      ends what runs; leaving a stream does not
 *
 * An event stream that nothing is written to is kept alive by comments.
 */

const KEEP_ALIVE_MS = 5_000; // uWS closes an HTTP connection after 10 s without a byte
const PATH = /^\/api\/chat(?:\/([^/]+)\/(stream|stop))?$/;
const STREAM_HEADERS = {
  'content-type': 'text/event-stream; charset=utf-8',
  'cache-control': 'no-cache, no-transform',
  'x-accel-buffering': 'no', // nginx would hold the events back
  'x-content-type-options': 'nosniff',
  'x-vercel-ai-ui-message-stream': 'v1',
};

const STORE_AWAY = 'The message store does not answer; try again.';
const STORE_AWAY_MS = 2_000; // most failovers take a few of these; we have tried for seconds ourselves

const STATUS: Partial<Record<ErrorCode, number>> = {
  invalid_frame: 400,
  unauthorized: 401,
  forbidden: 403,
  banned: 403,
  locked: 403,
  unknown_message: 404,
  conversation_busy: 409,
  payload_too_large: 413,
  content_refused: 422,
  rate_limited: 429,
  too_many_active: 429,
  quota_exhausted: 429,
};

export interface AiChatParts {
  aiDesk: AiDesk;
  door: AiDoor;
  authenticate: Authenticate;
  /** AUTH=jwt: who asks is known without the body. */
  needsToken: boolean;
  rates: FrameRates;
  addressLimit: AddressLimit;
  addressOf(call: HttpCall): string;
  origins: Origins;
  maxFrameBytes: number;
  log: Logger;
}

export interface AiChat {
  /** Answers the calls that are for it; null for all others. */
  answer(call: HttpCall): Promise<HttpAnswer> | null;
  /** For a call whose body could not be read. */
  refuse(call: HttpCall, status: number, error: RivuletError): HttpAnswer | null;
  stop(): void;
}

export function createAiChat(parts: AiChatParts): AiChat {
  const { aiDesk, door, log } = parts;
  const keepAlive = new Set<HttpStream>();
  const timer = setInterval(() => {
    // Not to who does not read: uWS ends such a stream, but counts from the last write.
    for (const stream of keepAlive) if (!stream.slow) stream.write(': keep-alive\n\n');
  }, KEEP_ALIVE_MS);
  timer.unref();

  async function identify(call: HttpCall, claim: unknown) {
    const claimed = readClaim(claim ?? call.query.get('userId') ?? call.headers.get('x-user-id'));
    const token = call.query.get('token') ?? readBearer(call.headers.get('authorization') ?? '');
    const identity = await parts.authenticate(claimed, token);
    const retryAfterMs = parts.rates.takeUser(identity.userId, performance.now(), call.body.byteLength);
    if (retryAfterMs > 0) throw new RivuletError('rate_limited', undefined, { retryAfterMs });
    return identity;
  }

  /**
   * A body of events for one answer, among the connections of its address and of its user until `close`. What is written
   * before the head is out waits in the stream.
   */
  function openStream(call: HttpCall, { userId, expiresMs }: Identity) {
    const address = parts.addressOf(call);
    if (!parts.addressLimit.enter(address))
      throw new RivuletError('rate_limited', 'too many connections from this address right now');
    let http: HttpStream | null = null;
    let early = '';
    let hasEnded = false;
    let cutBy: string | null = null;
    let aiStream: AiStream | null = null;
    let forgetExpiry: (() => void) | null = null;
    const guest: AiGuest = {
      userId,
      closeWith: (_, reason) => cut(ERRORS[reason === 'locked' ? 'locked' : 'banned'].message),
    };
    door.enter(guest);
    const close = () => {
      if (http) keepAlive.delete(http);
      forgetExpiry?.();
      door.leave(guest);
      parts.addressLimit.leave(address);
    };
    const sink: Sink = {
      chunk(chunk) {
        const event = `data: ${JSON.stringify(chunk)}\n\n`;
        if (http) http.write(event);
        else early += event;
      },
      end() {
        hasEnded = true;
        if (http) finish();
      },
      isOpen: () => http?.open ?? true,
      isSlow: () => http?.slow ?? false,
    };
    function finish(): void {
      if (!http?.open) return;
      http.write('data: [DONE]\n\n');
      http.end();
      close();
      if (aiStream)
        aiDesk
          .settle(aiStream.user, aiStream.chat, aiStream.messageId)
          .catch((error: Error) => log.warn({ err: error.message }, 'a chat was not settled'));
    }
    /** Ends it before the answer does; at once, or with its head. */
    function cut(errorText: string): void {
      cutBy = errorText;
      if (!http?.open || !aiStream) return;
      aiDesk.leave(aiStream);
      sink.chunk({ type: 'error', errorText });
      http.end();
      close();
    }
    return {
      sink,
      close,
      answer(stream: AiStream): HttpAnswer {
        aiStream = stream;
        return {
          status: 200,
          headers: STREAM_HEADERS,
          stream(opened): StreamPeer {
            http = opened;
            keepAlive.add(opened);
            if (expiresMs !== null)
              forgetExpiry = whenExpired(expiresMs, () => cut('The token has expired.'));
            opened.write(early);
            early = '';
            if (cutBy !== null) cut(cutBy);
            else if (hasEnded) finish();
            return {
              onDrain: () => aiDesk.drain([stream]),
              onClose() {
                close();
                aiDesk.leave(stream);
              },
            };
          },
        };
      },
    };
  }

  /** A body is not read for who has no good token. */
  async function ask(call: HttpCall): Promise<HttpAnswer> {
    const bearer = parts.needsToken ? await identify(call, undefined) : null;
    const parsed = parseAiPost(call.body.toString());
    if ('reason' in parsed) throw new RivuletError('invalid_frame', parsed.reason);
    const { userId } = parsed.post;
    const identity = bearer ?? (await identify(call, userId));
    if ((readClaim(userId) ?? identity.userId) !== identity.userId)
      throw new RivuletError('forbidden', 'the token belongs to another user');
    const read = readQuestion(parsed.post, parts.maxFrameBytes);
    if ('code' in read) throw new RivuletError(read.code, read.message);
    return stream(call, identity, (sink) =>
      aiDesk.ask(identity.userId, read.question, sink, understandsResets(call)),
    );
  }

  async function resume(call: HttpCall, chatId: string): Promise<HttpAnswer> {
    const identity = await identify(call, undefined);
    return stream(call, identity, (sink) =>
      aiDesk.resume(identity.userId, chatId, sink, understandsResets(call)),
    );
  }

  async function stream(
    call: HttpCall,
    identity: Identity,
    open: (sink: Sink) => Promise<AiStream | null>,
  ): Promise<HttpAnswer> {
    const body = openStream(call, identity);
    let opened: AiStream | null = null;
    try {
      opened = await open(body.sink);
      return opened ? body.answer(opened) : { status: 204, headers: {} };
    } finally {
      if (!opened) body.close();
    }
  }

  async function stop(call: HttpCall, chatId: string): Promise<HttpAnswer> {
    const identity = await identify(call, undefined);
    return json(200, { success: true, stopped: await aiDesk.stop(identity.userId, chatId) });
  }

  async function route(call: HttpCall, chatId: string | undefined, what: string | undefined) {
    const allowed = what === 'stream' ? 'GET' : 'POST';
    if (call.method === 'OPTIONS')
      return {
        status: 204,
        headers: {
          'access-control-allow-methods': `${allowed}, OPTIONS`,
          'access-control-allow-headers': 'authorization, content-type, user-agent, x-ai-sdk, x-user-id',
          'access-control-max-age': '600',
        },
      };
    if (call.method !== allowed) {
      const refused = refusal(new RivuletError('invalid_frame', `${call.path} answers ${allowed}`));
      return { ...refused, status: 405, headers: { ...refused.headers, allow: allowed } };
    }
    if (chatId === undefined) return ask(call);
    return what === 'stream' ? resume(call, chatId) : stop(call, chatId);
  }

  /** Why a page may not call, or null. */
  function turnAway(call: HttpCall): HttpAnswer | null {
    const origin = call.headers.get('origin') ?? '';
    if (parts.origins.allows(origin, call.headers.get('host') ?? '')) return null;
    return refusal(new RivuletError('forbidden', parts.origins.explain(origin)));
  }

  return {
    stop: () => clearInterval(timer),
    answer(call) {
      const match = PATH.exec(call.path);
      if (!match) return null;
      return (async () => {
        const turnedAway = turnAway(call);
        if (turnedAway) return turnedAway;
        try {
          return readableBy(call, await route(call, decode(match[1]), match[2]));
        } catch (error) {
          if (error instanceof RivuletError) return readableBy(call, refusal(error));
          if (!isConnectionError(error)) throw error;
          log.warn({ err: describeError(error), call: match[2] ?? 'ask' }, 'call failed: redis is away');
          const away = new RivuletError('internal', STORE_AWAY, { retryAfterMs: STORE_AWAY_MS });
          return readableBy(call, refusal(away));
        }
      })();
    },
    refuse(call, status, error) {
      if (!PATH.test(call.path)) return null;
      return turnAway(call) ?? readableBy(call, { ...refusal(error), status });
    },
  };
}

/** Pages of other origins see nothing of an answer that does not name them. */
function readableBy(call: HttpCall, answer: HttpAnswer): HttpAnswer {
  const origin = call.headers.get('origin') ?? '';
  if (origin === '') return answer;
  return {
    ...answer,
    headers: {
      ...answer.headers,
      'access-control-allow-origin': origin,
      'access-control-expose-headers': 'retry-after',
      vary: 'origin',
    },
  };
}

/**
 * Versions 5 and 6 of the SDK fail on `reset-step`. From 5.0.43 on they say who they are, but Chrome keeps its own user agent:
 * a page there can say `x-ai-sdk: 6`.
 */
function understandsResets(call: HttpCall): boolean {
  const said =
    call.headers.get('x-ai-sdk') ?? /\bai-sdk\/(\d+)/.exec(call.headers.get('user-agent') ?? '')?.[1];
  return said === undefined || said === null || !/^[56](\.|$)/.test(said);
}

function decode(part: string | undefined): string | undefined {
  if (part === undefined) return undefined;
  try {
    const id = decodeURIComponent(part);
    if (id.length <= 512) return id;
  } catch {}
  throw new RivuletError('invalid_frame', 'the chat id in the path cannot be read');
}

function refusal(error: RivuletError): HttpAnswer {
  const { code, message, temporary, retryAfterMs } = error;
  const answer = json(STATUS[code] ?? 503, {
    error: { code, message: message || ERRORS[code].message, temporary, retryAfterMs },
  });
  if (retryAfterMs === undefined) return answer;
  return { ...answer, headers: { ...answer.headers, 'retry-after': String(Math.ceil(retryAfterMs / 1000)) } };
}
