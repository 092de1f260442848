import type { Logger } from 'pino';
import type { HandlerContext } from './handler.ts';
import type { LazyAbort } from './lazy-abort.ts';

/**
 * What a handler is given beside the request. Its signal and its logger are made when they are asked for. They are
 * properties of its own, so that a handler may pass on a copy (`{ ...context }`), but share their functions: an object
 * literal with getters gets a hidden class of its own, which holds what they see until the next full collection.
 */
export class RunContext implements HandlerContext {
  declare readonly signal: AbortSignal;
  declare readonly log: Logger;
  readonly attempt: number;
  readonly partial: string;
  readonly trace: string;
  readonly #abort: LazyAbort;
  readonly #logger: () => Logger;

  constructor(
    abort: LazyAbort,
    logger: () => Logger,
    { attempt, partial, trace }: { attempt: number; partial: string; trace: string },
  ) {
    this.attempt = attempt;
    this.partial = partial;
    this.trace = trace;
    this.#abort = abort;
    this.#logger = logger;
    Object.defineProperties(this, RunContext.#lazy);
  }

  static readonly #lazy = {
    signal: {
      enumerable: true,
      get(this: RunContext) {
        return this.#abort.signal;
      },
    },
    log: {
      enumerable: true,
      get(this: RunContext) {
        return this.#logger();
      },
    },
  };
}
