import { inspect } from 'node:util';
import type { Logger } from 'pino';
import { backoffMs } from '../shared/backoff.ts';
import { RivuletError } from '../shared/errors.ts';
import type { Attempt, Begun, GenerationStore, Terminal } from '../shared/generation-store.ts';
import type { NodeRegistry } from '../shared/node-registry.ts';
import { type ChatPayload, isOpenStatus, type Usage } from '../shared/protocol.ts';
import { PATIENT, retrying } from '../shared/redis.ts';
import type { QueuedRequest, RequestQueue } from '../shared/request-queue.ts';
import { AnswerWriter } from './answer-writer.ts';
import type { Appender } from './appender.ts';
import type { AttemptWatch } from './attempt-watch.ts';
import type { WorkerConfig } from './config.ts';
import type { FinishedLogs } from './finished-logs.ts';
import type { Handler, HandlerResult } from './handler.ts';
import { LazyAbort } from './lazy-abort.ts';
import { RunContext } from './run-context.ts';

/**
 * One request, from begin to its end: done, failed, handed to a retry, or lost to another worker. Never throws;
 * what cannot be settled here is left pending, and claimed by somebody after the lease.
 *
 * A request that comes for the first time, with its payload, is all but certainly a first attempt: its model is called
 * at once, a round trip sooner, and what Redis has to say to that comes with the answer to the first write. Should it not
 * be one (it was cancelled meanwhile, or is in a stream twice), the model is stopped and `begin` decides. So it does
 * where a failover forgot an attempt and another worker opened one of the same number.
 */

const MAX_RETRY_MS = 600_000; // the most that a Retry-After is obeyed
const MAX_BACKOFF_MS = 60_000;
const PARTIAL_ATTEMPTS = 5; // that are asked for a partial answer, the last one first
const WHOLE_UNITS = 65_536; // of one piece: a longer one is cut where the answer reaches its bound
const SHORT = { depth: 1, breakLength: Number.POSITIVE_INFINITY };
const MAX_REASON = 500; // characters of why it failed
const TURN_TOKENS = 256; // a model that never waits gives the event loop a turn after so many tokens

let runs = 0; // of this process

export interface RequestParts {
  worker: string;
  config: WorkerConfig;
  handler: Handler;
  store: GenerationStore;
  queue: RequestQueue;
  registry: NodeRegistry;
  appender: Appender;
  log: Logger;
  finishedLogs: FinishedLogs;
  /** Metrics and traces of one attempt. */
  watch(request: QueuedRequest): AttemptWatch;
  /** For numbers and views. */
  onOutcome(outcome: Outcome): void;
}

export type Outcome = 'done' | 'failed' | 'cancelled' | 'retry' | 'fenced' | 'released' | 'skipped';

/** A request that is being worked on. */
export interface RunningRequest {
  readonly request: QueuedRequest;
  /** For people who look. */
  readonly since: number;
  /** By the clock that never jumps. */
  readonly startedMs: number;
  writer: AnswerWriter | null;
  attempt: number;
  /** The lease was lost: stop, write nothing. */
  lose(): void;
  /** This worker is leaving: stop, and hand the request back. */
  release(): void;
  /** GENERATION_TIMEOUT_MS is over. */
  expire(): void;
  readonly ended: Promise<void>;
}

class Released extends Error {}

/**
 * An attempt that is not what it seemed, of which `begin` decides. stale: no first attempt, and nothing was written.
 * twin: a failover forgot it, and another worker opened one of the same number; clients may have been shown ids of both,
 * and only an attempt above both tells them so.
 */
type Misjudged = 'stale' | 'twin';

