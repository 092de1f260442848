import { createHash, randomUUID } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import { RivuletError } from '../shared/errors.ts';
import {
  compareInboxIds,
  type Delivered,
  encodeRest,
  type Inboxes,
  type MessageContents,
} from '../shared/inbox.ts';
import type { Keys } from '../shared/keys.ts';
import { type LiveNodes, parseConnection } from '../shared/presence.ts';
import { type RedisConnection, retrying } from '../shared/redis.ts';
import {
  type MessageRecipient,
  publishMessageCommand,
  publishNoticeCommand,
} from '../shared/reply-stream.ts';

/**
 * Takes messages to people: into the inboxes first, then one reply entry for each node where somebody is
 * connected, with the list of that node's recipients.
 *
 * Who is online where is told by the very script that delivers, so a group of thousands costs one pipelined call a
 * member and nothing else: no second look-up, and no index of members by node that could go stale. Calls go in
 * chunks, so that neither Redis nor this process is held up, and few large messages are under way at once.
 *
 * A message to one is idempotent by the recipient's fingerprints. A message to many or to all is claimed under sender and
 * message id, so that two gateways do not carry it out at once, and its outcome is kept there for a day, so that
 * repeating it reaches nobody who joined later.
 */

const CHUNK = 200; // inbox appends in one pipeline: about 4 ms of Redis
const OUTCOME_MS = 24 * 3_600_000;
const CLAIM_MS = 15_000; // renewed; a gateway that dies with a message in its hands holds it up for so long
const AGAIN_MS = 50;
const LARGE_AT_ONCE = 4; // messages to many that may be under way; the others wait

export interface Outcome {
  /** Inbox id of the message; of the last recipient's where there are several. */
  id: string;
  /** Live connections reached. */
  connections: number;
  /** Recipients with and without a live connection. */
  online: number;
  offline: number;
}

/** What is remembered with an outcome: a claim while it is being carried out. `target` is absent in what was kept by 0.1. */
interface Kept {
  target?: string;
  claim?: string;
}

