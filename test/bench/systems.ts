import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { startRedisServer } from '../../infra/redis-server.ts';
import { freePort } from '../helpers/free-port.ts';
import type { LoadPlan } from './load-plan.ts';
import { type BenchProcess, startProcess } from './processes.ts';

/** The systems under test behind one interface. Each start has a Redis of its own: AOF, synced every second. */

export type SystemName =
  | 'rivulet'
  | 'control'
  | 'bullmq-socketio'
  | 'bullmq-pubsub'
  | 'bullmq-pubsub-batched'
  | 'locked-list';

export interface StartOptions {
  /** Gateways, each with streams or channels of its own. */
  gateways: number;
  workers: number;
  /** Answers that may run at the same time, over all workers. */
  concurrency: number;
  /** Whether tokens of one answer may be merged (by the rule of merge-tokens.ts). Rivulet always merges. */
  merge: boolean;
  /** For sessions that survive a reconnect. */
  recovery?: boolean;
  /** Writes CPU profiles of gateways and workers there. */
  profileDir?: string | undefined;
  /** More settings for Rivulet's processes. */
  env?: Record<string, string>;
}

export interface RunningSystem {
  readonly name: SystemName;
  readonly redisUrl: string;
  readonly protocol: LoadPlan['protocol'];
  readonly targets: LoadPlan['targets'];
  readonly gateways: BenchProcess[];
  readonly workers: BenchProcess[];
  readonly redisPid: number;
  stop(): Promise<void>;
}

interface Description {
  title: string;
  protocol: LoadPlan['protocol'];
  gateway: string;
  worker: string;
  path: string;
  speaks: boolean;
  /** Needs the packages of peers/. */
  peer: boolean;
  gatewayEnv(options: StartOptions): Record<string, string>;
  workerEnv(options: StartOptions): Record<string, string>;
}

/** What the product is told for the bench: room for the load. The rest is as shipped. */
export const RIVULET_SETTINGS = {
  LOG_LEVEL: 'warn', // peers log nothing per request either
  QUEUE_LIMIT: '1000000',
  USER_ACTIVE_LIMIT: '1000',
  CONNECTIONS_PER_ADDRESS: '100000',
  COMPACT_AFTER_MS: '1000', // so that compaction is part of the measured cost
};

const peer = (worker: Record<string, string>, gateway: Record<string, string> = {}) => ({
  gatewayEnv: (options: StartOptions): Record<string, string> => ({
    ...gateway,
    ...(options.recovery ? { RECOVERY: '1' } : {}),
  }),
  workerEnv: (options: StartOptions): Record<string, string> => ({
    ...worker,
    MERGE: options.merge ? 'rule' : 'none',
    CONCURRENCY: String(Math.ceil(options.concurrency / options.workers)),
  }),
});

export const SYSTEMS: Record<SystemName, Description> = {
  rivulet: {
    title: 'Rivulet',
    protocol: 'json',
    gateway: 'gateway/main.ts',
    worker: 'worker/main.ts',
    path: '/ws',
    speaks: false,
    peer: false,
    gatewayEnv: () => RIVULET_SETTINGS,
    workerEnv: (options) => ({
      ...RIVULET_SETTINGS,
      HANDLER: 'test/bench/model.ts',
      WORKER_CONCURRENCY: String(Math.min(10_000, Math.ceil(options.concurrency / options.workers))),
    }),
  },
  control: {
    title: 'bare parts (control)',
    protocol: 'json',
    gateway: 'test/bench/control/gateway.ts',
    worker: 'test/bench/control/worker.ts',
    path: '/',
    speaks: true,
    peer: false,
    ...peer({}),
  },
  'bullmq-socketio': {
    title: 'BullMQ + Socket.IO + streams adapter',
    protocol: 'socketio',
    gateway: 'test/bench/peers/socketio-gateway.mjs',
    worker: 'test/bench/peers/socketio-worker.mjs',
    path: '/socket.io/?EIO=4&transport=websocket',
    speaks: true,
    peer: true,
    ...peer({}),
  },
  'bullmq-pubsub': {
    title: 'BullMQ + ws + pub/sub',
    protocol: 'json',
    gateway: 'test/bench/peers/ws-gateway.mjs',
    worker: 'test/bench/peers/ws-worker.mjs',
    path: '/',
    speaks: true,
    peer: true,
    ...peer({ BATCH: 'none' }),
  },
  'bullmq-pubsub-batched': {
    title: 'BullMQ + ws + pub/sub, batched per turn',
    protocol: 'json',
    gateway: 'test/bench/peers/ws-gateway.mjs',
    worker: 'test/bench/peers/ws-worker.mjs',
    path: '/',
    speaks: true,
    peer: true,
    ...peer({ BATCH: 'turn' }),
  },
  'locked-list': {
    title: 'list + lock + 1 s poll, ws',
    protocol: 'json',
    gateway: 'test/bench/peers/ws-gateway.mjs',
    worker: 'test/bench/peers/ws-worker.mjs',
    path: '/',
    speaks: true,
    peer: true,
    ...peer({ QUEUE: 'list', BATCH: 'none' }, { QUEUE: 'list' }),
  },
};

export async function startSystem(name: SystemName, options: StartOptions): Promise<RunningSystem> {
  const description = SYSTEMS[name];
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-bench-'));
  const closers: (() => Promise<unknown> | void)[] = [
    () => rmSync(dir, { recursive: true, force: true, maxRetries: 5 }),
  ];
  const stop = async () => {
    for (const close of closers.splice(0).reverse()) await close();
  };
  try {
    const redis = await startRedisServer({ dir });
    closers.push(() => redis.kill('SIGKILL')); // its data is thrown away
    const nodes = Array.from({ length: options.gateways }, (_, index) => `n${index + 1}`);
    const targets: { port: number; path: string }[] = [];
    const start = async (role: 'gateway' | 'worker', index: number, env: Record<string, string>) => {
      const started = await startProcess(description[role], {
        env: { REDIS_URL: redis.url, NODES: nodes.join(','), ...env, ...options.env },
        speaks: description.speaks,
        profileDir: options.profileDir,
        name: `${name}-${role}-${index + 1}`,
      });
      closers.push(() => started.stop());
      return started;
    };
    const gateways = await Promise.all(
      nodes.map(async (node, index) => {
        const port = description.speaks ? 0 : await freePort();
        const started = await start('gateway', index, {
          NODE_ID: node,
          PORT: String(port),
          ...description.gatewayEnv(options),
        });
        targets[index] = { port: started.port || port, path: description.path };
        if (!description.speaks)
          await Promise.race([
            becomesReady(port),
            started.ended.then((how) => {
              throw new Error(how);
            }),
          ]);
        return started;
      }),
    );
    const workers = await Promise.all(
      Array.from({ length: options.workers }, (_, index) =>
        start('worker', index, description.workerEnv(options)),
      ),
    );
    return {
      name,
      redisUrl: redis.url,
      protocol: description.protocol,
      targets,
      gateways,
      workers,
      redisPid: redis.pid,
      stop,
    };
  } catch (error) {
    await stop();
    throw error;
  }
}

async function becomesReady(port: number): Promise<void> {
  const deadline = Date.now() + 20_000;
  for (;;) {
    try {
      const answer = await fetch(`http://127.0.0.1:${port}/readyz`);
      await answer.text();
      if (answer.ok) return;
    } catch (error) {
      if (Date.now() > deadline) throw error;
    }
    if (Date.now() > deadline) throw new Error(`no gateway is ready on port ${port}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
