import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type RedisServer, startRedisServer } from '../../infra/redis-server.ts';
import { createRedis, type RedisConnection } from '../../shared/redis.ts';
import { eventually } from './eventually.ts';
import { freePortAndAt } from './free-port.ts';
import { aclArgs } from './redis-users.ts';

/** A real Redis Cluster: three masters with a replica each, on free ports, for slot moves and failovers. */
export interface RedisCluster {
  /** redis+cluster://… with all masters. */
  readonly url: string;
  readonly nodes: ClusterNode[];
  /** The slot of a key. */
  slotOf(key: string): Promise<number>;
  /** The server that is master of a slot now; waits through a failover. */
  masterOf(slot: number): Promise<ClusterNode>;
  /** Moves a slot with its keys to another master, as `redis-cli --cluster reshard` does. */
  moveSlot(slot: number, to: ClusterNode): Promise<number>;
  stop(): Promise<void>;
}

export interface ClusterNode {
  readonly id: string;
  readonly server: RedisServer;
  readonly redis: RedisConnection;
}

const MASTERS = 3;
const SLOTS = 16_384;
const NODE_TIMEOUT_MS = 1_000; // a failover within about 2 s

export async function startRedisCluster(): Promise<RedisCluster> {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-cluster-'));
  const nodes: ClusterNode[] = [];
  const closers: (() => Promise<unknown>)[] = [];
  const stop = async () => {
    await Promise.all(closers.map((close) => close()));
    rmSync(dir, { recursive: true, force: true });
  };
  const call = (node: ClusterNode, ...args: (string | number)[]) =>
    node.redis.client.call(String(args[0]), ...args.slice(1)) as Promise<unknown>;

  try {
    const ports = await freePorts(2 * MASTERS);
    await Promise.all(
      ports.map(async (port, index) => {
        const server = await startRedisServer({
          dir: join(dir, String(index)),
          port,
          args: [
            ...aclArgs(mkdtempSync(join(dir, 'users-'))),
            ...['--cluster-enabled', 'yes', '--cluster-config-file', 'nodes.conf'],
            ...['--cluster-node-timeout', String(NODE_TIMEOUT_MS), '--cluster-port', String(port + 10_000)],
            // The replica of a master that was just busy must still take over.
            ...['--cluster-replica-validity-factor', '0', '--repl-diskless-sync-delay', '0'],
          ],
        });
        closers.push(async () => {
          await server.kill('SIGCONT').catch(() => {});
          await server.kill('SIGKILL').catch(() => {});
        });
        const redis = createRedis({ url: server.url, name: `cluster-${index}` });
        closers.push(() => redis.close());
        await redis.connected();
        const id = (await redis.client.call('cluster', 'MYID')) as string;
        nodes[index] = { id, server, redis };
      }),
    );
    for (const node of nodes.slice(1))
      await call(node, 'cluster', 'MEET', '127.0.0.1', ports[0]!, ports[0]! + 10_000);
    for (let index = 0; index < MASTERS; index++) {
      const from = Math.floor((index * SLOTS) / MASTERS);
      const to = Math.floor(((index + 1) * SLOTS) / MASTERS) - 1;
      await call(nodes[index]!, 'cluster', 'ADDSLOTSRANGE', from, to);
    }
    await eventually('gossip', async () => {
      const known = await Promise.all(nodes.map((node) => call(node, 'cluster', 'NODES') as Promise<string>));
      return known.every((text) => text.trim().split('\n').length === nodes.length);
    });
    for (let index = 0; index < MASTERS; index++)
      await eventually('replica', () =>
        call(nodes[index + MASTERS]!, 'cluster', 'REPLICATE', nodes[index]!.id).catch(() => null),
      );
    await eventually('a cluster that is ok everywhere, with replicas in sync', async () => {
      const infos = await Promise.all(
        nodes.map(
          async (node) => `${await call(node, 'cluster', 'INFO')}${await call(node, 'info', 'replication')}`,
        ),
      );
      return infos.every(
        (text, index) =>
          /cluster_state:ok/.test(text) && (index < MASTERS || /master_link_status:up/.test(text)),
      );
    });
  } catch (error) {
    await stop();
    throw error;
  }

  const living = async () => {
    for (const node of nodes) {
      const text = await Promise.race([
        call(node, 'cluster', 'NODES').catch(() => null),
        new Promise<null>((resolve) => setTimeout(resolve, 500, null)),
      ]);
      if (typeof text === 'string') return text;
    }
    throw new Error('no node of the cluster answers');
  };

  async function findMaster(slot: number): Promise<ClusterNode | null> {
    for (const line of (await living()).trim().split('\n')) {
      const [id, , flags, , , , , , ...ranges] = line.split(' ') as [string, string, string];
      if (!flags.includes('master') || flags.includes('fail')) continue;
      const owns = ranges.some((range: string) => {
        const [from, to] = range.split('-').map(Number);
        return slot >= from! && slot <= (to ?? from!);
      });
      if (owns) return nodes.find((node) => node.id === id)!;
    }
    return null;
  }
  const masterOf = (slot: number) => eventually(`master of slot ${slot}`, () => findMaster(slot));

  return {
    url: `redis+cluster://${nodes
      .slice(0, MASTERS)
      .map(({ server }) => `127.0.0.1:${server.port}`)
      .join(',')}`,
    nodes,
    slotOf: async (key) => (await call(nodes[0]!, 'cluster', 'KEYSLOT', key)) as number,
    masterOf,
    async moveSlot(slot, to) {
      const from = await masterOf(slot);
      await call(to, 'cluster', 'SETSLOT', slot, 'IMPORTING', from.id);
      await call(from, 'cluster', 'SETSLOT', slot, 'MIGRATING', to.id);
      let moved = 0;
      for (;;) {
        const keys = (await call(from, 'cluster', 'GETKEYSINSLOT', slot, 100)) as string[];
        if (keys.length === 0) break;
        await call(from, 'migrate', '127.0.0.1', to.server.port, '', 0, 5_000, 'KEYS', ...keys);
        moved += keys.length;
      }
      for (const node of [to, from]) await call(node, 'cluster', 'SETSLOT', slot, 'NODE', to.id);
      return moved;
    },
    stop,
  };
}

/** Free ports whose bus port, 10,000 above, is free too. */
async function freePorts(count: number): Promise<number[]> {
  const ports = new Set<number>();
  while (ports.size < count) {
    const port = await freePortAndAt(10_000);
    if (port < 20_000) ports.add(port); // above are the bus ports of others
  }
  return [...ports];
}
