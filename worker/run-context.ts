import type { Logger } from 'pino';
import type { HandlerContext } from './handler.ts';
import type { LazyAbort } from './lazy-abort.ts';

const ABORT = Symbol('abort');
const LOGGER = Symbol('logger');

/**
 * What a handler is given beside the request. Its signal and its logger are made when they are asked for. To a handler
 * they are like any other property: it may pass on a copy (`{ ...context }`) or set its own. But all contexts share
 * their functions: an object literal with getters gets a hidden class of its own, which holds what they see until the next
 * full collection.
 */
export class RunContext implements HandlerContext {
  declare signal: AbortSignal;
  declare log: Logger;
  readonly attempt: number;
  readonly partial: string;
  readonly trace: string;
  declare private readonly [ABORT]: LazyAbort;
  declare private readonly [LOGGER]: () => Logger;

  constructor(
    abort: LazyAbort,
    logger: () => Logger,
    { attempt, partial, trace }: { attempt: number; partial: string; trace: string },
  ) {
    this.attempt = attempt;
    this.partial = partial;
    this.trace = trace;
    Object.defineProperty(this, ABORT, { value: abort });
    Object.defineProperty(this, LOGGER, { value: logger });
    Object.defineProperties(this, RunContext.lazy);
  }

  private static readonly lazy = {
    signal: {
      enumerable: true,
      configurable: true,
      get(this: RunContext) {
        return this[ABORT].signal;
      },
      set(this: RunContext, value: AbortSignal) {
        replace(this, 'signal', value);
      },
    },
    log: {
      enumerable: true,
      configurable: true,
      get(this: RunContext) {
        return this[LOGGER]();
      },
      set(this: RunContext, value: Logger) {
        replace(this, 'log', value);
      },
    },
  };
}

function replace(context: object, name: string, value: unknown): void {
  Object.defineProperty(context, name, { value, enumerable: true, configurable: true, writable: true });
}
