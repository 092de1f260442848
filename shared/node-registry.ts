import type { Keys } from './keys.ts';
import { type RedisConnection, readServerTime, retrying } from './redis.ts';

/**
 * Live gateways and workers, as leases in two hashes. A gateway's entry outlives its lease until its requests are
 * drained: that is how workers go on reading a dead node's stream.
 */

export interface NodeFacts {
  startedAt: number;
  url: string | null;
  connections: number;
  /** Different users among them; absent in what a gateway of before tells. */
  users?: number;
}

export interface NodeEntry extends NodeFacts {
  node: string;
  instance: string;
  until: number;
}

export interface WorkerFacts {
  concurrency: number;
  /** At most 32, for people who look. */
  running: { user: string; messageId: string; attempt: number; since: number }[];
  runningCount: number;
  tokens: number;
  done: number;
  failed: number;
  host: string;
  pid: number;
}

const readUntil = (json: string) => (JSON.parse(json) as { until: number }).until;

export function createNodeRegistry({ redis, keys }: { redis: RedisConnection; keys: Keys }) {
  const { client } = redis;
  const readWorkers = () => Promise.all([client.hgetall(keys.workers()), readServerTime(client)]);
  return {
    /** Takes or renews the lease. Returns 0, or ms left of the lease that somebody else holds. */
    async register(node: string, instance: string, leaseMs: number, facts: NodeFacts): Promise<number> {
      const [taken, leftMs] = (await redis.script(
        'register_node',
        [keys.nodes()],
        [node, instance, leaseMs, JSON.stringify(facts)],
      )) as [number, number?];
      return taken === 1 ? 0 : leftMs!;
    },
    /** Lists a gateway that the registry has lost, until what is queued for it is drained. */
    async adopt(node: string): Promise<void> {
      const entry = { startedAt: 0, url: null, connections: 0, instance: '', until: 0 } satisfies Omit<
        NodeEntry,
        'node'
      >;
      await client.hsetnx(keys.nodes(), node, JSON.stringify(entry));
    },
    async leave(node: string, instance: string): Promise<void> {
      await redis.script('leave_node', [keys.nodes()], [node, instance]);
    },
    /** Every node that is alive or not drained yet. */
    async nodes(): Promise<NodeEntry[]> {
      const entries = await retrying(() => client.hgetall(keys.nodes()));
      return Object.entries(entries)
        .map(([node, json]) => ({ node, ...JSON.parse(json) }) as NodeEntry)
        .sort((a, b) => (a.node < b.node ? -1 : 1));
    },
    /** Forgets a node whose lease ended so long ago. */
    async remove(node: string, graceMs: number): Promise<boolean> {
      return (await redis.script('remove_node', [keys.nodes()], [node, graceMs])) === 1;
    },
    async beatWorker(worker: string, leaseMs: number, facts: WorkerFacts): Promise<void> {
      await redis.script('beat_worker', [keys.workers()], [worker, leaseMs, JSON.stringify(facts)]);
    },
    /** True when Redis takes beats now, so that a live worker is seen. In a Cluster other keys may do, and this one not. */
    async takesBeats(): Promise<boolean> {
      return redis.script('prove_writes', [keys.workers()], []).then(
        () => true,
        () => false,
      );
    },
    /** Workers that beat; those that fell silent keep their entries for a while. */
    async countWorkers(): Promise<number> {
      const [entries, now] = await readWorkers();
      return Object.values(entries).filter((json) => readUntil(json) >= now).length;
    },
    async leaveWorker(worker: string): Promise<void> {
      await client.hdel(keys.workers(), worker);
    },
    /** Forgets workers whose lease ran out `graceMs` ago. */
    async sweepWorkers(graceMs: number): Promise<void> {
      const [entries, now] = await readWorkers();
      const gone = Object.entries(entries)
        .filter(([, json]) => readUntil(json) + graceMs < now)
        .map(([worker]) => worker);
      if (gone.length > 0) await client.hdel(keys.workers(), ...gone);
    },
  };
}

export type NodeRegistry = ReturnType<typeof createNodeRegistry>;
