import type { Logger } from 'pino';
import type { ChatPayload, FinishReason, Usage } from '../shared/protocol.ts';

/**
 * The interface between Rivulet and a model. A handler is an async generator that yields text and may return how
 * it ended:
 *
 *     export default async function* (request, { signal }) {
 *       yield 'Hello ';
 *       yield request.userId;
 *       return { finishReason: 'stop' };
 *     }
 *
 * It MUST stop soon after `signal` aborts (cancel, takeover, shutdown). It MUST NOT keep state between calls:
 * the next attempt may run on another machine. To fail, throw a `RivuletError`: `temporary` says whether a
 * retry is worth it. Any other error counts as temporary.
 */
export type Handler = (
  request: HandlerRequest,
  context: HandlerContext,
) => AsyncGenerator<string, HandlerResult | undefined | void, undefined>;

export interface HandlerRequest extends ChatPayload {
  userId: string;
  messageId: string;
}

export interface HandlerContext {
  /** Aborts on cancel, takeover and shutdown. Pass it to every request you make. */
  signal: AbortSignal;
  /** 1 for the first attempt. */
  attempt: number;
  /** The text of the last attempt that said anything, empty on the first. Yield it again to continue from it. */
  partial: string;
  /** A W3C `traceparent` to send along, while traces are on. */
  trace?: string;
  log: Logger;
}

export interface HandlerResult {
  finishReason?: FinishReason;
  usage?: Usage;
}