export function runRequest(request: QueuedRequest, parts: RequestParts): RunningRequest {
  let abort = new LazyAbort();
  const watch = parts.watch(request);
  let timedOut = false;
  let leaving = false;
  let child: Logger | undefined;
  /** Made when it is first needed: most requests say nothing at the usual level. */
  const logger = () => {
    child ??= parts.log.child({ user: request.user, messageId: request.messageId });
    return child;
  };
  const running: RunningRequest = {
    request,
    since: Date.now(),
    startedMs: performance.now(),
    writer: null,
    attempt: 0,
    lose() {
      running.writer?.setFenced();
      abort.abort(new Error('the attempt was replaced'));
    },
    release() {
      leaving = true;
      abort.abort(new Released('the worker is leaving'));
    },
    expire() {
      timedOut = true; // nobody waits that long twice: no retry
      abort.abort(
        new RivuletError(
          'model_timeout',
          `No complete answer within ${parts.config.GENERATION_TIMEOUT_MS} ms.`,
        ),
      );
    },
    ended: Promise.resolve(),
  };
  const ended = work().then(
    (outcome) => {
      watch.ended(outcome);
      parts.onOutcome(outcome);
    },
    (error) => {
      watch.ended('left');
      logger().error({ err: error }, 'request left to the lease');
    },
  );
  (running as { ended: Promise<void> }).ended = ended;
  return running;

  async function work(): Promise<Outcome> {
    const { queue, worker } = parts;
    const isFirst = request.payload !== '' && request.deliveries === 1;
    for (
      let outcome = isFirst ? await expect() : await begin();
      ;
      outcome = await begin(outcome === 'twin')
    ) {
      if (outcome === 'stale') {
        // Somebody may have claimed it while this process stood still: then it is theirs.
        const lost = await retrying(() => queue.extend(request.node, worker, [request.entry]), PATIENT);
        if (lost.length > 0) return 'skipped';
      } else if (outcome === 'twin') await queue.takeOver(request, worker);
      else return outcome;
      logger().info({ outcome }, 'not the attempt that it seemed; asking what it is');
      abort = new LazyAbort();
      if (leaving) running.release();
    }
  }

  /** Runs it as the first attempt that it is likely to be. */
  async function expect(): Promise<Outcome | Misjudged> {
    const { payload, trace } = request;
    return run({ attempt: 1, tries: 1, payload, trace, owner: nextOwner() }, (writer) =>
      writer.expect(request.node),
    );
  }

  /** A name for one run: what the same worker once began, and a failover forgot, is somebody else's. */
  function nextOwner(): string {
    return `${parts.worker}/${++runs}`;
  }

  /** Asks Redis for the next attempt, and runs it. @param above whoever is working on it */
  async function begin(above = false): Promise<Outcome | Misjudged> {
    const { store, queue, worker, config } = parts;
    const owner = nextOwner();
    const begun = await store.begin({
      user: request.user,
      messageId: request.messageId,
      node: request.node,
      entry: request.entry,
      owner,
      maxTries: config.MAX_ATTEMPTS,
      leaseMs: config.LEASE_MS,
      above,
    });
    if (begun.state === 'duplicate') {
      // Not acknowledged: should the other entry be lost, with its worker or by a failover, this one still carries it.
      await queue.retryLater(request, worker, begun.leaseMs);
      return 'skipped';
    }
    if (begun.state !== 'run' && begun.state !== 'exhausted') {
      if (begun.state === 'missing') logger().warn('request without a record: expired or lost; dropped');
      await queue.ack(request, worker);
      return 'skipped';
    }
    return run({ ...begun, owner }, (writer) => writer.started(begun.routes, begun.before));
  }

  /** One attempt, from its first write to its end. */
  async function run(
    begun: Pick<Extract<Begun, { attempt: number }>, 'attempt' | 'tries' | 'payload' | 'trace'> & {
      owner: string;
      state?: 'run' | 'exhausted';
    },
    open: (writer: AnswerWriter) => void,
  ): Promise<Outcome | Misjudged> {
    const { store, queue, worker, config } = parts;
    const { payload, tries } = begun; // as it came: a handler may change what it is given
    const attempt: Attempt = {
      user: request.user,
      messageId: request.messageId,
      attempt: begun.attempt,
      owner: begun.owner,
      node: request.node,
      entry: request.entry,
    };
    running.attempt = begun.attempt;
    watch.begun(begun.attempt, begun.trace);
    const writer = new AnswerWriter(attempt, {
      store,
      appender: parts.appender,
      logger,
      payload,
      tries,
      trace: begun.trace,
      onFenced() {
        if (!writer.stale) watch.fenced();
        abort.abort(new Error('the attempt was replaced'));
      },
      onMended(again) {
        watch.mended();
        if (again) void carryAgain();
      },
      isLeaving: () => leaving,
    });
    running.writer = writer;
    open(writer);
    if (begun.state === 'exhausted') {
      return fail(
        new RivuletError('attempts_exhausted', `Every one of ${tries - 1} attempts ended without an answer.`),
        tries - 1,
      );
    }

    let result: HandlerResult | undefined;
    try {
      result = await generate(writer, begun.attempt, JSON.parse(payload) as ChatPayload);
    } catch (error) {
      if (writer.fenced) return lost();
      if (abort.reason instanceof Released) return release();
      const failure = toFailure(error);
      if (!failure.temporary || timedOut) return fail(failure, tries);
      if (tries < config.MAX_ATTEMPTS) return retry(failure);
      return fail(
        new RivuletError('attempts_exhausted', `${tries} attempts failed; the last one: ${failure.message}`, {
          cause: failure,
        }),
        tries,
      );
    }
    const finished = await writer.finish({
      type: 'done',
      finishReason: result?.finishReason ?? 'stop',
      length: writer.length,
      ...(result?.usage ? { usage: result.usage } : {}),
    });
    if (!finished) return lost();
    await settle(finished.acknowledged);
    if (parts.log.isLevelEnabled('debug'))
      logger().debug(
        {
          attempt: begun.attempt,
          ms: Math.round(performance.now() - running.startedMs),
          units: writer.length,
        },
        'answered',
      );
    return 'done';

    /** A record that was made again needs a request that carries it, should this worker die. */
    async function carryAgain(): Promise<void> {
      try {
        const lost = await retrying(() => queue.extend(request.node, worker, [request.entry]), PATIENT);
        if (lost.length === 0) return;
        await queue.retryLater(request, worker, config.LEASE_MS);
        await retrying(() => parts.registry.adopt(request.node), PATIENT); // its gateway may have left before
      } catch (error) {
        logger().warn({ err: (error as Error).message }, 'no request may carry this answer');
      }
    }

    async function settle(acknowledged: boolean): Promise<void> {
      if (writer.hasLog) parts.finishedLogs.add(request.user, request.messageId);
      if (!acknowledged) await queue.ack(request, worker);
    }

    async function retry(failure: RivuletError): Promise<Outcome | Misjudged> {
      if (!(await writer.release(true))) return lost();
      const backoff = backoffMs(tries, config.RETRY_BASE_MS, MAX_BACKOFF_MS);
      const asked = Number.isFinite(failure.retryAfterMs) ? failure.retryAfterMs! : 0; // a handler may have computed NaN
      const delayMs = Math.min(MAX_RETRY_MS, Math.max(backoff, asked));
      await queue.retryLater(request, worker, delayMs);
      logger().warn(
        { attempt: attempt.attempt, code: failure.code, err: describeFailure(failure), delayMs },
        'attempt failed; retry',
      );
      return 'retry';
    }

    async function fail(failure: RivuletError, attempts: number): Promise<Outcome | Misjudged> {
      const terminal: Terminal = {
        type: 'failed',
        code: failure.code,
        message: failure.message.slice(0, MAX_REASON),
        temporary: failure.temporary,
      };
      if (failure.code === 'attempts_exhausted') {
        if (!(await writer.settled())) return lost();
        // Before the end: a crash between the two leaves a second letter, not none.
        const written = await queue.deadLetter(request, worker, {
          attempts,
          lastAttempt: attempt.attempt,
          code: failure.code,
          reason: describeFailure(failure),
          payload,
        });
        if (!written) return lost(); // whoever has the request now writes both
        watch.deadLetter();
      }
      const finished = await writer.finish(terminal);
      if (!finished) return lost();
      logger().error(
        { attempt: attempt.attempt, code: failure.code, err: describeFailure(failure) },
        'failed for good',
      );
      await settle(finished.acknowledged);
      return 'failed';
    }

    async function release(): Promise<Outcome | Misjudged> {
      if (!(await writer.release(false))) return lost();
      await queue.retryLater(request, worker, 0);
      logger().info({ attempt: attempt.attempt }, 'handed back');
      return 'released';
    }

    async function lost(): Promise<Outcome | Misjudged> {
      if (writer.stale) return 'stale';
      const record = await retrying(() => store.inspect(request), PATIENT);
      if (
        record?.status === 'running' &&
        record.attempt === attempt.attempt &&
        record.owner !== attempt.owner
      )
        return writer.mayBeShown ? 'twin' : 'stale';
      // Ended by a cancel: the entry is still ours to remove. Taken over: the script finds it is not.
      const ended = !record || !isOpenStatus(record.status);
      if (ended) await queue.ack(request, worker);
      const isForgotten = !ended && record.attempt <= attempt.attempt;
      logger().info(
        { attempt: attempt.attempt, status: record?.status ?? 'gone', owner: record?.owner },
        isForgotten ? 'attempt given up: it could not be compared with Redis' : 'attempt replaced',
      );
      return record?.status === 'cancelled' ? 'cancelled' : 'fenced';
    }
  }

  /** Runs the handler into the writer. Throws what the handler throws, or a model_timeout. */
  async function generate(
    writer: AnswerWriter,
    attempt: number,
    payload: ChatPayload,
  ): Promise<HandlerResult | undefined> {
    const { config, store } = parts;
    let partial = ''; // of the last attempt that said anything
    for (
      let before = attempt - 1;
      before > Math.max(0, attempt - 1 - PARTIAL_ATTEMPTS) && partial === '';
      before--
    )
      partial = await store.readText(request.user, request.messageId, before).catch(() => ''); // it can do without
    const generator = parts.handler(
      { ...payload, userId: request.user, messageId: request.messageId },
      new RunContext(abort, logger, { attempt, partial, trace: watch.trace }),
    );
    if (typeof generator?.next !== 'function') {
      Promise.resolve(generator).catch(() => {}); // an async function: nobody else waits for it
      throw new RivuletError(
        'model_error',
        'The handler is no async generator: it returned something else.',
        {
          temporary: false,
        },
      );
    }
    let left = false;
    let complete = false;
    /** The loop over the model's text: never waits for Redis, allocates nothing for a token. */
    async function pump(): Promise<HandlerResult | undefined> {
      for (let inTurn = 0; ; ) {
        const next = await generator.next();
        if (left) return undefined;
        if (next.done) {
          complete = true;
          return readResult(next.value);
        }
        if (typeof next.value !== 'string')
          throw new RivuletError('model_error', `The handler yielded ${typeof next.value} instead of text.`);
        if (writer.length === 0 && next.value !== '') watch.firstText();
        writer.push(
          next.value.length > WHOLE_UNITS ? writer.fitting(next.value, config.MAX_ANSWER_BYTES) : next.value,
        );
        if (writer.exceeds(config.MAX_ANSWER_BYTES)) return { finishReason: 'length' };
        if (++inTurn >= TURN_TOKENS) {
          inTurn = 0;
          await new Promise(setImmediate);
        }
      }
    }
    try {
      return await new Promise<HandlerResult | undefined>((resolve, reject) => {
        // A handler that does not watch its signal must not hold a place: it is left behind.
        const leave = () => {
          left = true;
          reject(abort.reason);
        };
        if (abort.aborted) leave();
        else abort.onAbort = leave;
        pump().then(resolve, reject);
      });
    } finally {
      left = true;
      if (!complete) {
        if (!abort.aborted) abort.abort(new Error('ended'));
        // A plain iterator may have no `return`, and one that is not async returns no promise.
        void Promise.resolve()
          .then(() => generator.return?.(undefined))
          .catch(() => {});
      }
    }
  }
}

