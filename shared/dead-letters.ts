import { Cluster } from 'ioredis';
import { createGenerationStore } from './generation-store.ts';
import type { Keys } from './keys.ts';
import { createNodeRegistry } from './node-registry.ts';
import type { ChatPayload } from './protocol.ts';
import { type RedisConnection, retrying } from './redis.ts';
import { createRequestQueue } from './request-queue.ts';

/**
 * Requests that used up their attempts, for people who look after them. A letter is named `<node>/<entry id>`. It goes
 * away by being replayed, dropped, or after 30 days.
 *
 * A replay has three steps, in this order: the generation is opened again under its own message id, its request is
 * appended, the letter is deleted. Whatever is cut short is completed by doing it again, and a letter whose message is
 * open, or has an answer by now, only goes.
 */
export interface DeadLetter {
  name: string;
  node: string;
  entry: string;
  user: string;
  messageId: string;
  attempts: number;
  lastAttempt: number;
  code: string;
  reason: string;
  atMs: number;
  payload: ChatPayload;
}

export type Replayed = 'replayed' | 'open' | 'answered' | 'gone';

const PAGE = 100;
const LEASE_GRACE_MS = 10_000; // a gateway that was seen so recently will read its queue

export type DeadLetters = ReturnType<typeof createDeadLetters>;

export function createDeadLetters({ redis, keys }: { redis: RedisConnection; keys: Keys }) {
  const { client } = redis;
  const store = createGenerationStore({ redis, keys, retentionMs: 0 });
  const queue = createRequestQueue({ redis, keys });
  const registry = createNodeRegistry({ redis, keys });

  /** Nodes that have letters, gone ones too. */
  async function nodes(): Promise<string[]> {
    const found = new Set<string>();
    const pattern = keys.dead('*');
    const [before, after] = pattern.split('*') as [string, string];
    for (const server of client instanceof Cluster ? client.nodes('master') : [client])
      for (let cursor = '0'; ; ) {
        const [next, names] = await server.scan(cursor, 'MATCH', pattern, 'COUNT', 1_000);
        for (const name of names) found.add(name.slice(before.length, name.length - after.length));
        cursor = next;
        if (cursor === '0') break;
      }
    return [...found].sort();
  }

  /** Oldest first, node by node, a page at a time. */
  async function* list(only?: string): AsyncGenerator<DeadLetter> {
    for (const node of only === undefined ? await nodes() : [only]) {
      for (let from = '-'; ; ) {
        const page = await client.xrange(keys.dead(node), from, '+', 'COUNT', PAGE);
        for (const [entry, fields] of page) yield readLetter(node, entry, fields);
        if (page.length < PAGE) break;
        from = `(${page.at(-1)![0]}`;
      }
    }
  }

  async function find(name: string): Promise<DeadLetter | null> {
    const at = name.lastIndexOf('/');
    if (at < 1 || !/^\d+-\d+$/.test(name.slice(at + 1))) return null;
    const [node, entry] = [name.slice(0, at), name.slice(at + 1)];
    const [found] = await client.xrange(keys.dead(node), entry, entry);
    return found ? readLetter(node, entry, found[1]) : null;
  }

  async function drop(letter: DeadLetter): Promise<boolean> {
    return (await retrying(() => client.xdel(keys.dead(letter.node), letter.entry))) === 1;
  }

  /** A live gateway to carry it: its own, if it lives. @throws Error when there is none */
  async function chooseNode(letter: DeadLetter): Promise<string> {
    const live = (await registry.nodes()).filter((entry) => entry.until + LEASE_GRACE_MS > Date.now());
    const own = live.find((entry) => entry.node === letter.node) ?? live[0];
    if (!own) throw new Error('no gateway is alive: workers would not see a replayed request');
    return own.node;
  }

  async function replay(letter: DeadLetter): Promise<Replayed> {
    if (!(await find(letter.name))) return 'gone';
    const { user, messageId, payload } = letter;
    const node = await chooseNode(letter);
    const reopened = await store.replay({
      user,
      messageId,
      node,
      payload,
      lastAttempt: letter.lastAttempt,
    });
    if (reopened.state === 'ended') {
      await drop(letter);
      return 'answered';
    }
    // Also when it was open: a replay that was cut short may have left it without its request.
    if ((await queue.find(reopened.node, user, messageId)) < 0) {
      if (reopened.node !== node) await store.moveHome(user, messageId, node); // that one may be gone
      await queue.enqueue(node, user, messageId, Number.MAX_SAFE_INTEGER);
    }
    await drop(letter);
    return reopened.state === 'open' ? 'open' : 'replayed';
  }

  return { nodes, list, find, drop, replay, chooseNode, countOpen: queue.countOpen };
}

function readLetter(node: string, entry: string, fields: string[]): DeadLetter {
  const facts = new Map<string, string>();
  for (let index = 0; index < fields.length; index += 2) facts.set(fields[index]!, fields[index + 1]!);
  const attempts = Number(facts.get('attempts') ?? 0);
  return {
    name: `${node}/${entry}`,
    node,
    entry,
    user: facts.get('user') ?? '',
    messageId: facts.get('message') ?? '',
    attempts,
    lastAttempt: Number(facts.get('last') ?? attempts + 1),
    code: facts.get('code') ?? '',
    reason: facts.get('reason') ?? '',
    atMs: Number(entry.split('-')[0]),
    payload: JSON.parse(facts.get('payload') ?? '{"contents":""}') as ChatPayload,
  };
}
