import { Counter, createMetricsRegistry, Gauge, Histogram } from '../shared/metrics.ts';
import type { Outcome } from './run-request.ts';

/**
 * What a worker counts. Served only with METRICS_PORT. Nothing here is called for each token: what rises with
 * tokens is a plain number somewhere else, read when somebody scrapes.
 */
export function createWorkerMetrics(facts: {
  running: () => number;
  concurrency: number;
  tokens: () => number;
}) {
  const registry = createMetricsRegistry();
  const registers = [registry];
  new Gauge({
    name: 'rivulet_worker_running',
    help: 'Requests that this worker runs.',
    registers,
    collect() {
      this.set(facts.running());
    },
  });
  new Gauge({
    name: 'rivulet_worker_concurrency',
    help: 'Requests that this worker may run at a time.',
    registers,
  }).set(facts.concurrency);
  new Counter({
    name: 'rivulet_tokens_total',
    help: 'Token frames written to logs; a frame holds what the model gave since the one before.',
    registers,
    collect() {
      this.reset();
      this.inc(facts.tokens());
    },
  });
  const attempts = new Counter({
    name: 'rivulet_attempts_total',
    help: 'Attempts that ended, by outcome.',
    labelNames: ['outcome'] as const,
    registers,
  });
  const outcomes: Outcome[] = ['done', 'failed', 'cancelled', 'retry', 'fenced', 'released', 'skipped'];
  for (const outcome of outcomes) attempts.inc({ outcome }, 0); // rates need a zero to start from
  return {
    registry,
    attempts,
    takeovers: new Counter({
      name: 'rivulet_takeovers_total',
      help: 'Requests taken over from workers that fell silent.',
      registers,
    }),
    fenced: new Counter({
      name: 'rivulet_fenced_appends_total',
      help: 'Attempts stopped because the log refused them: taken over or cancelled.',
      registers,
    }),
    mended: new Counter({
      name: 'rivulet_logs_compared_total',
      help: 'Times a log was compared with what had been written, and completed.',
      registers,
    }),
    deadLetters: new Counter({
      name: 'rivulet_dead_letters_total',
      help: 'Requests that used up their attempts.',
      registers,
    }),
    modelFirstToken: new Histogram({
      name: 'rivulet_model_first_token_seconds',
      help: 'From the begin of an attempt to the first text of the model.',
      buckets: [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120],
      registers,
    }),
    attemptTime: new Histogram({
      name: 'rivulet_attempt_seconds',
      help: 'From the begin of an attempt to its end, however it ended.',
      buckets: [0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600],
      registers,
    }),
    redis: new Histogram({
      name: 'rivulet_redis_seconds',
      help: 'Round trip of a PING to Redis, twice a second.',
      buckets: [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 3],
      registers,
    }),
  };
}

export type WorkerMetrics = ReturnType<typeof createWorkerMetrics>;
