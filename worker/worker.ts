import { randomBytes } from 'node:crypto';
import { hostname } from 'node:os';
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { createGenerationStore } from '../shared/generation-store.ts';
import { createKeys } from '../shared/keys.ts';
import { type Running, within } from '../shared/lifecycle.ts';
import { createNodeRegistry } from '../shared/node-registry.ts';
import { createRedis, type RedisConnection } from '../shared/redis.ts';
import { createRequestQueue, type QueuedRequest } from '../shared/request-queue.ts';
import { createTracing } from '../shared/tracing.ts';
import { createAppender } from './appender.ts';
import { AttemptWatch } from './attempt-watch.ts';
import type { WorkerConfig } from './config.ts';
import { watchFinishedLogs } from './finished-logs.ts';
import type { Handler } from './handler.ts';
import { keepLeases } from './lease.ts';
import { createWorkerMetrics } from './metrics.ts';
import { startMetricsServer } from './metrics-server.ts';
import { readRequests } from './request-loop.ts';
import { type RunningRequest, runRequest } from './run-request.ts';
import { startSweeper } from './sweeper.ts';

/**
 * A worker: reads requests of all nodes, runs up to WORKER_CONCURRENCY of them, keeps their leases. It keeps no
 * state that another worker could not rebuild from Redis.
 */

const BEAT_MS = 1_000; // the view of what workers do is at most this old
const SEEN_LEASE_MS = 5_000;
const RUNNING_SHOWN = 32;
const BACKLOG_MS = 500; // then another worker may have what was read here and finds no room
const CLOSE_MS = 3_000; // for each step of leaving once nothing runs

