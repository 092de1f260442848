import type { Keys } from './keys.ts';
import { type RedisConnection, retrying } from './redis.ts';

/**
 * Groups: a set of members each, and a set of groups for each user. The two lie in different slots, so they
 * change one after the other: the user's own list first, which only bounds and lists; the members decide.
 */

const GROUPS_OF_A_USER = 200; // so that joining cannot fill the memory
const CHUNK = 500; // members one step adds

export function createGroups({
  redis,
  keys,
  mostMembers,
}: {
  redis: RedisConnection;
  keys: Keys;
  mostMembers: number;
}) {
  const { client } = redis;

  return {
    /** Adds members, all of them or, after a reason, those of the chunks before. */
    async add(group: string, users: string[]): Promise<{ size: number } | { reason: string }> {
      let size = 0;
      for (let from = 0; from < users.length; from += CHUNK) {
        const chunk = users.slice(from, from + CHUNK);
        const replies = await redis.batch(
          chunk.map((user) =>
            redis.scriptCommand('join_group', [keys.groups(user)], [GROUPS_OF_A_USER, group]),
          ),
        );
        const full = replies.findIndex(([error, value]) => {
          if (error) throw error;
          return value === -1;
        });
        if (full >= 0) {
          await this.forgetGroup(group, chunk);
          return { reason: `user ${chunk[full]} is in ${GROUPS_OF_A_USER} groups, which is the most` };
        }
        size = (await retrying(() =>
          redis.script('join_group', [keys.group(group)], [mostMembers, ...chunk]),
        )) as number;
        if (size < 0) {
          await this.forgetGroup(group, chunk);
          return { reason: `group ${group} would have more than ${mostMembers} members` };
        }
      }
      return { size };
    },

    async remove(group: string, users: string[]): Promise<{ size: number }> {
      for (let from = 0; from < users.length; from += CHUNK) {
        const chunk = users.slice(from, from + CHUNK);
        await retrying(() => client.srem(keys.group(group), ...chunk));
        await this.forgetGroup(group, chunk);
      }
      return { size: await retrying(() => client.scard(keys.group(group))) };
    },

    /** Takes a group off users' own lists, unless they are members after all. */
    async forgetGroup(group: string, users: string[]): Promise<void> {
      const members = await retrying(() => client.smismember(keys.group(group), ...users));
      const gone = users.filter((_, index) => members[index] === 0);
      await redis.batch(gone.map((user) => ['srem', keys.groups(user), group]));
    },

    async has(group: string, user: string): Promise<boolean> {
      return (await retrying(() => client.sismember(keys.group(group), user))) === 1;
    },

    /** Everyone in it: at most as many as the bound allows. */
    async members(group: string): Promise<string[]> {
      return retrying(() => client.smembers(keys.group(group)));
    },

    /** How many are in it, and who, sorted: everyone up to `most`, some of them beyond. Costs the same for any size. */
    async show(group: string, most: number): Promise<{ count: number; userIds: string[] }> {
      return retrying(async () => {
        const users = new Set<string>(); // a scan may tell somebody twice
        let cursor = '0';
        do {
          const [next, found] = await client.sscan(keys.group(group), cursor, 'COUNT', most);
          for (const user of found) users.add(user);
          cursor = next;
        } while (cursor !== '0' && users.size < most);
        const count = cursor === '0' ? users.size : await client.scard(keys.group(group));
        return { count, userIds: [...users].slice(0, most).sort() };
      });
    },

    async groupsOf(user: string): Promise<string[]> {
      return (await retrying(() => client.smembers(keys.groups(user)))).sort();
    },
  };
}

export type Groups = ReturnType<typeof createGroups>;
