import { writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { setTimeout as delay } from 'node:timers/promises';
import { z } from 'zod';
import { commonSettings, drainMs, integer, parseConfig, withRedisTls } from '../shared/config.ts';
import { createKeys } from '../shared/keys.ts';
import { type Running, within } from '../shared/lifecycle.ts';
import type { Logger } from '../shared/logger.ts';
import { createNodeRegistry } from '../shared/node-registry.ts';
import { createRedis, describeError } from '../shared/redis.ts';
import { readDemand } from './read-demand.ts';
import { createScaler } from './scaling.ts';
import { drawScaling, type ScalingSample, thin } from './scaling-plot.ts';
import { createWorkerPool } from './worker-pool.ts';

/**
 * The loop of `npm run autoscaler`: look at the queues, decide, adjust. Gateways know nothing of it; several
 * autoscalers, on one machine or more, share the work, since each leaves out what workers of others run.
 */

export const autoscalerSettings = z
  .object({
    ...commonSettings,
    WORKERS_MIN: integer('WORKERS_MIN', 0, 1_000).default(0),
    WORKERS_MAX: integer('WORKERS_MAX', 1, 1_000).default(4),
    WORKER_CONCURRENCY: integer('WORKER_CONCURRENCY', 1, 10_000).default(16), // as the workers have it, like the next two
    LEASE_MS: integer('LEASE_MS', 500, 3_600_000).default(30_000),
    DRAIN_MS: drainMs,
    SCALE_POLL_MS: integer('SCALE_POLL_MS', 50, 60_000).default(200),
    SCALE_DOWN_AFTER_MS: integer('SCALE_DOWN_AFTER_MS', 0, 86_400_000).default(30_000),
  })
  .refine((config) => config.WORKERS_MIN <= config.WORKERS_MAX, {
    message: 'WORKERS_MIN is above WORKERS_MAX',
  });

export type AutoscalerConfig = z.infer<typeof autoscalerSettings>;

/** @throws ConfigError that names the variable */
export function readAutoscalerConfig(env: Record<string, string | undefined>): AutoscalerConfig {
  return withRedisTls(parseConfig(autoscalerSettings, env));
}

const PLOT_EVERY_MS = 2_000;
const CLOSE_MS = 3_000; // as gateways and workers have it
const SAMPLES_KEPT = 4_000; // then every second one goes: a plot has about 900 columns

export async function startAutoscaler(
  config: AutoscalerConfig,
  { workerEnv, plotFile, log }: { workerEnv: NodeJS.ProcessEnv; plotFile: string | null; log: Logger },
): Promise<Running> {
  const keys = createKeys(config.KEY_PREFIX);
  const redis = createRedis({ url: config.REDIS_URL, name: `autoscaler:${hostname()}`, log });
  await redis.connected();
  const registry = createNodeRegistry({ redis, keys });
  const pool = createWorkerPool({
    env: workerEnv,
    leaseMs: config.LEASE_MS,
    drainMs: config.DRAIN_MS,
    log,
  });
  const scale = createScaler({
    min: config.WORKERS_MIN,
    max: config.WORKERS_MAX,
    concurrency: config.WORKER_CONCURRENCY,
    coolDownMs: config.SCALE_DOWN_AFTER_MS,
  });
  const stopping = new AbortController();
  let samples: ScalingSample[] = [];
  let target = -1;
  let announced = false;
  let failing = '';

  async function look(): Promise<void> {
    const demand = await readDemand(redis, keys, pool.has, plotFile !== null);
    const now = performance.now();
    const wanted = scale(now, demand.needed);
    if (wanted !== target) {
      log.info({ from: target < 0 ? pool.size : target, to: wanted, needed: demand.needed }, 'target');
      target = wanted;
    }
    const isCurrent = pool.misses(demand.ours) && (await registry.takesBeats());
    pool.adjust(target, demand.ours, isCurrent);
    if (!announced && pool.pids.filter((pid) => demand.ours.has(pid)).length >= config.WORKERS_MIN) {
      announced = true;
      log.info({ workers: pool.pids, min: config.WORKERS_MIN, max: config.WORKERS_MAX }, 'scaling');
    }
    if (plotFile === null) return;
    const running = [...demand.ours.values()].reduce((sum, count) => sum + count, 0);
    samples.push({
      atMs: now,
      appended: demand.appended,
      open: demand.open + demand.dueRetries,
      running,
      target,
      workers: pool.size + pool.retiring,
    });
    if (samples.length > SAMPLES_KEPT) samples = thin(samples);
  }

  async function every(ms: number, step: () => Promise<void>): Promise<void> {
    while (!stopping.signal.aborted) {
      try {
        await step();
        failing = '';
      } catch (error) {
        // Without a look nothing is changed: better the wrong number of workers than none.
        const message = describeError(error);
        if (message !== failing) log.warn({ err: message }, 'the queues cannot be read; the workers stay');
        failing = message;
      }
      await delay(ms, undefined, { signal: stopping.signal }).catch(() => {});
    }
  }

  async function plot(): Promise<void> {
    if (plotFile !== null && samples.length > 1) await writeFile(plotFile, drawScaling(samples));
  }

  if (plotFile !== null) await writeFile(plotFile, drawScaling([])); // a wrong path shows now, not at the end
  const loops = Promise.all([
    every(config.SCALE_POLL_MS, look),
    ...(plotFile === null ? [] : [every(PLOT_EVERY_MS, plot)]),
  ]);

  let stopped: Promise<void> | undefined;
  async function stop(): Promise<void> {
    stopping.abort();
    await pool.stop(); // first: a look that is under way may wait for a Redis that is away
    await within(CLOSE_MS, loops);
    await plot();
    await redis.close();
  }
  return {
    ended: pool.failed,
    stop: () => {
      stopped ??= stop();
      return stopped;
    },
  };
}