/**
 * Any error as one with a code. Errors of user handlers without one count as temporary. What they say is for operators:
 * it may name hosts and secrets, and a user must not read that.
 */
function toFailure(error: unknown): RivuletError {
  if (error instanceof RivuletError) return error;
  return new RivuletError('model_error', 'The model failed.', { temporary: true, cause: error });
}

/** The whole reason, for logs and dead letters. */
function describeFailure({ message, cause }: RivuletError): string {
  const inner = cause instanceof RivuletError ? cause.cause : cause;
  return (inner === undefined ? message : `${message} ${describeThrown(inner)}`).slice(0, MAX_REASON);
}

/** Anything may be thrown. Never throws itself: an answer that cannot be failed would hang. */
function describeThrown(thrown: unknown): string {
  try {
    if (!(thrown instanceof Error)) return typeof thrown === 'string' ? thrown : inspect(thrown, SHORT);
    const { message, cause } = thrown as Error & { cause?: { message?: unknown; code?: unknown } };
    const reason = cause?.message || cause?.code; // `fetch failed` says nothing without it
    return reason ? `${message}: ${reason}` : `${message}`;
  } catch {
    return 'What was thrown cannot be described.';
  }
}

/** What a handler returned, without what is not of its type. */
function readResult(value: unknown): HandlerResult {
  if (typeof value !== 'object' || value === null) return {};
  const { finishReason, usage } = value as { [field in keyof HandlerResult]: unknown };
  const { promptTokens, completionTokens } = (usage ?? {}) as Partial<Usage>;
  const isCount = (count: unknown) => Number.isSafeInteger(count) && (count as number) >= 0;
  return {
    ...(typeof finishReason === 'string' && finishReason !== '' ? { finishReason } : {}),
    ...(isCount(promptTokens) && isCount(completionTokens)
      ? { usage: { promptTokens: promptTokens!, completionTokens: completionTokens! } }
      : {}),
  };
}
