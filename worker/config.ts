import { z } from 'zod';
import {
  commonSettings,
  compactAfterMs,
  drainMs,
  integer,
  parseConfig,
  retentionMs,
  withRedisTls,
} from '../shared/config.ts';
import { modelSettings } from './models/settings.ts';

export const workerSettings = z.object({
  ...commonSettings,
  ...modelSettings,
  WORKER_CONCURRENCY: integer('WORKER_CONCURRENCY', 1, 10_000).default(16),
  LEASE_MS: integer('LEASE_MS', 500, 3_600_000).default(30_000), // 3 missed heartbeats
  MAX_ATTEMPTS: integer('MAX_ATTEMPTS', 1, 100).default(5),
  RETRY_BASE_MS: integer('RETRY_BASE_MS', 1, 600_000).default(500),
  MAX_ANSWER_BYTES: integer('MAX_ANSWER_BYTES', 1_000, 64_000_000).default(4_000_000),
  RETENTION_MS: retentionMs,
  COMPACT_AFTER_MS: compactAfterMs,
  DRAIN_MS: drainMs,
  METRICS_PORT: integer('METRICS_PORT', 0, 65_535).optional(),
  METRICS_HOST: z.string().min(1).default('127.0.0.1'),
  EXIT_WHEN_IDLE_MS: integer('EXIT_WHEN_IDLE_MS', 1, 86_400_000).optional(),
});

export type WorkerConfig = z.infer<typeof workerSettings>;

/** @throws ConfigError that names the variable */
export function readWorkerConfig(env: Record<string, string | undefined>): WorkerConfig {
  return withRedisTls(parseConfig(workerSettings, env));
}
