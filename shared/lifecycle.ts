import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { ConfigError } from './config.ts';

/**
 * Start and end of a process. The first SIGTERM or SIGINT stops in order, a second one (not the same one again, as npm
 * passes it on) exits 1 at once. SIGUSR2 retires a process that can: it leaves by itself once its work is done, and still
 * obeys SIGTERM meanwhile. This file owns signals and exit codes: 0 after a stop, 1 after a failure, 2 for wrong settings.
 */
export interface Running {
  /** Idempotent and ordered: refuse, drain, flush, close. */
  stop(): Promise<void>;
  /** Takes nothing new and settles when what runs has ended, however long that takes. */
  retire?(): Promise<void>;
  /** Settles when the process has nothing left to do on its own (serverless mode) or cannot go on. */
  ended?: Promise<void>;
}

/** What reaches a whole process group reaches us twice under npm, which passes it on: Ctrl-C, and some supervisors' SIGTERM. */
const SAME_SIGNAL_MS = { SIGINT: 500, SIGTERM: 50 };

/** A step of a stop, or so long at the most: what it asks Redis may never be answered (a Cluster that is away). */
export async function within(ms: number, step: unknown): Promise<void> {
  await Promise.race([step, delay(ms, undefined, { ref: false })]);
}

export async function runProcess(start: () => Promise<Running>, log: Logger): Promise<void> {
  let running: Running | undefined;
  let stopping: { reason: string; sinceMs: number } | null = null;
  const stop = (reason: string, sameMs = 0) => {
    if (stopping) {
      if (reason === stopping.reason && performance.now() - stopping.sinceMs < sameMs) return;
      log.warn({ reason }, 'second signal: leaving at once');
      process.exit(1);
    }
    stopping = { reason, sinceMs: performance.now() };
    log.info({ reason }, 'stopping');
    if (!running) process.exit(0);
    running.stop().then(
      () => {
        log.info('stopped');
        process.exit(0);
      },
      (error) => {
        log.error({ err: error }, 'stopping failed');
        process.exit(1);
      },
    );
  };
  process.on('SIGTERM', () => stop('SIGTERM', SAME_SIGNAL_MS.SIGTERM));
  process.on('SIGINT', () => stop('SIGINT', SAME_SIGNAL_MS.SIGINT));
  process.on('SIGUSR2', () => {
    if (!running?.retire || stopping) return;
    log.info('retiring');
    running.retire().then(
      () => {
        if (!stopping) stop('retired');
      },
      (error) => log.error({ err: error }, 'retiring failed'),
    );
  });
  process.on('unhandledRejection', (error) => {
    // A bug by definition; leaving lets leases run out and others take over, instead of going on half-alive.
    log.fatal({ err: error }, 'unhandled rejection');
    process.exit(1);
  });
  try {
    running = await start();
  } catch (error) {
    failToStart(error, log);
  }
  running?.ended?.then(
    () => stop('nothing to do'),
    (error) => {
      log.fatal({ err: error }, 'cannot go on');
      process.exit(1);
    },
  );
}

/** Says why a process cannot start, in one line, and exits: 2 for settings, else 1. */
function failToStart(error: unknown, log: Logger): never {
  if (error instanceof ConfigError) {
    process.stderr.write(`${error.message}\n`);
    process.exit(2);
  }
  const message = error instanceof Error ? error.message : String(error);
  log.fatal({ err: error }, `cannot start: ${message}`);
  process.stderr.write(`Cannot start: ${message}\n`);
  process.exit(1);
}
