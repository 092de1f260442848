import type { Keys } from './keys.ts';
import type { NodeEntry } from './node-registry.ts';
import type { Command, RedisConnection } from './redis.ts';

/**
 * Who is connected where: one hash a user, connection → `{node, instance, device, since}`.
 *
 * An entry is leased through its gateway: it counts while that very process (node and instance) holds its lease in
 * the registry. So 50,000 idle connections cost no renewals, and all ghosts of a crashed gateway vanish together,
 * when its lease of 6 s ends. Entries are keyed by connection, so the close of an old one cannot remove a newer
 * one's. Whoever binds the same user next sweeps the ghosts from the hash; in the end the key expires.
 */

/** The key outlives the last renewal (see `KEEP_MS` in gateway/mailboxes.ts) by this at the most. */
export const CONNECTIONS_LIFE_MS = 6 * 3_600_000;
/** A gateway may have come up after we last looked at the registry: until then its entries are believed. */
const FRESH_MS = 10_000;
/** Where any number of devices is allowed: bounds what one message to this user costs. */
export const MOST_CONNECTIONS = 1_000;

export interface ConnectionEntry {
  node: string;
  instance: string;
  device: string;
  /** ms, by the gateway's clock. */
  since: number;
}

/** The gateways that are alive, as last read from the registry. */
export interface LiveNodes {
  readonly nodes: NodeEntry[];
  /** Those that may be live, as in `mayBeLive`: who must not miss what is for everybody. */
  readonly possible: NodeEntry[];
  /** Whether an entry's gateway is alive, as far as is known: what people are told. */
  isLive(entry: ConnectionEntry): boolean;
  /**
   * Whether it may be: its lease ended a moment ago, as all leases do when Redis was away. Messages are still
   * published for it, and its entries are not swept.
   */
  mayBeLive(entry: ConnectionEntry): boolean;
  /** Those that may be live, for scripts: ` node/instance node/instance `; empty when the registry was not read for too long. */
  readonly list: string;
}

const GRACE_MS = 24_000; // with the lease of 6 s: a ghost is swept after 30 s
const STALE_MS = 15_000; // without news from the registry for so long, nobody is called a ghost

/** @param redisMs the time of reading by the clock of Redis, which leases are measured with */
export function createLiveNodes(entries: NodeEntry[], redisMs: number): LiveNodes {
  const readMs = Date.now();
  const live = entries.filter((entry) => entry.until > redisMs);
  const nameOf = ({ node, instance }: { node: string; instance: string }) => `${node}/${instance}`;
  const liveNames = new Set(live.map(nameOf));
  const possible = entries.filter((entry) => entry.until + GRACE_MS > redisMs);
  const names = new Set(possible.map(nameOf));
  const list = names.size === 0 ? '' : ` ${[...names].join(' ')} `;
  const isIn = (set: Set<string>, entry: ConnectionEntry) => {
    if (set.has(nameOf(entry))) return true;
    const now = Date.now();
    return now - readMs > STALE_MS || now - entry.since < FRESH_MS;
  };
  return {
    nodes: live,
    possible,
    isLive: (entry) => isIn(liveNames, entry),
    mayBeLive: (entry) => isIn(names, entry),
    get list() {
      return Date.now() - readMs > STALE_MS ? '' : list;
    },
  };
}

export function parseConnection(json: string): ConnectionEntry {
  return JSON.parse(json) as ConnectionEntry;
}

/** The live connections of each user, in the order of `users`. One round trip. */
export async function readPresence(
  { redis, keys }: { redis: RedisConnection; keys: Keys },
  users: string[],
  live: LiveNodes,
): Promise<ConnectionEntry[][]> {
  const replies = await redis.batch(users.map((user): Command => ['hvals', keys.connections(user)]));
  return replies.map(([error, values]) => {
    if (error) throw error;
    return (values as string[]).map(parseConnection).filter((entry) => live.isLive(entry));
  });
}
