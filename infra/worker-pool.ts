import { type ChildProcess, spawn } from 'node:child_process';
import { availableParallelism } from 'node:os';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Logger } from '../shared/logger.ts';
import { endWithThisProcess } from './child-guard.ts';
import { type Candidate, chooseToRetire } from './scaling.ts';

/**
 * Worker processes of this machine. States of one: starting (not in the registry yet), up, retiring (SIGUSR2:
 * reads nothing new, finishes what it runs, leaves), gone. A worker that ends by itself is missed at the next
 * look and replaced; one that cannot start, or ends soon after, holds further starts back for a growing pause; one that hangs
 * is killed.
 */

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));
const FIRST_PAUSE_MS = 1_000;
const LONGEST_PAUSE_MS = 30_000;
const STEADY_MS = 30_000; // up for this long = its end says nothing of the next one
const WRONG_SETTINGS = 2; // exit code of lifecycle.ts
const HUNG_MS = 15_000; // three leases of the registry
const START_MS = 60_000; // from its start to the registry, on a machine where all is slow
const STOP_MS = 8_000; // after DRAIN_MS a worker hands back what is left, which takes 5 s while Redis answers
/**
 * What lives as long as a token is on its way should die young: with V8's usual 16 MB a busy worker stops ten times a
 * second, some 6 ms each time, to move it.
 */
export const WORKER_FLAGS = ['--max-semi-space-size=32']; // also in package.json, compose.yaml and k8s/worker.yaml

interface Worker {
  child: ChildProcess;
  /** The lowest free number when it started. */
  place: number;
  startedMs: number;
  seen: boolean;
  /** How long it has been missing from the registry, once seen there or due there. */
  missingMs: number;
  retiring: boolean;
  ended: Promise<void>;
}

export interface WorkerPool {
  /** Workers that take requests, or will. */
  readonly size: number;
  /** Workers that finish what they run. */
  readonly retiring: number;
  /** One that was seen in the registry, or should be there by now, is missing from it. */
  misses(running: Map<number, number>): boolean;
  /**
   * Moves towards `target`. `running` is what the registry says, by process id; it is current when Redis takes what
   * workers write there.
   */
  adjust(target: number, running: Map<number, number>, isCurrent: boolean): void;
  /** Rejects when no worker can ever start: its settings are wrong. */
  readonly failed: Promise<never>;
  readonly pids: number[];
  /** Whether this process is one of them, also one that retires. */
  has(pid: number): boolean;
  /** SIGTERM to all: they drain within DRAIN_MS and hand back what is left. SIGKILL to one that does not. */
  stop(): Promise<void>;
}