export async function startWorker(config: WorkerConfig, handler: Handler, log: Logger): Promise<Running> {
  const worker = `w-${hostname().slice(0, 24)}-${process.pid}-${randomBytes(3).toString('hex')}`;
  const keys = createKeys(config.KEY_PREFIX);
  const closers: (() => Promise<unknown>)[] = [];
  const running = new Map<string, RunningRequest>();
  const metrics = createWorkerMetrics({
    running: () => running.size,
    concurrency: config.WORKER_CONCURRENCY,
    tokens: () => appender.tokens,
  });
  const redis = createRedis({
    url: config.REDIS_URL,
    name: `${worker}:commands`,
    log,
    hot: true,
    onPing: (seconds) => metrics.redis.observe(seconds),
  });
  closers.push(() => redis.close());
  await redis.connected();
  const store = createGenerationStore({
    redis,
    keys,
    retentionMs: config.RETENTION_MS,
    compactAfterMs: config.COMPACT_AFTER_MS,
  });
  const queue = createRequestQueue({ redis, keys });
  const registry = createNodeRegistry({ redis, keys });
  const appender = createAppender({ redis, keys, store });
  const tracing = await createTracing(config.OTEL_EXPORTER_OTLP_ENDPOINT, 'rivulet-worker', {
    'service.instance.id': worker,
  });
  if (tracing) closers.push(() => tracing.stop());
  if (config.METRICS_PORT !== undefined) {
    const server = await startMetricsServer({
      host: config.METRICS_HOST,
      port: config.METRICS_PORT,
      registry: metrics.registry,
      isReady: () => redis.isReady(),
      log,
    });
    closers.push(() => server.stop());
  }

  const stopReading = new AbortController();
  const stopKeeping = new AbortController();
  const backlog: QueuedRequest[] = []; // what was read without room for it: see request-loop.ts
  const startedAt = Date.now();
  let done = 0;
  let failed = 0;
  let lastBusyMs = performance.now();
  let roomWaiters: (() => void)[] = [];

  const finishedLogs = watchFinishedLogs({
    redis,
    keys,
    afterMs: config.COMPACT_AFTER_MS,
    signal: stopKeeping.signal,
  });

  function start(request: QueuedRequest): void {
    if (stopReading.signal.aborted) {
      void giveBack([request]); // a read that was under way brought it
      return;
    }
    lastBusyMs = performance.now();
    const key = `${request.node} ${request.entry}`;
    if (running.has(key)) return; // claimed back after a lapse
    if (running.size >= config.WORKER_CONCURRENCY) {
      backlog.push(request);
      setTimeout(
        () => {
          const index = backlog.indexOf(request);
          if (index >= 0) void giveBack(backlog.splice(index, 1));
        },
        Math.min(BACKLOG_MS, config.LEASE_MS / 4),
      );
      return;
    }
    const started = runRequest(request, {
      worker,
      config,
      handler,
      store,
      queue,
      registry,
      appender,
      log,
      finishedLogs,
      watch: (watched) => new AttemptWatch(watched, { metrics, tracing, worker }),
      onOutcome(outcome) {
        if (outcome === 'done') done++;
        if (outcome === 'failed') failed++;
      },
    });
    running.set(key, started);
    void started.ended.then(() => {
      running.delete(key);
      lastBusyMs = performance.now();
      const next = backlog.shift();
      if (next) start(next);
      for (const wake of roomWaiters.splice(0)) wake();
    });
  }

  /** What cannot be given back now is left to the lease. */
  async function giveBack(requests: QueuedRequest[]): Promise<void> {
    await Promise.all(requests.map((request) => queue.retryLater(request, worker, 0).catch(() => false)));
  }

  const room = () =>
    stopReading.signal.aborted ? 0 : config.WORKER_CONCURRENCY - running.size - backlog.length;
  const leases = keepLeases({
    worker,
    leaseMs: config.LEASE_MS,
    timeoutMs: config.GENERATION_TIMEOUT_MS,
    *running() {
      yield* running.values();
    },
    redis,
    queue,
    store,
    log,
    signal: stopKeeping.signal,
  });
  const unsubscribe = redis.onReconnect(() => {
    for (const one of running.values()) one.writer?.check();
    source.doubt();
  });
  const readers = new Set<RedisConnection>();
  const source = readRequests({
    worker,
    keys,
    registry,
    queue,
    openReader(name) {
      const reader = createRedis({ url: config.REDIS_URL, name: `${worker}:${name}`, log, hot: true });
      readers.add(reader);
      return reader;
    },
    closeReader(reader) {
      readers.delete(reader);
      return reader.close();
    },
    holds: (node, entry) =>
      running.has(`${node} ${entry}`) || backlog.some((one) => one.node === node && one.entry === entry),
    isCluster: redis.isCluster,
    room,
    roomAgain: () =>
      new Promise((resolve) => {
        if (room() > 0) resolve();
        roomWaiters.push(resolve);
      }),
    start,
    log,
    signal: stopReading.signal,
  });
  const sweeper = startSweeper({
    worker,
    config,
    queue,
    registry,
    nodes: () => source.nodes,
    room,
    held: () => [...[...running.values()].map((one) => one.request), ...backlog],
    start,
    onTakeovers: (count) => metrics.takeovers.inc(count),
    log,
    signal: stopReading.signal,
  });

  const beat = async () => {
    await registry.beatWorker(worker, SEEN_LEASE_MS, {
      concurrency: config.WORKER_CONCURRENCY,
      running: [...running.values()].slice(0, RUNNING_SHOWN).map((one) => ({
        user: one.request.user,
        messageId: one.request.messageId,
        attempt: one.attempt,
        since: one.since,
      })),
      runningCount: running.size,
      tokens: appender.tokens,
      done,
      failed,
      host: hostname(),
      pid: process.pid,
    });
  };
  const beating = (async () => {
    while (!stopKeeping.signal.aborted) {
      await beat().catch((error: Error) => log.debug({ err: error.message }, 'beat failed'));
      await delay(BEAT_MS, undefined, { signal: stopKeeping.signal }).catch(() => {});
    }
  })();

  log.info({ worker, concurrency: config.WORKER_CONCURRENCY, handler: config.HANDLER, startedAt }, 'ready');

  const allEnded = () => Promise.all([...running.values()].map((one) => one.ended));

  /** Takes nothing new; what waits in line here goes back. */
  async function refuse(): Promise<void> {
    stopReading.abort();
    for (const wake of roomWaiters.splice(0)) wake();
    roomWaiters = [];
    await within(CLOSE_MS, source.ended);
    await within(CLOSE_MS, giveBack(backlog.splice(0)));
  }

  async function retire(): Promise<void> {
    await refuse();
    while (running.size > 0) await allEnded();
  }

  let stopped: Promise<void> | undefined;
  async function stop(): Promise<void> {
    const deadline = performance.now() + config.DRAIN_MS;
    await refuse();
    while (running.size > 0 && performance.now() < deadline)
      await within(Math.max(1, deadline - performance.now()), allEnded());
    if (running.size > 0) log.info({ running: running.size }, 'time is up; handing requests back');
    for (const one of running.values()) one.release();
    await within(5_000, allEnded());
    await within(CLOSE_MS, appender.flushed());
    appender.close();
    stopKeeping.abort();
    await within(CLOSE_MS, Promise.all([leases, sweeper, beating, finishedLogs.ended]));
    await within(CLOSE_MS, leaveGroups());
    await within(
      CLOSE_MS,
      registry.leaveWorker(worker).catch(() => {}),
    );
    unsubscribe();
    for (const reader of readers) await within(CLOSE_MS, reader.close());
    for (const close of closers.reverse()) await within(CLOSE_MS, close());
  }

  /** Removes this consumer where it holds nothing: XGROUP DELCONSUMER loses pending entries. */
  async function leaveGroups(): Promise<void> {
    for (const node of source.nodes) await queue.removeConsumer(node, worker).catch(() => {});
  }

  const ended = config.EXIT_WHEN_IDLE_MS === undefined ? undefined : idle(config.EXIT_WHEN_IDLE_MS);
  /** Settles after so long with nothing to do: nothing running here, and no request open anywhere. Never once it leaves. */
  async function idle(ms: number): Promise<void> {
    while (!stopReading.signal.aborted) {
      await delay(Math.min(250, ms), undefined, { signal: stopReading.signal }).catch(() => {});
      if (running.size > 0 || performance.now() - lastBusyMs < ms) continue;
      // From the registry: right after the start the nodes may not be known here yet.
      const waiting = await registry
        .nodes()
        .then((nodes) => queue.countOpen(nodes.map(({ node }) => node)))
        .catch(() => 1);
      if (waiting === 0) return;
      lastBusyMs = performance.now();
    }
    return new Promise(() => {});
  }

  return {
    stop: () => {
      stopped ??= stop();
      return stopped;
    },
    retire,
    ...(ended ? { ended } : {}),
  };
}
