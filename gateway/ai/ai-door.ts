import type { Logger } from 'pino';
import { readRefusal, refusalCommand } from '../../shared/access.ts';
import type { Keys } from '../../shared/keys.ts';
import { CLOSE } from '../../shared/protocol.ts';
import { type RedisConnection, retrying, takeAnswers } from '../../shared/redis.ts';

/**
 * Bans and locks on the AI SDK's path. The native door looks at them when it binds a user; here every question and
 * every resume is a door. Whoever is inside, a socket or an event stream, is listed by user, so that an order to close a
 * user's connections reaches them. A missed order is noticed by a look at those who are listed, a bounded number at a time.
 */

const LOOK_EVERY_MS = 5_000;
const LOOK_USERS = 2_500; // of one look
const LOOK_BATCH = 250; // users asked for in one round trip

/** A socket or an event stream of a user. */
export interface AiGuest {
  readonly userId: string;
  closeWith(code: number, reason: string): void;
}

export type AiDoor = ReturnType<typeof createAiDoor>;

export function createAiDoor({ redis, keys, log }: { redis: RedisConnection; keys: Keys; log: Logger }) {
  const guests = new Map<string, Set<AiGuest>>();
  let ring = guests.keys();
  let looking = false;

  function closeUser(user: string, code: number, reason: string): void {
    for (const guest of [...(guests.get(user) ?? [])]) guest.closeWith(code, reason);
  }

  /** The users that were not looked at for longest, at most so many. */
  function nextUsers(most: number): string[] {
    const users: string[] = [];
    while (users.length < most) {
      let next = ring.next();
      if (next.done) {
        ring = guests.keys();
        next = ring.next();
        if (next.done) break;
      }
      users.push(next.value);
    }
    return users;
  }

  async function look(): Promise<void> {
    let failure: Error | null = null;
    for (let left = Math.min(LOOK_USERS, guests.size); left > 0; left -= LOOK_BATCH) {
      const users = nextUsers(Math.min(LOOK_BATCH, left));
      const replies = await redis.batch(users.map((user) => refusalCommand(keys, user)));
      const answers = replies.map(([error, access]) => error ?? access);
      const failed = takeAnswers(answers, (access, index) => {
        const refusal = readRefusal(access);
        if (refusal) closeUser(users[index]!, CLOSE.banned, refusal.code);
      });
      failure = failed ?? failure;
    }
    if (failure) throw failure;
  }

  const looks = setInterval(() => {
    if (looking || !redis.isReady()) return;
    looking = true;
    look()
      .catch((error: Error) => log.warn({ err: error.message }, 'bans not looked at; again soon'))
      .finally(() => {
        looking = false;
      });
  }, LOOK_EVERY_MS);
  looks.unref();

  return {
    /** @throws RivuletError banned or locked */
    async assertAllowed(user: string): Promise<void> {
      const refusal = readRefusal(await retrying(() => redis.send(refusalCommand(keys, user))));
      if (refusal) throw refusal;
    },

    enter(guest: AiGuest): void {
      const there = guests.get(guest.userId);
      if (there) there.add(guest);
      else guests.set(guest.userId, new Set([guest]));
    },

    leave(guest: AiGuest): void {
      const there = guests.get(guest.userId);
      if (there?.delete(guest) && there.size === 0) guests.delete(guest.userId);
    },

    /** Closes all that a user has here. */
    closeUser,

    stop(): void {
      clearInterval(looks);
    },
  };
}
