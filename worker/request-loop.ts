import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { Keys } from '../shared/keys.ts';
import type { NodeRegistry } from '../shared/node-registry.ts';
import {
  BLOCK_MS,
  type Command,
  describeError,
  isConnectionError,
  type RedisConnection,
} from '../shared/redis.ts';
import { GROUP, type QueuedRequest, type RequestQueue, readRequest } from '../shared/request-queue.ts';

/**
 * Reads requests from every node's stream, never more than there is room for, and runs them.
 *
 * With room for at least one request a stream, one blocked XREADGROUP serves all streams. With less room (COUNT is
 * per stream) they are asked one at a time, in rotating order, without blocking; only when all are empty comes the
 * blocked read. In a Cluster a read must stay in one slot: there each stream is read by a loop of its own, on its own
 * connection; the room that one of them asks with is not offered to the others meanwhile.
 *
 * What Redis has given to this worker and no answer of a lost connection has told it of would wait for the lease: after
 * such a loss it asks for a while what is pending under its name, and takes what it does not hold.
 */

const REGISTRY_MS = 1_000; // a new gateway's requests are seen within this and one blocked read
const PAUSE_MS = 250; // after an error
const ASKING_MS = 1_000; // that a read may keep room from the others: its server may be away
const AGAIN_MS = 5; // between looks whether such a read has left any
const LOOK_MS = 500; // between looks at what is pending under its name
const DOUBT_MS = 2 * BLOCK_MS; // a server that has not noticed the loss may still give away for so long

export interface RequestSource {
  /** Nodes known now. */
  readonly nodes: string[];
  /** Settles when the signal has aborted and no read is under way. */
  readonly ended: Promise<void>;
  /** A connection was lost: answers may be missing. */
  doubt(): void;
}

