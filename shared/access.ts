import { RivuletError } from './errors.ts';
import type { Keys } from './keys.ts';
import { createNodeRegistry } from './node-registry.ts';
import { CLOSE } from './protocol.ts';
import { type Command, type RedisConnection, retrying } from './redis.ts';
import { publishCloseCommand } from './reply-stream.ts';

/**
 * What administrators decide about a user: a ban (for good), a lock (until a time), a number of conversations a
 * day. One hash a user, read at the door by `bind` and `admit`. A ban or a lock closes the user's connections on
 * every node at once; a gateway that misses the order finds out in its sweep. Everything is written down in the
 * audit stream.
 */

const AUDIT_KEPT = 10_000;
export const UNLIMITED = -1;

export interface Access {
  /** The reason; null when not banned. */
  banned: string | null;
  /** ms; null when not locked, or not any more. */
  lockedUntil: number | null;
  /** Conversations a day; `UNLIMITED`; null = as everybody. */
  quota: number | null;
}

export interface AuditEntry {
  time: number;
  by: string;
  action: string;
  user: string;
  details: string;
}

export function createAccessStore({ redis, keys }: { redis: RedisConnection; keys: Keys }) {
  const { client } = redis;
  const registry = createNodeRegistry({ redis, keys });

  async function audit(by: string, action: string, user: string, details: string): Promise<void> {
    await retrying(() =>
      client.xadd(
        keys.audit(),
        'MAXLEN',
        '~',
        AUDIT_KEPT,
        '*',
        'by',
        by,
        'action',
        action,
        'user',
        user,
        'details',
        details,
      ),
    );
  }

  /** Closes the user's connections wherever they are; returns on how many nodes we asked for it. */
  async function closeEverywhere(user: string, reason: string): Promise<number> {
    const nodes = await registry.nodes();
    const replies = await redis.batch(
      nodes.map(({ node }) => publishCloseCommand(keys, node, user, CLOSE.banned, null, reason)),
    );
    for (const [error] of replies) if (error) throw error;
    return nodes.length;
  }

  return {
    async ban(user: string, reason: string, by: string): Promise<void> {
      await retrying(() => client.hset(keys.access(user), 'banned', reason));
      await audit(by, 'ban', user, reason);
      await closeEverywhere(user, 'banned');
    },
    async unban(user: string, by: string): Promise<void> {
      await retrying(() => client.hdel(keys.access(user), 'banned'));
      await audit(by, 'unban', user, '');
    },
    async lock(user: string, untilMs: number, by: string): Promise<void> {
      await retrying(() => client.hset(keys.access(user), 'lockedUntil', untilMs));
      await audit(by, 'lock', user, new Date(untilMs).toISOString());
      await closeEverywhere(user, 'locked');
    },
    async unlock(user: string, by: string): Promise<void> {
      await retrying(() => client.hdel(keys.access(user), 'lockedUntil'));
      await audit(by, 'unlock', user, '');
    },
    /** @param quota null = as everybody */
    async setQuota(user: string, quota: number | null, by: string): Promise<void> {
      await retrying<number>(() =>
        quota === null
          ? client.hdel(keys.access(user), 'quota')
          : client.hset(keys.access(user), 'quota', quota),
      );
      await audit(by, 'quota', user, quota === null ? 'default' : quota < 0 ? 'unlimited' : String(quota));
    },
    async read(user: string): Promise<Access & { usedToday: number }> {
      const [banned, lockedUntil, quota] = await client.hmget(
        keys.access(user),
        'banned',
        'lockedUntil',
        'quota',
      );
      const [day, used] = await client.hmget(keys.quota(user), 'day', 'used');
      const today = String(Math.floor(Date.now() / 86_400_000));
      return {
        banned: banned ?? null,
        lockedUntil: Number(lockedUntil ?? 0) > Date.now() ? Number(lockedUntil) : null,
        quota: quota == null ? null : Number(quota),
        usedToday: day === today ? Number(used) : 0,
      };
    },
    /** The latest first. */
    async readAudit(most: number): Promise<AuditEntry[]> {
      const entries = await client.xrevrange(keys.audit(), '+', '-', 'COUNT', most);
      return entries.map(([id, fields]) => {
        const entry: Record<string, string> = {};
        for (let index = 0; index < fields.length; index += 2) entry[fields[index]!] = fields[index + 1]!;
        return {
          time: Number(id.split('-')[0]),
          by: entry.by ?? '',
          action: entry.action ?? '',
          user: entry.user ?? '',
          details: entry.details ?? '',
        };
      });
    },
  };
}

/** Asks whether a user may be here; its reply is read by `readRefusal`. */
export function refusalCommand(keys: Keys, user: string): Command {
  return ['hmget', keys.access(user), 'banned', 'lockedUntil'];
}

/** Why the user may not, `banned` or `locked`; null when nothing is against it. */
export function readRefusal(reply: unknown): RivuletError | null {
  const [banned, lockedUntil] = reply as [string | null, string | null];
  if (banned !== null) return new RivuletError('banned');
  const retryAfterMs = Number(lockedUntil ?? 0) - Date.now();
  return retryAfterMs > 0 ? new RivuletError('locked', undefined, { retryAfterMs }) : null;
}

export type AccessStore = ReturnType<typeof createAccessStore>;