export function createWorkerPool(options: {
  env: NodeJS.ProcessEnv;
  /** As the workers have them. */
  leaseMs: number;
  drainMs: number;
  log: Logger;
}): WorkerPool {
  const { env, log } = options;
  const hungMs = Math.max(HUNG_MS, options.leaseMs); // by then others run what it ran
  const stopMs = options.drainMs + STOP_MS;
  let lastLookMs = performance.now();
  const workers = new Map<number, Worker>();
  // Each start burns about 0.4 s of a core: more at a time would only delay the first that is ready.
  const startsAtOnce = availableParallelism();
  let pauseMs = FIRST_PAUSE_MS;
  let notBefore = 0;
  let stopping = false;
  let fail: (error: Error) => void = () => {};
  const failed = new Promise<never>((_, reject) => {
    fail = reject;
  });
  failed.catch(() => {});

  /** After an end that the next start may share. What ends together, or while starts wait, counts once. */
  function holdBack(): void {
    const now = performance.now();
    if (now < notBefore) return;
    if (now - notBefore > STEADY_MS) pauseMs = FIRST_PAUSE_MS;
    notBefore = now + pauseMs;
    pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS);
  }
  const waitMs = () => Math.max(0, Math.round(notBefore - performance.now()));

  /** METRICS_PORT names the port of the first worker; the next ones follow. */
  const metricsPort = (place: number) =>
    env.METRICS_PORT && env.METRICS_PORT !== '0'
      ? String(Number(env.METRICS_PORT) + place)
      : env.METRICS_PORT;

  function start(): void {
    const taken = new Set([...workers.values()].map((worker) => worker.place));
    let place = 0;
    while (taken.has(place)) place++;
    const child = spawnWorker(place);
    if (!child) return;
    const pid = child.pid!;
    const letGo = endWithThisProcess(pid, stopMs);
    const worker: Worker = {
      child,
      place,
      startedMs: performance.now(),
      seen: false,
      missingMs: 0,
      retiring: false,
      ended: new Promise((resolve) => {
        child.once('exit', (code, signal) => {
          letGo();
          workers.delete(pid);
          resolve();
          if (worker.retiring || stopping) {
            log.info({ worker: pid, code, signal }, 'worker left');
            return;
          }
          if (!worker.seen || performance.now() - worker.startedMs < STEADY_MS) holdBack();
          const facts = { worker: pid, code, signal, waitMs: waitMs() };
          if (worker.seen) log.warn(facts, 'a worker ended; another starts if it is needed');
          else log.error(facts, 'a worker did not start');
          if (!worker.seen && code === WRONG_SETTINGS)
            fail(new Error('the settings of the workers are wrong; see above'));
        });
      }),
    };
    workers.set(pid, worker);
    log.info({ worker: pid }, 'worker started');
  }

  /** Null when the system refuses: for good where there is no program to run, else for a while. */
  function spawnWorker(place: number): ChildProcess | null {
    const refuse = (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT' || error.code === 'EACCES') {
        fail(error);
        return;
      }
      holdBack();
      log.error({ err: error.message, waitMs: waitMs() }, 'no worker can be started; again soon');
    };
    try {
      const child = spawn(
        process.execPath,
        [...WORKER_FLAGS, '--import', './infra/typescript.mjs', 'worker/main.ts'],
        {
          cwd: ROOT,
          env: { ...env, EXIT_WHEN_IDLE_MS: '', METRICS_PORT: metricsPort(place) }, // we decide who leaves
          stdio: ['ignore', 'inherit', 'inherit'],
          detached: true, // Ctrl-C reaches it only through us
        },
      );
      if (child.pid) return child;
      child.once('error', refuse);
    } catch (error) {
      refuse(error as NodeJS.ErrnoException);
    }
    return null;
  }

  /**
   * Kills who is missing from the registry: a handler that never lets go of its thread, or a start that never ends. It
   * would keep its place for ever, and obeys no other signal. Only looks at a current registry count: an outage of Redis, or of its
   * disk, silences workers that are well.
   */
  function killHung(running: Map<number, number>, isCurrent: boolean): void {
    const now = performance.now();
    const passedMs = isCurrent ? Math.min(now - lastLookMs, hungMs / 3) : 0;
    lastLookMs = now;
    for (const [pid, worker] of workers) {
      worker.missingMs = isMissing(worker, running) ? worker.missingMs + passedMs : 0;
      if (worker.missingMs < hungMs) continue;
      log.error({ worker: pid, missingMs: worker.missingMs }, 'a worker hangs; killing it');
      worker.child.kill('SIGKILL');
    }
  }

  const isMissing = (worker: Worker, running: Map<number, number>) =>
    !running.has(worker.child.pid!) && (worker.seen || performance.now() - worker.startedMs > START_MS);
  const serving = () => [...workers.values()].filter((worker) => !worker.retiring);

  return {
    get size() {
      return serving().length;
    },
    get retiring() {
      return workers.size - serving().length;
    },
    failed,
    get pids() {
      return serving().map(({ child }) => child.pid!);
    },
    has: (pid) => workers.has(pid),
    misses(running) {
      return [...workers.values()].some((worker) => isMissing(worker, running));
    },
    adjust(target, running, isCurrent) {
      if (stopping) return;
      for (const [pid, worker] of workers) if (running.has(pid)) worker.seen = true;
      killHung(running, isCurrent);
      const current = serving();
      const starting = current.filter((worker) => !worker.seen).length;
      const wanted = Math.min(target - current.length, startsAtOnce - starting);
      for (let more = wanted; more > 0 && performance.now() >= notBefore; more--) start();
      const candidates = current.map(
        ({ child, startedMs }): Candidate => ({
          pid: child.pid!,
          running: running.get(child.pid!) ?? null,
          startedMs,
        }),
      );
      for (const { pid, running: busy } of chooseToRetire(candidates, current.length - target)) {
        const worker = workers.get(pid)!;
        worker.retiring = true;
        // Before it is up it holds nothing, and may not know the gentle signal yet.
        worker.child.kill(worker.seen ? 'SIGUSR2' : 'SIGTERM');
        log.info({ worker: pid, running: busy }, 'worker retires');
      }
    },
    async stop() {
      stopping = true;
      for (const { child } of workers.values()) child.kill('SIGTERM');
      const killing = setTimeout(() => {
        for (const { child } of workers.values()) child.kill('SIGKILL');
      }, stopMs);
      await Promise.all([...workers.values()].map(({ ended }) => ended));
      clearTimeout(killing);
    },
  };
}
