import type { QueuedRequest } from '../shared/request-queue.ts';
import type { Span, Tracing } from '../shared/tracing.ts';
import type { WorkerMetrics } from './metrics.ts';
import type { Outcome } from './run-request.ts';

/** What metrics and traces learn of one attempt: a handful of calls for each, none for a token. */
export interface AttemptWatch {
  /** The trace context for the model; '' while traces are off. */
  readonly trace: string;
  /** @param parent the trace context of the request */
  begun(attempt: number, parent: string): void;
  firstText(): void;
  fenced(): void;
  mended(): void;
  deadLetter(): void;
  ended(outcome: Outcome | 'left'): void;
}

export function watchAttempt(
  request: QueuedRequest,
  { metrics, tracing, worker }: { metrics: WorkerMetrics; tracing: Tracing | null; worker: string },
): AttemptWatch {
  const started = performance.now();
  const seconds = () => (performance.now() - started) / 1000;
  let span: Span | undefined;
  return {
    get trace() {
      return span?.context ?? '';
    },
    begun(attempt, parent) {
      span ??= tracing?.start('generate', parent, {
        'rivulet.user': request.user,
        'rivulet.message_id': request.messageId,
        'rivulet.node': request.node,
        'rivulet.worker': worker,
      });
      span?.set({ 'rivulet.attempt': attempt });
    },
    firstText() {
      metrics.modelFirstToken.observe(seconds());
      span?.event('first text');
    },
    fenced() {
      metrics.fenced.inc();
      span?.event('fenced');
    },
    mended() {
      metrics.mended.inc();
      span?.event('log compared');
    },
    deadLetter() {
      metrics.deadLetters.inc();
    },
    ended(outcome) {
      if (outcome !== 'left') metrics.attempts.inc({ outcome });
      metrics.attemptTime.observe(seconds());
      span?.set({ 'rivulet.outcome': outcome });
      span?.end(outcome === 'failed' || outcome === 'retry' || outcome === 'left' ? outcome : undefined);
    },
  };
}
