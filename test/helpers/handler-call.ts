import { getEventListeners } from 'node:events';
import { createLogger } from '../../shared/logger.ts';
import type { Handler, HandlerContext, HandlerRequest, HandlerResult } from '../../worker/handler.ts';

/** A handler called by a test, without a worker around it. */
export interface HandlerCall {
  /** The next piece of text; throws when the answer is over. */
  next(): Promise<string>;
  /** Reads to the end. Rejects with the handler's error. */
  rest(): Promise<{ pieces: string[]; text: string; result: HandlerResult | undefined }>;
  /** Waits for the error that ends the call, and gives it with the pieces before it. */
  failure(): Promise<{ pieces: string[]; error: unknown }>;
  abort(reason?: unknown): void;
  /** What a worker does when it stops reading. */
  leave(): Promise<void>;
  /** Listeners that the handler left on the signal. */
  listeners(): number;
}

export function callHandler(
  handler: Handler,
  request: Partial<HandlerRequest>,
  context: Partial<Omit<HandlerContext, 'signal'>> = {},
): HandlerCall {
  const controller = new AbortController();
  const answer = handler(
    { userId: '20001', messageId: 'm1', contents: 'hello', ...request },
    {
      attempt: 1,
      partial: '',
      log: createLogger('silent', {}),
      ...context,
      signal: controller.signal,
    },
  );
  const rest = async (pieces: string[]) => {
    for (;;) {
      const { done, value } = await answer.next();
      if (done) return { pieces, text: pieces.join(''), result: value ?? undefined };
      pieces.push(value);
    }
  };
  return {
    async next() {
      const { done, value } = await answer.next();
      if (done) throw new Error('the answer is over');
      return value;
    },
    rest: () => rest([]),
    async failure() {
      const pieces: string[] = [];
      const error = await rest(pieces).then(
        () => {
          throw new Error(`the answer ended well: ${pieces.join('')}`);
        },
        (reason: unknown) => reason,
      );
      return { pieces, error };
    },
    abort: (reason) => controller.abort(reason),
    async leave() {
      await answer.return(undefined);
    },
    listeners: () => getEventListeners(controller.signal, 'abort').length,
  };
}
