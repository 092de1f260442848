import { setImmediate as turn } from 'node:timers/promises';
import type { Logger } from 'pino';
import { readRefusal, refusalCommand } from '../shared/access.ts';
import {
  compareInboxIds,
  encodeMessage,
  INBOX_PAGE,
  type InboxEntry,
  type Inboxes,
  type RawEntry,
  readInboxEntry,
} from '../shared/inbox.ts';
import type { Keys } from '../shared/keys.ts';
import {
  CONNECTIONS_LIFE_MS,
  type ConnectionEntry,
  type LiveNodes,
  MOST_CONNECTIONS,
  parseConnection,
} from '../shared/presence.ts';
import { CLOSE } from '../shared/protocol.ts';
import {
  type Command,
  isConnectionError,
  type RedisConnection,
  retrying,
  takeAnswers,
} from '../shared/redis.ts';
import { publishCloseCommand } from '../shared/reply-stream.ts';

/**
 * Brings messages from people to the connections of this node: in the order of the inbox, without gaps.
 *
 * A mailbox is one bound connection. Its position is the inbox id of the last message sent. A message from the
 * reply stream names the id before it: not above the position → send; its own id not above the position → a
 * double, drop; else → a gap, read the inbox. States:
 *
 *   binding  at the door; it is listed already, so that a close or a message meanwhile is not missed
 *   reading  messages come from the inbox, a page at a time; what comes live only says that there is more
 *   live     messages are passed through as they come
 *   stalled  the client reads too slowly: nothing is pushed, nothing is kept; goes to reading when it drains
 *   closed
 *
 * Cost of an idle connection: one small object here, one hash field in Redis, and a look of the sweep: so many a
 * second whatever there are, each compares the inbox with the position (an append whose live entry was lost), keeps
 * the presence entry, and asks whether the user has been banned. A message to very many is handed out in
 * slices, between which the event loop runs.
 */

const SLICE = 500; // recipients handed out in one turn: about 3 ms
const MOST_PENDING_BYTES = 32 * 1024 * 1024; // entries that wait for their slices; beyond it messages are read from the inboxes
const SWEEP_BATCH = 250; // connections a look compares in one round trip
const SWEEP_EVERY_MS = 1_000;
const LOOK_MS = 5_000; // a connection is not looked at more often
const KEEP_MS = 1_200_000; // presence entries are written again this often, well below their life
const LEAVE_BATCH = 500;
const MOST_LEAVING = 100_000; // presence entries to remove that wait for Redis, about 20 MB; more would be ghosts
const FRESH_ENTRY_MS = 15_000; // an entry counts as live for so long although its gateway is not known here

/** What a mailbox needs of its client. */
export interface MailboxOwner {
  readonly userId: string;
  readonly device: string;
  readonly connectionId: string;
  readonly slow: boolean;
  sendText(text: string): void;
  closeWith(code: number, reason: string): void;
}

export interface Mailbox {
  readonly owner: MailboxOwner;
  /** Inbox id of the last message sent, '' before any. */
  position: string;
  state: 'binding' | 'reading' | 'live' | 'stalled' | 'closed';
  more: boolean;
  /** Times since this process started, ms: small integers cost nothing, where dates would each be an object. */
  lookedMs: number;
  keptMs: number;
  /** The same by the clock that others read: it goes into the presence entry. */
  readonly openedMs: number;
}

export type Opened =
  | { state: 'bound'; start(): void }
  | { state: 'refused'; code: 'banned' | 'locked' | 'forbidden'; message: string; close: number };

/** `any` number of connections, the `newest` only, or at most so many. */
export type DevicePolicy = 'any' | 'newest' | number;

