import { hostname } from 'node:os';
import type { Keys } from '../shared/keys.ts';
import type { Command, RedisConnection } from '../shared/redis.ts';
import { isProcessAlive } from './run-state.ts';

/**
 * What the queues ask for: waiting + running (`XLEN`, exact because a request is acknowledged and deleted in one
 * step) + retries that are due, over all nodes, without what workers of others already run. Two round trips.
 *
 * With no worker alive nobody moves due retries back into the stream, so they must count as demand here; those
 * that become due while a process starts count already.
 */
export interface Demand {
  /** Requests that need a worker of ours. */
  needed: number;
  open: number;
  dueRetries: number;
  /** Requests ever appended over all nodes; only when asked for. */
  appended: number;
  /** Running requests of our live workers, by process id. */
  ours: Map<number, number>;
}

const START_LEAD_MS = 500; // a worker needs about so long from start to its first request

export async function readDemand(
  redis: RedisConnection,
  keys: Keys,
  /** Whether a process of this host is one of our workers, and not of another autoscaler or started by hand. */
  isOurs: (pid: number) => boolean,
  withAppended = false,
): Promise<Demand> {
  const nowMs = Date.now();
  const host = hostname();
  const [nodes, workers] = await Promise.all([
    redis.client.hgetall(keys.nodes()),
    redis.client.hgetall(keys.workers()),
  ]);
  const replies = await redis.batch(
    Object.keys(nodes).flatMap((node): Command[] => [
      ['xlen', keys.requests(node)],
      ['zcount', keys.retries(node), '-inf', nowMs + START_LEAD_MS],
      ...(withAppended ? [['xinfo', 'STREAM', keys.requests(node)] as Command] : []),
    ]),
  );
  const step = withAppended ? 3 : 2;
  const demand: Demand = {
    needed: 0,
    open: 0,
    dueRetries: 0,
    appended: 0,
    ours: new Map(),
  };
  replies.forEach(([error, value], index) => {
    if (index % step === 2) {
      const facts = (value ?? []) as unknown[]; // an error here is a stream that does not exist yet
      demand.appended += Number(facts[facts.indexOf('entries-added') + 1] ?? 0) || 0;
    } else if (error) throw error;
    else if (index % step === 0) demand.open += value as number;
    else demand.dueRetries += value as number;
  });
  let othersRun = 0;
  for (const json of Object.values(workers)) {
    const facts = JSON.parse(json) as { host: string; pid: number; until: number; runningCount: number };
    if (facts.until < nowMs) continue;
    const isHere = facts.host === host;
    if (isHere && isOurs(facts.pid)) demand.ours.set(facts.pid, facts.runningCount);
    else if (!isHere || isProcessAlive(facts.pid)) othersRun += facts.runningCount; // what a dead one ran needs another
  }
  demand.needed = Math.max(0, demand.open + demand.dueRetries - othersRun);
  return demand;
}
