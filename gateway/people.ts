import type { Logger } from 'pino';
import { createGroups } from '../shared/groups.ts';
import { createInboxes } from '../shared/inbox.ts';
import type { Keys } from '../shared/keys.ts';
import type { NodeRegistry } from '../shared/node-registry.ts';
import type { RedisConnection } from '../shared/redis.ts';
import type { GatewayConfig } from './config.ts';
import { watchLiveNodes } from './live-nodes.ts';
import { createMailboxes } from './mailboxes.ts';
import type { GatewayMetrics } from './metrics.ts';
import { createPeopleDesk } from './people-desk.ts';
import type { Policy } from './policy/policy.ts';
import { createPostOffice } from './post-office.ts';

/** Builds the parts for messages between people: inboxes, groups, who is online, who sends, who receives. */
export async function createPeople(parts: {
  config: GatewayConfig;
  instance: string;
  redis: RedisConnection;
  keys: Keys;
  registry: NodeRegistry;
  policies: Policy[];
  /** Closes what a user has here beside mailboxes. */
  closeOthers(user: string, code: number, reason: string): void;
  metrics: GatewayMetrics;
  log: Logger;
  signal: AbortSignal;
}) {
  const { config, redis, keys, registry, metrics, log } = parts;
  const watch = await watchLiveNodes({ redis, registry, log, signal: parts.signal });
  const live = () => watch.current;
  const inboxes = createInboxes({
    redis,
    keys,
    limits: { mostMessages: config.INBOX_MESSAGES, ageMs: config.INBOX_AGE_MS },
  });
  const groups = createGroups({ redis, keys, mostMembers: config.GROUP_MEMBERS });
  const mailboxes = createMailboxes({
    node: config.NODE_ID,
    instance: parts.instance,
    redis,
    keys,
    inboxes,
    live,
    devicePolicy: config.DEVICE_POLICY,
    closeOthers: parts.closeOthers,
    counters: {
      delivered: (count) => metrics.messagesDelivered.inc(count),
      gap: () => metrics.inboxGaps.inc(),
    },
    log,
  });
  const office = createPostOffice({
    redis,
    keys,
    inboxes,
    live,
    look: watch.look,
    countHere: () => ({ users: mailboxes.users, connections: mailboxes.size }),
    node: config.NODE_ID,
  });
  const desk = createPeopleDesk({
    redis,
    keys,
    inboxes,
    groups,
    office,
    live,
    policies: parts.policies,
    groupsAreOpen: config.GROUP_JOINS === 'open',
    messageBytes: config.MESSAGE_BYTES,
    counters: {
      sent: () => metrics.messagesSent.inc(),
      refused: (code) => metrics.rejected.inc({ code }),
    },
  });
  return {
    mailboxes,
    desk,
    office,
    groups,
    /** After `signal`: resolves when nothing is under way. */
    async stop(): Promise<void> {
      await mailboxes.stop();
      await watch.ended;
    },
  };
}

export type People = Awaited<ReturnType<typeof createPeople>>;