export function createMailboxes(parts: {
  node: string;
  instance: string;
  redis: RedisConnection;
  keys: Keys;
  inboxes: Inboxes;
  live: () => LiveNodes;
  devicePolicy: DevicePolicy;
  /** Closes what else the user has here. */
  closeOthers(user: string, code: number, reason: string): void;
  counters: { delivered(count: number): void; gap(): void };
  log: Logger;
}) {
  const { node, instance, redis, keys, inboxes, live, counters, log } = parts;
  const { devicePolicy } = parts;
  const replacesItself = typeof devicePolicy === 'number' ? 1 : 0; // a named device
  const most = devicePolicy === 'newest' ? -1 : devicePolicy === 'any' ? MOST_CONNECTIONS : devicePolicy;
  /** One mailbox, or several, for each user: most users have one. */
  const users = new Map<string, Mailbox | Mailbox[]>();
  let count = 0;
  let stopped = false;
  const startedMs = Date.now();
  const startedAt = performance.now();
  const sinceStart = () => Math.round(performance.now() - startedAt);

  function* everyone(): Generator<Mailbox> {
    for (const there of users.values()) {
      if (Array.isArray(there)) yield* there;
      else yield there;
    }
  }

  function list(mailbox: Mailbox): void {
    const user = mailbox.owner.userId;
    const there = users.get(user);
    users.set(user, !there ? mailbox : Array.isArray(there) ? [...there, mailbox] : [there, mailbox]);
    count++;
  }

  function unlist(mailbox: Mailbox): void {
    const user = mailbox.owner.userId;
    count--;
    const there = users.get(user);
    if (there === mailbox) users.delete(user);
    else if (Array.isArray(there)) {
      const rest = there.filter((other) => other !== mailbox);
      users.set(user, rest.length === 1 ? rest[0]! : rest);
    }
  }

  function of(user: string): Mailbox[] {
    const there = users.get(user);
    return !there ? [] : Array.isArray(there) ? there : [there];
  }

  function entryOf({ owner, openedMs }: Mailbox): string {
    const since = startedMs + openedMs;
    return JSON.stringify({ node, instance, device: owner.device, since } satisfies ConnectionEntry);
  }

  // ------------------------------------------------------------------------------------------ door and presence

  async function open(
    owner: MailboxOwner,
    inboxAfter: string,
  ): Promise<{ mailbox: Mailbox; opened: Opened }> {
    const now = sinceStart();
    const mailbox: Mailbox = {
      owner,
      position: '',
      state: 'binding',
      more: false,
      lookedMs: now,
      keptMs: now,
      openedMs: Date.now() - startedMs,
    };
    list(mailbox);
    const { userId: user, connectionId } = owner;
    let reply: unknown[];
    try {
      reply = (await retrying(() =>
        redis.script(
          'bind',
          [keys.access(user), keys.connections(user), keys.cursors(user), keys.inbox(user)],
          [
            connectionId,
            entryOf(mailbox),
            owner.device,
            live().list,
            most,
            CONNECTIONS_LIFE_MS,
            inboxAfter,
            INBOX_PAGE,
            FRESH_ENTRY_MS,
            replacesItself,
            inboxes.ageMs,
          ],
        ),
      )) as unknown[];
    } catch (error) {
      close(mailbox);
      throw error;
    }
    const refuse = (code: 'banned' | 'locked' | 'forbidden', message: string, closeCode: number) => {
      close(mailbox, false);
      return { mailbox, opened: { state: 'refused', code, message, close: closeCode } as const };
    };
    switch (reply[0]) {
      case 'banned':
        return refuse('banned', 'This account is banned.', CLOSE.banned);
      case 'locked':
        return refuse(
          'locked',
          `This account is locked until ${new Date(Number(reply[1])).toISOString()}.`,
          CLOSE.banned,
        );
      case 'full':
        return refuse('forbidden', `at most ${most} devices may be connected`, CLOSE.tooManyConnections);
      default:
    }
    const [, start, dropped, page, replaced] = reply as [string, string, string, RawEntry[], string[]];
    if (replaced.length > 0) void replace(user, replaced); // its gateway may be out of reach: nobody waits for that
    if (isClosed(mailbox)) leave(mailbox); // it went while it was being bound: `close` came before the entry
    return {
      mailbox,
      opened: {
        state: 'bound',
        start() {
          if (isClosed(mailbox)) return;
          mailbox.position = start;
          mailbox.state = 'reading';
          const entries = page.map(readInboxEntry);
          tellDropped(mailbox, dropped);
          if (!sendEntries(mailbox, entries)) return;
          if (entries.length === INBOX_PAGE || mailbox.more) void read(mailbox);
          else mailbox.state = 'live';
        },
      },
    };
  }

  /** Closes the connections that a newer one took the place of, wherever they are. */
  async function replace(user: string, replaced: string[]): Promise<void> {
    const byNode = new Map<string, string[]>();
    for (let index = 0; index < replaced.length; index += 2) {
      const { node } = parseConnection(replaced[index + 1]!);
      const ids = byNode.get(node);
      if (ids) ids.push(replaced[index]!);
      else byNode.set(node, [replaced[index]!]);
    }
    const orders = [...byNode].map(([node, ids]) =>
      publishCloseCommand(keys, node, user, CLOSE.replaced, ids, 'replaced by a newer login'),
    );
    await retrying(async () => {
      for (const [error] of await redis.batch(orders)) if (error) throw error;
    }).catch((error: Error) =>
      log.warn({ err: error.message }, 'replaced connections are closed by the sweep'),
    );
  }

  function close(mailbox: Mailbox, hasEntry = true): void {
    if (mailbox.state === 'closed') return;
    mailbox.state = 'closed';
    unlist(mailbox);
    if (hasEntry) leave(mailbox);
  }

  /**
   * Presence entries to remove, collected for a moment: many sockets close together. What Redis does not take waits for
   * the sweep: our lease is renewed as soon as Redis is back, and would keep such an entry alive.
   */
  let leaving: Command[] = [];
  let leaveTimer: NodeJS.Timeout | null = null;
  let left: Promise<void> = Promise.resolve();
  function leave({ owner }: Mailbox): void {
    if (leaving.length >= MOST_LEAVING) return; // the first ones are of sockets that were bound before the outage
    leaving.push(['hdel', keys.connections(owner.userId), owner.connectionId]);
    if (leaveTimer) return;
    leaveTimer = setTimeout(flushLeaving, 10);
    leaveTimer.unref();
  }
  function flushLeaving(): void {
    if (leaveTimer) clearTimeout(leaveTimer);
    leaveTimer = null;
    left = left.then(removeEntries);
  }
  async function removeEntries(): Promise<void> {
    const commands = leaving;
    leaving = [];
    let refusal: Error | null = null;
    for (let from = 0; from < commands.length; from += LEAVE_BATCH) {
      const batch = commands.slice(from, from + LEAVE_BATCH);
      for (const [index, [error]] of (await redis.batch(batch)).entries()) {
        if (!error) continue;
        if (isConnectionError(error)) leaving.push(batch[index]!);
        else refusal = error;
      }
    }
    if (refusal) log.warn({ err: refusal.message }, 'presence entries were not removed');
  }

  // -------------------------------------------------------------------------------------------------- messages

  /** Not a bare comparison: the state changes while others wait. */
  function isClosed(mailbox: Mailbox): boolean {
    return mailbox.state === 'closed' || stopped;
  }

  function tellDropped(mailbox: Mailbox, dropped: string): void {
    if (dropped === '' || compareInboxIds(dropped, mailbox.position) <= 0) return;
    mailbox.owner.sendText(JSON.stringify({ type: 'inbox', dropped: true, upTo: dropped }));
    mailbox.position = dropped; // nothing is left below it; and it is told once
  }

  /** Sends entries while the client keeps up. False when it stalled or closed. */
  function sendEntries(mailbox: Mailbox, entries: InboxEntry[]): boolean {
    const { owner } = mailbox;
    let sent = 0;
    for (const { id, rest } of entries) {
      if (isClosed(mailbox)) break;
      if (owner.slow) {
        mailbox.state = 'stalled';
        break;
      }
      owner.sendText(encodeMessage(id, rest));
      mailbox.position = id;
      sent++;
    }
    counters.delivered(sent);
    return mailbox.state === 'reading' && !stopped;
  }

  async function read(mailbox: Mailbox): Promise<void> {
    mailbox.state = 'reading';
    try {
      for (;;) {
        mailbox.more = false;
        const { dropped, entries } = await inboxes.read(mailbox.owner.userId, mailbox.position);
        if (isClosed(mailbox)) return;
        tellDropped(mailbox, dropped);
        if (!sendEntries(mailbox, entries)) return;
        if (entries.length < INBOX_PAGE && !mailbox.more) {
          mailbox.state = 'live';
          return;
        }
      }
    } catch (error) {
      log.warn({ err: (error as Error).message, user: mailbox.owner.userId }, 'inbox not read; again soon');
      if (isClosed(mailbox)) return;
      mailbox.state = 'live'; // the next message, or the sweep, comes back here
    }
  }

  function take(mailbox: Mailbox, before: string, id: string, rest: string): void {
    switch (mailbox.state) {
      case 'live':
        if (compareInboxIds(id, mailbox.position) <= 0) return; // a double
        if (
          before === mailbox.position ||
          before === '-' ||
          (before !== '?' && compareInboxIds(before, mailbox.position) <= 0)
        ) {
          if (mailbox.owner.slow) {
            mailbox.state = 'stalled';
            return;
          }
          mailbox.owner.sendText(encodeMessage(id, rest));
          mailbox.position = id;
          counters.delivered(1);
        } else {
          counters.gap();
          void read(mailbox);
        }
        return;
      case 'binding':
      case 'reading':
        mailbox.more = true;
        return;
      case 'stalled':
      case 'closed':
        return;
      default:
        mailbox.state satisfies never;
    }
  }

  // ------------------------------------------------------------------------------- entries of the reply stream

  interface Pending {
    address: string;
    frame: string;
    /** Where to go on: in the address, or in `everyone`. */
    at: number;
    /** Who a notice goes to. */
    everyone: Mailbox[] | null;
  }
  const pending: Pending[] = [];
  let pendingBytes = 0;
  let working = false;
  let overflowed = false;

  /** Hands out the next slice of an entry. True when it is done. */
  function handOut(entry: Pending): boolean {
    const { address, frame } = entry;
    if (entry.everyone) {
      const end = Math.min(entry.at + SLICE, entry.everyone.length);
      for (; entry.at < end; entry.at++) {
        const mailbox = entry.everyone[entry.at]!;
        if (mailbox.state !== 'closed' && mailbox.state !== 'binding') mailbox.owner.sendText(frame);
      }
      return entry.at >= entry.everyone.length;
    }
    for (let slice = SLICE; slice > 0 && entry.at < address.length; slice--) {
      const a = address.indexOf(' ', entry.at);
      const b = address.indexOf(' ', a + 1);
      let end = address.indexOf(' ', b + 1);
      if (end < 0) end = address.length;
      const there = users.get(address.slice(entry.at, a));
      if (there) {
        const before = address.slice(a + 1, b);
        const id = address.slice(b + 1, end);
        if (Array.isArray(there)) for (const mailbox of there) take(mailbox, before, id, frame);
        else take(there, before, id, frame);
      }
      entry.at = end + 1;
    }
    return entry.at >= address.length;
  }

  async function work(): Promise<void> {
    working = true;
    while (pending.length > 0 && !stopped) {
      const entry = pending[0]!;
      if (handOut(entry)) {
        pending.shift();
        pendingBytes -= entry.address.length + entry.frame.length;
      }
      await turn();
    }
    working = false;
    if (overflowed) {
      overflowed = false;
      void lookAtAll();
    }
  }

  function onEntry(address: string, frame: string): void {
    const kind = address[1];
    if (kind === 'c') {
      closeUser(address, frame);
      return;
    }
    const entry: Pending =
      kind === 'n'
        ? { address, frame, at: 0, everyone: [...everyone()] }
        : { address, frame, at: '!m '.length, everyone: null };
    if (!working && handOut(entry)) return;
    if (pendingBytes > MOST_PENDING_BYTES) {
      overflowed = true; // the inboxes have it, unless it is a notice
      return;
    }
    pending.push(entry);
    pendingBytes += address.length + frame.length;
    if (!working) void work();
  }

  function closeUser(address: string, reason: string): void {
    const [, user, code, ...connectionIds] = address.split(' ');
    for (const mailbox of of(user!))
      if (connectionIds.length === 0 || connectionIds.includes(mailbox.owner.connectionId))
        mailbox.owner.closeWith(Number(code), reason);
    if (connectionIds.length === 0) parts.closeOthers(user!, Number(code), reason);
  }

  // ----------------------------------------------------------------------------------------------------- sweep

  /** Returns why some could not be looked at, or null. */
  async function look(batch: Mailbox[]): Promise<Error | null> {
    const now = sinceStart();
    const positions = batch.map(({ position }) => position);
    const commands = batch.flatMap((mailbox): Command[] => {
      const { userId, connectionId } = mailbox.owner;
      mailbox.lookedMs = now;
      return [
        ['hexists', keys.connections(userId), connectionId],
        refusalCommand(keys, userId),
        inboxes.topCommand(userId),
      ];
    });
    const replies = await redis.batch(commands);
    const keep: Mailbox[] = [];
    const answers = batch.map((_, index) => {
      const three = replies.slice(index * 3, index * 3 + 3);
      return three.find(([error]) => error)?.[0] ?? three.map(([, value]) => value);
    });
    const failure = takeAnswers(answers, ([listed, access, entries], index) => {
      const mailbox = batch[index]!;
      if (isClosed(mailbox) || mailbox.state === 'binding') return;
      const refusal = readRefusal(access);
      if (refusal) {
        mailbox.owner.closeWith(CLOSE.banned, refusal.code);
        return;
      }
      if (listed === 0 || now - mailbox.keptMs > KEEP_MS) keep.push(mailbox);
      if (mailbox.state === 'stalled' && !mailbox.owner.slow) void read(mailbox);
      else if (mailbox.state === 'live') {
        const top = inboxes.readTop(entries);
        const ahead = compareInboxIds(top, mailbox.position);
        if (ahead > 0) {
          counters.gap();
          void read(mailbox);
        } else if (
          ahead < 0 &&
          mailbox.position === positions[index] &&
          !inboxes.isTooOld(mailbox.position)
        ) {
          // A failover took what was sent last: what comes now may have lower ids, by a clock that is behind.
          mailbox.position = top;
        }
      }
    });
    if (keep.length === 0) return failure;
    const kept = await redis.batch(
      keep.map((mailbox) =>
        redis.scriptCommand(
          'keep_connection',
          [keys.connections(mailbox.owner.userId)],
          [mailbox.owner.connectionId, entryOf(mailbox), most, CONNECTIONS_LIFE_MS, replacesItself],
        ),
      ),
    );
    const notKept = takeAnswers(
      kept.map(([error, value]) => error ?? value),
      (value, index) => {
        const mailbox = keep[index]!;
        mailbox.keptMs = now;
        if (isClosed(mailbox)) leave(mailbox);
        else if (value === 0) mailbox.owner.closeWith(CLOSE.replaced, 'replaced by a newer login');
      },
    );
    return failure ?? notKept;
  }

  let ring = everyone();
  let looking = false;

  /** Looks at the connections that were not looked at for longest, a bounded number. */
  async function sweep(most = SWEEP_BATCH * 2): Promise<void> {
    if (looking || stopped) return;
    looking = true;
    try {
      let left = Math.min(most, count);
      let failure: Error | null = null;
      while (left > 0 && !stopped) {
        const batch: Mailbox[] = [];
        while (batch.length < SWEEP_BATCH && left > 0) {
          left--;
          let next = ring.next();
          if (next.done) {
            ring = everyone();
            next = ring.next();
            if (next.done) break;
          }
          if (sinceStart() - next.value.lookedMs >= LOOK_MS) batch.push(next.value);
        }
        if (batch.length > 0) failure = (await look(batch)) ?? failure;
      }
      if (failure) throw failure;
    } finally {
      looking = false;
    }
  }

  /** After the tail was broken: every connection is compared with its inbox, batch after batch. */
  async function lookAtAll(): Promise<void> {
    const listed = [...everyone()];
    try {
      let failure: Error | null = null;
      for (let from = 0; from < listed.length && !stopped; from += SWEEP_BATCH)
        failure = (await look(listed.slice(from, from + SWEEP_BATCH))) ?? failure;
      if (failure) throw failure;
    } catch (error) {
      log.warn({ err: (error as Error).message }, 'inboxes not compared; the sweep goes on');
    }
  }

  const sweeping = setInterval(() => {
    if (!redis.isReady()) return;
    if (leaving.length > 0) flushLeaving();
    sweep().catch((error: Error) => log.warn({ err: error.message }, 'sweep of the inboxes; again soon'));
  }, SWEEP_EVERY_MS);
  sweeping.unref();

  return {
    /**
     * Lets a connection in, or not. The caller answers `ready` and calls `start` in the same turn.
     * @throws an error of Redis; then the mailbox is closed
     */
    open,
    close,
    onEntry,
    lookAtAll,
    /** The client has read what was buffered for it. */
    onDrain(mailbox: Mailbox): void {
      if (mailbox.state === 'stalled' && !mailbox.owner.slow) void read(mailbox);
    },
    /** Connections. */
    get size(): number {
      return count;
    },
    /** Different users among them. */
    get users(): number {
      return users.size;
    },
    async stop(): Promise<void> {
      stopped = true;
      clearInterval(sweeping);
      flushLeaving();
      await left;
    },
  };
}

export type Mailboxes = ReturnType<typeof createMailboxes>;
