import { createHash } from 'node:crypto';
import type { Keys } from './keys.ts';
import { type Command, type RedisConnection, retrying } from './redis.ts';

/**
 * Inboxes: one stream a user, `m` → the message frame without its id. The entry id is the id on the wire.
 *
 * Delivering is one script in the recipient's slot: remember the fingerprint of sender and message id, append,
 * trim, and say who is connected. So a message enters an inbox once however often it is submitted, and a
 * connection that binds at the same moment either finds it in its first page or is named in the answer.
 *
 * Bounds: `mostMessages` and `ageMs` for the inbox, two hashes of `FINGERPRINTS` for what was seen, `DEVICES`
 * cursors. Acknowledged messages stay until then: another device may not have them. An inbox without news expires
 * whole after `ageMs`; its highest id, and that of what was dropped before, stay with the cursors for as long
 * again, so that a device can be told.
 */

const FINGERPRINTS = 2_000; // in each of the two hashes, about 40 to 100 bytes each
const FINGERPRINT_MS = 24 * 3_600_000; // a message id is remembered at least so long, short of so many messages
const DEVICES = 32;
export const INBOX_PAGE = 50; // messages a read may return; at 16 KB each 0.8 MB

export interface InboxEntry {
  id: string;
  /** JSON without its first part: see `encodeMessage`. */
  rest: string;
}

export interface MessageContents {
  messageId: string;
  from: string;
  group?: string;
  contents: string;
  sentAt: number;
}

export interface InboxLimits {
  mostMessages: number;
  ageMs: number;
}

export interface Delivered {
  id: string;
  /** The id before it in the inbox; '-' when there is none, '?' when the message was there already. */
  before: string;
  /** The recipient's connections, JSON, ghosts included. */
  connections: string[];
}

/** The part of a message frame that is the same for every recipient. */
export function encodeRest(message: MessageContents): string {
  return JSON.stringify(message).slice(1);
}

/** The frame that one recipient gets. Ids hold nothing that JSON would escape. */
export function encodeMessage(id: string, rest: string): string {
  return `{"type":"message","id":"${id}",${rest}`;
}

const INBOX_ID = /^(\d{1,15})(?:-(\d{1,15}))?$/;

/** An inbox id as clients send it (`<ms>` means `<ms>-0`), or null. */
export function parseInboxId(text: string): string | null {
  const match = INBOX_ID.exec(text);
  return match ? `${Number(match[1])}-${Number(match[2] ?? 0)}` : null;
}

/** Orders inbox ids, `<ms>-<seq>`; '' is below every id. */
export function compareInboxIds(a: string, b: string): number {
  if (a === b) return 0;
  if (a === '') return -1;
  if (b === '') return 1;
  const aDash = a.indexOf('-');
  const bDash = b.indexOf('-');
  return (
    Number(a.slice(0, aDash)) - Number(b.slice(0, bDash)) ||
    Number(a.slice(aDash + 1)) - Number(b.slice(bDash + 1))
  );
}

export function createInboxes({
  redis,
  keys,
  limits,
}: {
  redis: RedisConnection;
  keys: Keys;
  limits: InboxLimits;
}) {
  return {
    /** The command that delivers to one recipient; its reply is read by `readDelivered`. Safe to repeat. */
    deliverCommand(user: string, message: MessageContents, rest: string): Command {
      const fingerprint = createHash('sha1')
        .update(`${message.from} ${message.messageId}`)
        .digest('base64url')
        .slice(0, 16); // 96 bits
      return redis.scriptCommand(
        'deliver',
        [
          keys.inbox(user),
          keys.seen(user),
          keys.seenBefore(user),
          keys.cursors(user),
          keys.connections(user),
        ],
        [fingerprint, rest, limits.mostMessages, limits.ageMs, FINGERPRINTS, FINGERPRINT_MS],
      );
    },

    readDelivered(reply: unknown): Delivered {
      const [id, before, connections] = reply as [string, string, string[]];
      return { id, before, connections };
    },

    /** A page after an id ('' = from the start). `dropped` is the id up to which messages after it were dropped, or ''. */
    async read(user: string, after: string): Promise<{ dropped: string; entries: InboxEntry[] }> {
      const [, dropped, page] = (await retrying(() =>
        redis.script('read_inbox', [keys.inbox(user), keys.cursors(user)], [after, INBOX_PAGE, limits.ageMs]),
      )) as [string, string, RawEntry[]];
      return { dropped, entries: page.map(readInboxEntry) };
    },

    /** Moves a device's cursor forward. */
    async ack(user: string, device: string, id: string): Promise<void> {
      await retrying(() =>
        redis.script(
          'ack_inbox',
          [keys.cursors(user), keys.inbox(user)],
          [device, id, DEVICES, limits.ageMs],
        ),
      );
    },

    /** The command for the id at the top of an inbox; its reply is read by `readTop`. */
    topCommand(user: string): Command {
      return ['xrevrange', keys.inbox(user), '+', '-', 'COUNT', 1];
    },

    readTop(reply: unknown): string {
      return (reply as RawEntry[])[0]?.[0] ?? '';
    },

    /** True for the id of a message that is not kept any more. */
    isTooOld: (id: string): boolean => Number(id.split('-')[0]) <= Date.now() - limits.ageMs,

    ageMs: limits.ageMs,
  };
}

export type Inboxes = ReturnType<typeof createInboxes>;

export type RawEntry = [id: string, fields: string[]];

export function readInboxEntry([id, fields]: RawEntry): InboxEntry {
  return { id, rest: fields[1]! };
}