export function readRequests(parts: {
  worker: string;
  keys: Keys;
  registry: NodeRegistry;
  queue: RequestQueue;
  openReader: (name: string) => RedisConnection;
  closeReader: (reader: RedisConnection) => Promise<void>;
  /** Whether it runs here or waits in line here. */
  holds: (node: string, entry: string) => boolean;
  isCluster: boolean;
  /** Requests that may be started now. */
  room: () => number;
  /** Settles when there may be room again. */
  roomAgain: () => Promise<void>;
  start: (request: QueuedRequest) => void;
  log: Logger;
  signal: AbortSignal;
}): RequestSource {
  const { worker, keys, queue, log, signal } = parts;
  let nodes: string[] = [];
  let rotation = 0;
  let asking = 0; // room that reads without blocking have asked for
  const room = () => parts.room() - asking;
  let doubtfulUntil = 0;
  const doubt = () => {
    doubtfulUntil = performance.now() + DOUBT_MS;
  };

  async function discover(): Promise<void> {
    while (!signal.aborted) {
      try {
        const known: string[] = [];
        for (const { node } of await parts.registry.nodes())
          if (nodes.includes(node) || (await hasGroup(node))) known.push(node);
        if (known.join() !== nodes.join()) {
          log.info({ nodes: known }, 'nodes');
          nodes = known;
          openLoops();
        }
      } catch (error) {
        log.warn({ err: describeError(error) }, 'the registry cannot be read; again soon');
      }
      await delay(REGISTRY_MS, undefined, { signal }).catch(() => {});
    }
  }

  /** Makes it if need be. In a Cluster the server of one node may be away while the others' are not. */
  async function hasGroup(node: string): Promise<boolean> {
    return queue.ensureGroup(node).then(
      () => true,
      (error) => {
        log.warn({ err: describeError(error), node }, 'no group; again soon');
        return false;
      },
    );
  }

  async function read(
    reader: RedisConnection,
    names: string[],
    count: number,
    block: boolean,
  ): Promise<number> {
    const command: Command = ['xreadgroup', 'GROUP', GROUP, worker, 'COUNT', count];
    if (block) command.push('BLOCK', BLOCK_MS);
    command.push('STREAMS', ...names.map(keys.requests), ...names.map(() => '>'));
    const reply = (await (block ? reader.blocked(BLOCK_MS, command) : reader.send(command))) as
      | [string, [string, string[]][]][]
      | null;
    let taken = 0;
    for (const [key, entries] of reply ?? []) {
      const node = names.find((name) => keys.requests(name) === key)!;
      for (const [entry, fields] of entries) {
        parts.start(readRequest(node, entry, fields));
        taken++;
      }
    }
    return taken;
  }

  /** Reads as much as there is room for, without blocking. */
  async function readIfAny(reader: RedisConnection, node: string): Promise<number> {
    let count = room();
    if (count <= 0) return 0;
    asking += count;
    const release = () => {
      asking -= count;
      count = 0;
    };
    const timer = setTimeout(release, ASKING_MS);
    try {
      return await read(reader, [node], count, false);
    } finally {
      clearTimeout(timer);
      release();
    }
  }

  async function takeBack(names: string[]): Promise<void> {
    for (const node of names)
      for (const request of await queue.takeBack(node, worker, (entry) => parts.holds(node, entry))) {
        log.info({ node, entry: request.entry }, 'taken back: its delivery was lost');
        parts.start(request);
      }
  }

  async function loop(reader: RedisConnection, mine: () => string[], stopped: () => boolean): Promise<void> {
    let certainUntil = 0;
    let lookedMs = Number.NEGATIVE_INFINITY;
    while (!signal.aborted && !stopped()) {
      const names = mine();
      if (names.length === 0) {
        await delay(50, undefined, { signal }).catch(() => {});
        continue;
      }
      if (room() <= 0) {
        await (parts.room() > 0 ? delay(AGAIN_MS) : parts.roomAgain());
        continue;
      }
      try {
        const now = performance.now();
        if (certainUntil < doubtfulUntil && now - lookedMs >= LOOK_MS) {
          lookedMs = now;
          await takeBack(names);
          if (now >= doubtfulUntil) certainUntil = doubtfulUntil;
        }
        let taken = 0;
        if (room() < nodes.length) {
          rotation = (rotation + 1) % names.length;
          for (let step = 0; step < names.length && room() > 0; step++)
            taken += await readIfAny(reader, names[(rotation + step) % names.length]!);
          // Blocked with COUNT 1, a read may return one entry of each stream, more than there is room for: these wait in
          // line here for a moment, and go back if it gets longer.
          if (taken === 0 && !signal.aborted) await read(reader, names, 1, true);
          else if (names.length < nodes.length) await delay(2 * AGAIN_MS); // the other loops are first next time
        } else await read(reader, names, Math.floor(room() / nodes.length), true);
      } catch (error) {
        if (signal.aborted) break;
        if (isConnectionError(error)) doubt();
        const { message } = error as Error;
        // A gateway that leaves takes its empty stream with it.
        if (message.startsWith('UNBLOCKED')) log.info({ err: message }, 'a node has left');
        else log.warn({ err: message }, 'reading requests failed; again soon');
        if (message.startsWith('NOGROUP')) for (const node of names) await hasGroup(node);
        await delay(PAUSE_MS, undefined, { signal }).catch(() => {});
      }
    }
  }

  const loops = new Map<string, Promise<void>>(); // by the name of their reader

  function open(name: string, mine: () => string[], stopped: () => boolean): void {
    if (loops.has(name)) return;
    const reader = parts.openReader(name);
    const ended = loop(reader, mine, stopped).finally(async () => {
      loops.delete(name);
      await parts.closeReader(reader);
    });
    loops.set(name, ended);
  }

  function openLoops(): void {
    if (!parts.isCluster)
      open(
        'requests',
        () => nodes,
        () => false,
      );
    else
      for (const node of nodes)
        open(
          `requests-${node}`,
          () => [node],
          () => !nodes.includes(node),
        );
  }

  const ended = discover().then(async () => {
    await Promise.all(loops.values());
  });
  return {
    doubt,
    get nodes() {
      return nodes;
    },
    ended,
  };
}
