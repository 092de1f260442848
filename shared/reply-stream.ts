import type { Keys } from './keys.ts';
import type { Command } from './redis.ts';

/**
 * The per-node reply streams: the fast path from workers to sockets. An entry carries one or more frames as
 * (address, frame) pairs, so that everything a worker has for a node in one event-loop turn costs one XADD.
 *
 * An address is `<user> <messageId> <id before> <id> <s|t|e>` (start, token, end); ids hold no spaces, and "-"
 * stands for "nothing before". `id before` lets a gateway see a gap with one string comparison. Whatever is lost
 * here is healed from the log.
 *
 * Addresses that begin with "!" (no id can hold it) are for people and not for generations:
 * `!m <user> <inbox id before> <inbox id> …` a message with all its recipients on that node; the frame lacks its id
 * `!n` a notice to everyone who is connected there
 * `!c <user> <close code> [<connection id> …]` closes a user's connections there, all or these; the frame is the reason
 */

const FRAMES_PER_ENTRY = 64; // bounds one entry, and with it one read
const BYTES_PER_ENTRY = 65_536;
const ENTRIES_KEPT = 10_000; // seconds of traffic; older frames are healed from the log

export type FrameKind = 's' | 't' | 'e';

export interface ReplyFrame {
  user: string;
  messageId: string;
  before: string;
  id: string;
  kind: FrameKind;
  /** JSON as clients get it. */
  frame: string;
}

export function encodeAddress({ user, messageId, before, id, kind }: ReplyFrame): string {
  return `${user} ${messageId} ${before || '-'} ${id} ${kind}`;
}

/** What every entry begins with. NOMKSTREAM: a node that is gone must not come back as a key without an owner. */
function openEntry(keys: Keys, node: string): Command {
  return ['xadd', keys.replies(node), 'NOMKSTREAM', 'MAXLEN', '~', ENTRIES_KEPT, '*'];
}

/** The commands that publish frames to a node, few entries of bounded size. */
export function publishCommands(keys: Keys, node: string, frames: ReplyFrame[]): Command[] {
  const commands: Command[] = [];
  let command: Command | null = null;
  let bytes = 0;
  for (const frame of frames) {
    if (!command || command.length >= 6 + 2 * FRAMES_PER_ENTRY || bytes > BYTES_PER_ENTRY) {
      command = openEntry(keys, node);
      commands.push(command);
      bytes = 0;
    }
    command.push(encodeAddress(frame), frame.frame);
    bytes += frame.frame.length;
  }
  return commands;
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

function publishCommand(keys: Keys, node: string, address: string, frame: string): Command {
  return [...openEntry(keys, node), address, frame];
}
