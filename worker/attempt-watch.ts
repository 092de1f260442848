import type { QueuedRequest } from '../shared/request-queue.ts';
import type { Span, Tracing } from '../shared/tracing.ts';
import type { WorkerMetrics } from './metrics.ts';
import type { Outcome } from './run-request.ts';

/** What metrics and traces learn of one attempt: a handful of calls for each, none for a token. */
export class AttemptWatch {
  private readonly request: QueuedRequest;
  private readonly parts: { metrics: WorkerMetrics; tracing: Tracing | null; worker: string };
  private readonly startedMs = performance.now();
  private span: Span | undefined;

  constructor(request: QueuedRequest, parts: AttemptWatch['parts']) {
    this.request = request;
    this.parts = parts;
  }

  private get seconds(): number {
    return (performance.now() - this.startedMs) / 1000;
  }

  /** The trace context for the model; '' while traces are off. */
  get trace(): string {
    return this.span?.context ?? '';
  }

  /** @param parent the trace context of the request */
  begun(attempt: number, parent: string): void {
    this.span ??= this.parts.tracing?.start('generate', parent, {
      'rivulet.user': this.request.user,
      'rivulet.message_id': this.request.messageId,
      'rivulet.node': this.request.node,
      'rivulet.worker': this.parts.worker,
    });
    this.span?.set({ 'rivulet.attempt': attempt });
  }

  firstText(): void {
    this.parts.metrics.modelFirstToken.observe(this.seconds);
    this.span?.event('first text');
  }

  fenced(): void {
    this.parts.metrics.fenced.inc();
    this.span?.event('fenced');
  }

  mended(): void {
    this.parts.metrics.mended.inc();
    this.span?.event('log compared');
  }

  deadLetter(): void {
    this.parts.metrics.deadLetters.inc();
  }

  ended(outcome: Outcome | 'left'): void {
    const { metrics } = this.parts;
    if (outcome !== 'left') metrics.attempts.inc({ outcome });
    metrics.attemptTime.observe(this.seconds);
    this.span?.set({ 'rivulet.outcome': outcome });
    this.span?.end(outcome === 'failed' || outcome === 'retry' || outcome === 'left' ? outcome : undefined);
  }
}
