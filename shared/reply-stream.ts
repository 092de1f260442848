import type { Keys } from './keys.ts';
import type { Command } from './redis.ts';

/**
 * The per-node reply streams: the fast path from workers to sockets. An entry carries one or more frames, so that
 * everything a worker has for a node in one event-loop turn costs one XADD: a field `frames`, with a line for each address
 * and one for its frame. JSON has no line breaks, and one long value costs Redis, and whoever reads it, a fraction of what
 * many short ones do.
 *
 * An address is `<user> <messageId> <id before> <id> <s|t|e>` (start, token, end); ids hold no spaces, and "-"
 * stands for "nothing before". `id before` lets a gateway see a gap with one string comparison. Whatever is lost
 * here is healed from the log.
 *
 * Addresses that begin with "!" (no id can hold it) are for people and not for generations. Each is a field of its own:
 * `!m <user> <inbox id before> <inbox id> …` a message with all its recipients on that node; the frame lacks its id
 * `!n` a notice to everyone who is connected there
 * `!c <user> <close code> [<connection id> …]` closes a user's connections there, all or these; the frame is the reason
 */

const FRAMES = 'frames';
const FRAMES_PER_ENTRY = 64; // bounds one entry, and with it one read
const BYTES_PER_ENTRY = 65_536;
export const ENTRIES_KEPT = 10_000; // seconds of traffic; older frames are healed from the log

export type FrameKind = 's' | 't' | 'e';

/** A frame with its address, as an entry carries it. */
export type ReplyLines = string;

/** What the addresses of a generation begin with; made once for all of its frames. */
export function addressHead(user: string, messageId: string): string {
  return `${user} ${messageId} `;
}

/**
 * @param head from `addressHead`
 * @param before the id before, or ''
 * @param frame JSON as clients get it
 */
export function encodeLines(
  head: string,
  before: string,
  id: string,
  kind: FrameKind,
  frame: string,
): ReplyLines {
  return `${head}${before || '-'} ${id} ${kind}\n${frame}\n`;
}

/** What every entry begins with. NOMKSTREAM: a node that is gone must not come back as a key without an owner. */
function openEntry(keys: Keys, node: string): Command {
  return ['xadd', keys.replies(node), 'NOMKSTREAM', 'MAXLEN', '~', ENTRIES_KEPT, '*'];
}

/** The commands that publish frames to a node, few entries of bounded size. */
export function publishCommands(keys: Keys, node: string, frames: readonly ReplyLines[]): Command[] {
  const commands: Command[] = [];
  let lines = '';
  let count = 0;
  for (const frame of frames) {
    if (count === FRAMES_PER_ENTRY || lines.length > BYTES_PER_ENTRY) {
      commands.push(publishCommand(keys, node, FRAMES, lines));
      lines = '';
      count = 0;
    }
    lines += frame;
    count++;
  }
  if (count > 0) commands.push(publishCommand(keys, node, FRAMES, lines));
  return commands;
}

/** The same for few frames, as one entry, for a script that publishes: the key, and what the XADD takes after it. */
export function publishArguments(
  keys: Keys,
  node: string,
  frames: readonly ReplyLines[],
): { key: string; rest: (string | number)[] } {
  const [, key, ...rest] = publishCommand(keys, node, FRAMES, frames.join(''));
  return { key: key as string, rest };
}

/** Hands out what an entry carries, in order. */
export function readEntry(fields: string[], onFrame: (address: string, frame: string) => void): void {
  for (let index = 0; index < fields.length; index += 2) {
    const value = fields[index + 1]!;
    if (fields[index] !== FRAMES) {
      onFrame(fields[index]!, value);
      continue;
    }
    for (let from = 0; from < value.length; ) {
      const middle = value.indexOf('\n', from);
      const end = middle < 0 ? -1 : value.indexOf('\n', middle + 1);
      if (end < 0) break; // not ours
      onFrame(value.slice(from, middle), value.slice(middle + 1, end));
      from = end + 1;
    }
  }
}

/** True for addresses of people. Cheap: this is asked of every frame. */
export function isPeopleAddress(address: string): boolean {
  return address.charCodeAt(0) === 33; // '!'
}

export interface MessageRecipient {
  user: string;
  /** The inbox id before the message's own; '-' = none, '?' = not known. */
  before: string;
  id: string;
}

/** One entry, however many recipients there are on the node. */
export function publishMessageCommand(
  keys: Keys,
  node: string,
  recipients: MessageRecipient[],
  rest: string,
): Command {
  let address = '!m';
  for (const { user, before, id } of recipients) address += ` ${user} ${before} ${id}`;
  return publishCommand(keys, node, address, rest);
}

export function publishNoticeCommand(keys: Keys, node: string, frame: string): Command {
  return publishCommand(keys, node, '!n', frame);
}

/** @param connectionIds all of the user's connections when null */
export function publishCloseCommand(
  keys: Keys,
  node: string,
  user: string,
  code: number,
  connectionIds: string[] | null,
  reason: string,
): Command {
  return publishCommand(keys, node, ['!c', user, code, ...(connectionIds ?? [])].join(' '), reason);
}

function publishCommand(keys: Keys, node: string, field: string, value: string): Command {
  return [...openEntry(keys, node), field, value];
}
