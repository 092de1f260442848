import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { Keys } from '../shared/keys.ts';
import { BLOCK_MS, type RedisConnection } from '../shared/redis.ts';
import { ENTRIES_KEPT, readEntry } from '../shared/reply-stream.ts';

/**
 * Tails this node's reply stream with one blocked XREAD for all sockets.
 *
 * The gateway makes the stream (workers append with NOMKSTREAM). After every reconnect, and whenever a read comes
 * back empty, the cursor is compared with the stream: a stream that was deleted is made again, and a cursor above
 * the stream's last id (a failover to a replica that was behind, or a slower clock) is set back. Both mean that
 * frames were missed, so `onBroken` has everything compared with the logs.
 */

/**
 * Entries of one read: as many as fill about `READ_BYTES`, as long as they were lately. A gateway that is behind then gets
 * tens of milliseconds of frames at once, and what it has for a socket goes out in one write: so it catches up.
 */
const READ_BYTES = 1_048_576;
const READ_ENTRIES = { least: 16, most: 128 }; // an entry has up to 64 KB
const LATELY = 0.1; // weight of a read in the average
const EXPIRE_MS = 600_000; // a node that is gone leaves no key for longer than this
const PAUSE_MS = 200;
const OPENED = 'opened'; // the entry that makes the stream

export interface ReplyTail {
  readonly opened: Promise<void>;
  readonly ended: Promise<void>;
  /** When a read last came back, by `performance.now()`. */
  readonly lastMs: number;
  /** The id of the last entry handed out. */
  readonly cursor: string;
}

export function tailReplies(parts: {
  node: string;
  keys: Keys;
  redis: RedisConnection;
  onFrame: (address: string, frame: string) => void;
  onBroken: (reason: string) => void;
  log: Logger;
  signal: AbortSignal;
}): ReplyTail {
  const { redis, keys, node, log, signal } = parts;
  const key = keys.replies(node);
  let cursor = '';
  let lastMs = 0;
  let checkDue = false;
  let entryBytes = READ_BYTES / READ_ENTRIES.least;
  redis.onReconnect(() => {
    checkDue = true;
  });

  /** Makes the stream and starts after what is in it. */
  async function open(): Promise<void> {
    cursor = (await redis.client.xadd(key, 'MAXLEN', '~', ENTRIES_KEPT, '*', OPENED, node)) as string;
    await redis.client.pexpire(key, EXPIRE_MS);
    lastMs = performance.now();
  }

  async function check(): Promise<void> {
    checkDue = false;
    let last: string;
    try {
      const facts = (await redis.client.xinfo('STREAM', key)) as unknown[];
      last = String(facts[facts.indexOf('last-generated-id') + 1]);
    } catch (error) {
      if (!/no such key/i.test((error as Error).message)) throw error;
      await open();
      parts.onBroken('the reply stream was gone');
      return;
    }
    if (compareStreamIds(last, cursor) >= 0) return;
    log.warn({ cursor, last }, 'the reply stream is behind the cursor; setting it back');
    cursor = last;
    parts.onBroken('the reply stream went back');
  }

  async function loop(): Promise<void> {
    let failing = false;
    while (!signal.aborted) {
      try {
        if (checkDue) await check();
        const reply = (await redis.blocked(BLOCK_MS, [
          'xread',
          'COUNT',
          Math.max(READ_ENTRIES.least, Math.min(READ_ENTRIES.most, Math.floor(READ_BYTES / entryBytes))),
          'BLOCK',
          BLOCK_MS,
          'STREAMS',
          key,
          cursor,
        ])) as [string, [string, string[]][]][] | null;
        lastMs = performance.now();
        if (failing) {
          failing = false;
          parts.onBroken('the tail was broken');
        }
        if (!reply) {
          checkDue = true;
          continue;
        }
        const entries = reply[0]![1];
        let bytes = 0;
        for (const [id, fields] of entries) {
          if (fields[0] !== OPENED) readEntry(fields, parts.onFrame);
          for (const field of fields) bytes += field.length;
          cursor = id;
        }
        entryBytes += LATELY * (bytes / entries.length - entryBytes);
      } catch (error) {
        if (signal.aborted) return;
        if (!failing) log.warn({ err: (error as Error).message }, 'the tail is broken; again soon');
        failing = true;
        checkDue = true;
        await delay(PAUSE_MS, undefined, { signal }).catch(() => {});
      }
    }
  }

  const opened = open();
  return {
    opened,
    ended: opened.then(loop, () => {}), // whoever awaits `opened` hears why
    get lastMs() {
      return lastMs;
    },
    get cursor() {
      return cursor;
    },
  };
}

/** Orders stream ids `<ms>-<seq>`. */
function compareStreamIds(a: string, b: string): number {
  const [aMs, aSeq] = a.split('-').map(Number) as [number, number];
  const [bMs, bSeq] = b.split('-').map(Number) as [number, number];
  return aMs - bMs || aSeq - bSeq;
}
