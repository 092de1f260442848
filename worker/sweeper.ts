import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { NodeRegistry } from '../shared/node-registry.ts';
import { GROUP, type QueuedRequest, type RequestQueue } from '../shared/request-queue.ts';
import type { WorkerConfig } from './config.ts';
import { eachInTurn } from './each-in-turn.ts';

/**
 * The work that any worker does for all: moves due retries back, claims what a dead worker held, removes
 * consumers and nodes that are gone and empty. Every step is safe when several workers do it at once. In a Cluster a node
 * whose server is away does not hold up those behind it.
 *
 * A request that kills its worker takes its neighbours with it, and all are claimed together, and would die together
 * until each has used up its attempts. So a request whose workers died often is a suspect, and a worker runs one
 * suspect at a time: the last two attempts are made in different company.
 */

const RETRY_STEP_MS = 250; // how late a due retry may start
const HOUSEKEEPING_MS = 10_000;
const SWEEPERS = 4; // workers' worth of looks at each node: more workers share them, or they would weigh on Redis
const ATTEMPTS_ALONE = 2;
const GONE_AFTER_MS = 60_000; // a node or consumer that is silent and empty for so long is forgotten

export function startSweeper(parts: {
  worker: string;
  config: WorkerConfig;
  queue: RequestQueue;
  registry: NodeRegistry;
  nodes: () => string[];
  room: () => number;
  /** What this worker runs or is about to. */
  held: () => QueuedRequest[];
  start: (request: QueuedRequest) => void;
  onTakeovers: (count: number) => void;
  log: Logger;
  signal: AbortSignal;
}): Promise<void> {
  const { worker, config, queue, registry, log, signal } = parts;

  const suspectAfter = Math.max(1, config.MAX_ATTEMPTS - ATTEMPTS_ALONE);

  let share = 1;
  /** The nodes of this round: all, or by chance each with such a probability that about SWEEPERS look after it. */
  const nodesToSweep = () => parts.nodes().filter(() => share >= 1 || Math.random() < share);

  async function promote(): Promise<void> {
    await eachInTurn(nodesToSweep(), async (node) => {
      const moved = await queue.promoteDue(node, 100);
      if (moved > 0) log.info({ node, moved }, 'retries are due');
    });
  }

  async function claim(): Promise<void> {
    await eachInTurn(nodesToSweep(), async (node) => {
      const room = parts.room();
      if (room <= 0) return;
      const claimed = await queue.claimStalled(node, worker, {
        leaseMs: config.LEASE_MS,
        most: room,
        suspectAfter,
        suspects: parts.held().some((request) => request.deliveries > suspectAfter) ? 0 : 1,
      });
      if (claimed.length > 0) log.warn({ node, claimed: claimed.length }, 'took over stalled requests');
      parts.onTakeovers(claimed.length);
      for (const request of claimed) parts.start(request);
    });
  }

  async function housekeep(): Promise<void> {
    await registry.sweepWorkers(GONE_AFTER_MS);
    share = SWEEPERS / Math.max(1, await registry.countWorkers());
    await eachInTurn(await registry.nodes(), async ({ node }) => {
      await queue.removeIdleConsumers(node, Math.max(GONE_AFTER_MS, 3 * config.LEASE_MS));
      if ((await queue.countOpen([node])) > 0) return;
      if (!(await registry.remove(node, GONE_AFTER_MS))) return; // by the clock of its lease
      await queue.dropEmpty(node);
      log.info({ node }, 'forgot a node that is gone and drained');
    });
  }

  async function every(ms: number, name: string, step: () => Promise<void>): Promise<void> {
    while (!signal.aborted) {
      // Jitter keeps many workers from doing the same step at the same time.
      await delay(ms * (0.75 + Math.random() / 2), undefined, { signal }).catch(() => {});
      if (signal.aborted) return;
      await step().catch((error: Error) => {
        if (error.message.startsWith('NOGROUP')) return; // the request loop makes it
        log.warn({ err: error.message, step: name, group: GROUP }, 'sweep failed; again soon');
      });
    }
  }

  return Promise.all([
    every(RETRY_STEP_MS, 'promote', promote),
    every(config.LEASE_MS / 3, 'claim', claim),
    every(HOUSEKEEPING_MS, 'housekeep', housekeep),
  ]).then(() => {});
}