export function createPostOffice(parts: {
  redis: RedisConnection;
  keys: Keys;
  inboxes: Inboxes;
  live: () => LiveNodes;
  /** Reads which gateways are alive now. */
  look: () => Promise<LiveNodes>;
  /** Who is connected to this gateway. */
  countHere: () => { users: number; connections: number };
  node: string;
}) {
  const { redis, keys, inboxes, live } = parts;

  async function deliverChunk(users: string[], message: MessageContents, rest: string): Promise<Delivered[]> {
    const commands = users.map((user) => inboxes.deliverCommand(user, message, rest));
    return retrying(async () => {
      const replies = await redis.batch(commands);
      return replies.map(([error, value]) => {
        if (error) throw error; // repeated as a whole: who has it already only says so
        return inboxes.readDelivered(value);
      });
    });
  }

  async function deliver(users: string[], message: MessageContents): Promise<Outcome> {
    const rest = encodeRest(message);
    const byNode = new Map<string, MessageRecipient[]>();
    const outcome: Outcome = { id: '', connections: 0, online: 0, offline: 0 };
    for (let from = 0; from < users.length; from += CHUNK) {
      const chunk = users.slice(from, from + CHUNK);
      const delivered = await deliverChunk(chunk, message, rest);
      delivered.forEach(({ id, before, connections }, index) => {
        if (compareInboxIds(id, outcome.id) > 0) outcome.id = id;
        const nodes = new Set<string>();
        let reached = 0;
        for (const json of connections) {
          const connection = parseConnection(json);
          if (live().isLive(connection)) reached++;
          if (live().mayBeLive(connection)) nodes.add(connection.node);
        }
        outcome.connections += reached;
        if (reached > 0) outcome.online++;
        else outcome.offline++;
        const recipient = { user: chunk[index]!, before, id };
        for (const node of nodes) {
          const recipients = byNode.get(node);
          if (recipients) recipients.push(recipient);
          else byNode.set(node, [recipient]);
        }
      });
    }
    // What is lost here is found in the inboxes, by the next message or by the sweep of the recipients' gateway.
    await redis.batch(
      [...byNode].map(([node, recipients]) => publishMessageCommand(keys, node, recipients, rest)),
    );
    return outcome;
  }

  let free = LARGE_AT_ONCE;
  const waiting: (() => void)[] = [];
  async function inTurn<T>(step: () => Promise<T>): Promise<T> {
    if (free > 0) free--;
    else await new Promise<void>((resolve) => waiting.push(resolve));
    try {
      return await step();
    } finally {
      const next = waiting.shift();
      if (next) next();
      else free++;
    }
  }

  return {
    /** Durable when it resolves. */
    toUser(user: string, message: MessageContents): Promise<Outcome> {
      return deliver([user], message);
    },

    /** To several or a whole group; `users` is asked only when it is this message's turn. */
    async toMany(
      to: { group: string } | { users: string[] },
      users: () => Promise<string[]>,
      message: MessageContents,
    ): Promise<Outcome> {
      const target = targetOf('users' in to ? { users: [...to.users].sort() } : to);
      return once(message, target, () =>
        inTurn(async () => {
          const outcome = await deliver(await users(), message);
          if (outcome.id === '') outcome.id = `${message.sentAt}-0`; // nobody was there
          return outcome;
        }),
      );
    },

    /**
     * To everyone who is online now; not kept for the others. Counted as the gateways last told, up to 2 s ago, and a user
     * on two of them twice: to compare their users would cost more than the notice. The outcome is kept once every gateway
     * has it: whoever repeats after a failure may make some see the notice twice, which is better than to be told that all is
     * well with one that nobody got.
     */
    toAll(message: MessageContents): Promise<Outcome> {
      return once(message, targetOf({ all: true }), () => publishNotice(message));
    },
  };

  async function publishNotice(message: MessageContents): Promise<Outcome> {
    const { nodes, possible } = await retrying(parts.look);
    const others = possible.filter(({ node }) => node !== parts.node);
    const here = parts.countHere();
    const outcome: Outcome = {
      id: `${message.sentAt}-0`,
      connections: others.reduce((sum, { connections }) => sum + connections, here.connections),
      online: others.reduce((sum, { users, connections }) => sum + (users ?? connections), here.users),
      offline: 0,
    };
    const frame = JSON.stringify({ type: 'notice', id: outcome.id, ...message });
    const targets = [parts.node, ...others.map(({ node }) => node)];
    const live = new Set([parts.node, ...nodes.map(({ node }) => node)]);
    const replies = await redis.batch(targets.map((node) => publishNoticeCommand(keys, node, frame)));
    replies.forEach(([error, entry], index) => {
      if (error) throw error;
      // Its stream was lost with the server's memory, and it has not made it again yet.
      if (entry === null && live.has(targets[index]!))
        throw new RivuletError('internal', 'not every gateway can be reached yet; try again');
    });
    return outcome;
  }

  /**
   * Carries a message out once, whichever gateways are told to at the same time, and remembers the outcome for a day.
   * Who comes second waits for who came first.
   * @throws RivuletError invalid_frame when the id went to others
   */
  async function once(
    message: MessageContents,
    target: string,
    step: () => Promise<Outcome>,
  ): Promise<Outcome> {
    const key = keys.sent(message.from, message.messageId);
    const claim = JSON.stringify({ target, claim: randomUUID() });
    for (;;) {
      const kept = await retrying(() => redis.client.set(key, claim, 'PX', CLAIM_MS, 'NX', 'GET'));
      if (kept === null || kept === claim) break; // ours; also when the answer to the claim was lost
      const { target: before, claim: underWay, ...outcome } = JSON.parse(kept) as Outcome & Kept;
      if (before !== undefined && before !== target)
        throw new RivuletError('invalid_frame', 'this messageId was used for other recipients within a day');
      if (underWay === undefined) return outcome;
      await delay(AGAIN_MS);
    }
    const hold = (ms: number) => redis.script('hold_claim', [key], [claim, ms]).catch(() => {});
    const renewing = setInterval(() => void hold(CLAIM_MS), CLAIM_MS / 3);
    try {
      const outcome = await step();
      await retrying(() => redis.client.set(key, JSON.stringify({ ...outcome, target }), 'PX', OUTCOME_MS));
      return outcome;
    } catch (error) {
      void hold(0);
      throw error;
    } finally {
      clearInterval(renewing);
    }
  }
}

/** Short, and another for other recipients. */
function targetOf(to: object): string {
  return createHash('sha256').update(JSON.stringify(to)).digest('base64url').slice(0, 16);
}

export type PostOffice = ReturnType<typeof createPostOffice>;
