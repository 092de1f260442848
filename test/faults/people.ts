import { setTimeout as delay } from 'node:timers/promises';
import { WebSocket } from 'ws';
import { compareInboxIds } from '../../shared/inbox.ts';
import type { ClientFrameOf, ServerFrame, ServerFrameOf } from '../../shared/protocol.ts';
import { type FaultClass, type FaultContext, type Stage, type StageOptions, until } from './stage.ts';
import { record, type Tally } from './tally.ts';

/**
 * Faults while people write to each other: users on three gateways send direct and group messages, one after the
 * other, each until it is confirmed. In the end everybody must have every message once, by messageId, and each
 * sender's in the order in which they were sent.
 */

const GROUPS = 10;
const GROUP_SHARE = 0.15; // of the messages that go to a group
const RETRY_MS = 50;
const RETRY_MAX_MS = 1_000;
const CONFIRM_MS = 3_000; // a message that is not confirmed for so long: hang up and try elsewhere

const PEOPLE: StageOptions = {
  env: { LOG_LEVEL: 'info' },
  gatewayEnv: { INBOX_MESSAGES: '100000' },
  gateways: 3,
  workers: 0,
};

class Person {
  readonly user: string;
  private readonly urls: () => string[];
  private readonly tally: Tally;
  private readonly random: () => number;
  private socket: WebSocket | null = null;
  private stopped = false;
  private ready = false;
  private lastId = '';
  private sending: { frame: ClientFrameOf<'send'>; confirmed: () => void } | null = null;
  private sentMs = 0;
  private count = 0;
  /** `from messageId` of everything received. */
  readonly received = new Set<string>();
  private readonly lastOf = new Map<string, number>();
  /** What was confirmed. */
  readonly sent: { messageId: string; to: ClientFrameOf<'send'>['to'] }[] = [];
  private readonly looping: Promise<void>;

  constructor(user: string, parts: { urls: () => string[]; tally: Tally; random: () => number }) {
    this.user = user;
    this.urls = parts.urls;
    this.tally = parts.tally;
    this.random = parts.random;
    this.looping = this.loop();
  }

  get isReady(): boolean {
    return this.ready;
  }

  /** Sends until it is confirmed, over as many connections as it takes. */
  send(to: ClientFrameOf<'send'>['to']): Promise<void> {
    const number = ++this.count;
    const frame: ClientFrameOf<'send'> = {
      type: 'send',
      messageId: `m${number}`,
      to,
      contents: String(number),
    };
    return new Promise((resolve) => {
      this.sending = {
        frame,
        confirmed: () => {
          this.sending = null;
          this.sent.push({ messageId: frame.messageId, to });
          resolve();
        },
      };
      this.write();
    });
  }

  private write(): void {
    if (!this.sending || !this.ready) return;
    this.sentMs = Date.now();
    this.socket?.send(JSON.stringify(this.sending.frame));
  }

  private async loop(): Promise<void> {
    for (let attempt = 0; !this.stopped; attempt++) {
      const urls = this.urls();
      if (urls.length > 0) {
        const wasReady = await this.connect(urls[Math.floor(this.random() * urls.length)]!);
        if (wasReady) attempt = 0;
      }
      if (this.stopped) return;
      this.tally.reconnects++;
      await delay(Math.min(RETRY_MAX_MS, RETRY_MS * 2 ** attempt) * (0.5 + this.random()));
    }
  }

  private connect(url: string): Promise<boolean> {
    return new Promise((resolve) => {
      let wasReady = false;
      const socket = new WebSocket(`${url}?userId=${this.user}`);
      this.socket = socket;
      const watch = setInterval(() => {
        if (this.sending && this.ready && Date.now() - this.sentMs > CONFIRM_MS) socket.terminate();
      }, 500);
      const dialling = setTimeout(() => socket.terminate(), CONFIRM_MS);
      socket.on('open', () =>
        socket.send(
          JSON.stringify({
            type: 'init',
            userId: this.user,
            ...(this.lastId ? { inboxAfter: this.lastId } : {}),
          }),
        ),
      );
      socket.on('message', (data) => {
        const frame = JSON.parse(data.toString()) as ServerFrame;
        if (frame.type === 'ready') {
          clearTimeout(dialling);
          wasReady = true;
          this.ready = true;
          this.write();
        } else this.take(frame);
      });
      socket.on('error', () => {});
      socket.on('close', () => {
        clearInterval(watch);
        clearTimeout(dialling);
        this.ready = false;
        resolve(wasReady);
      });
    });
  }

  private take(frame: ServerFrame): void {
    switch (frame.type) {
      case 'message':
        this.takeMessage(frame);
        return;
      case 'sent':
        if (this.sending?.frame.messageId === frame.messageId) this.sending.confirmed();
        return;
      case 'rejected': {
        if (this.sending?.frame.messageId !== frame.messageId) return;
        if (!frame.temporary)
          record(this.tally, 'errors', `${this.user} ${frame.messageId}: rejected ${frame.code}`);
        setTimeout(() => this.write(), 200);
        return;
      }
      case 'inbox':
        record(this.tally, 'lost', `${this.user}: the inbox was dropped up to ${frame.upTo}`);
        return;
      default:
    }
  }

  private takeMessage(frame: ServerFrameOf<'message'>): void {
    const name = `${this.user} ← ${frame.from} ${frame.messageId}`;
    if (compareInboxIds(frame.id, this.lastId) <= 0)
      record(this.tally, 'doubled', `${name}: id ${frame.id} after ${this.lastId}`);
    else this.lastId = frame.id;
    const key = `${frame.from} ${frame.messageId}`;
    if (this.received.has(key)) {
      record(this.tally, 'doubled', name);
      return;
    }
    this.received.add(key);
    const number = Number(frame.contents);
    if (number <= (this.lastOf.get(frame.from) ?? 0))
      record(this.tally, 'wrong', `${name}: after ${this.lastOf.get(frame.from)} of the same sender`);
    this.lastOf.set(frame.from, number);
  }

  async stop(): Promise<void> {
    this.stopped = true;
    this.socket?.terminate();
    await this.looping;
  }
}

/** Has people write while faults are injected, and compares what everybody has with what was confirmed. */
async function amongPeople(
  context: FaultContext,
  stage: Stage,
  options: { inject: (round: number) => Promise<void>; pauseMs: number; rounds?: number; settleMs?: number },
): Promise<void> {
  const { tally, random, short } = context;
  const run = `p${Date.now().toString(36)}`;
  const count = short ? 45 : Math.max(200, context.users);
  const people = Array.from(
    { length: count },
    (_, index) => new Person(`${run}-${index}`, { urls: stage.urls, tally, random }),
  );
  const { look, keys } = stage.stack;
  const groups = Array.from({ length: GROUPS }, (_, index) => ({
    group: `${run}-g${index}`,
    members: people.filter((_, at) => at % GROUPS === index),
  }));
  for (const { group, members } of groups)
    await look.client.sadd(keys.group(group), ...members.map((person) => person.user));

  let writing = true;
  let confirmed = 0;
  const writers = people.map(async (person, at) => {
    while (writing) {
      const to =
        random() < GROUP_SHARE
          ? { group: groups[at % GROUPS]!.group }
          : { user: people[Math.floor(random() * people.length)]!.user };
      await person.send(to);
      confirmed++;
      await delay((short ? 60 : 150) * (0.5 + random()));
    }
  });
  try {
    await until('everybody is connected', 30_000, () => people.every((person) => person.isReady));
    await until('messages flow', 10_000, () => confirmed > count);
    const end = Date.now() + context.seconds * 1_000;
    let round = 0;
    do {
      await options.inject(++round);
      tally.faults++;
      await delay(options.pauseMs * (0.5 + random()));
    } while (Date.now() < end && round < (options.rounds ?? Number.POSITIVE_INFINITY));
    writing = false;
    const settled = new AbortController();
    await Promise.race([
      Promise.all(writers).finally(() => settled.abort()),
      // Unless they have settled: this must not speak up while a later class runs.
      delay(options.settleMs ?? 45_000, undefined, { signal: settled.signal }).then(
        () => record(tally, 'neverEnded', 'messages were not confirmed in time'),
        () => {},
      ),
    ]);

    // Everything that was confirmed must be with everyone it was for, and nothing else.
    const expected = new Map(people.map((person) => [person.user, new Set<string>()]));
    for (const person of people)
      for (const { messageId, to } of person.sent) {
        tally.generations++;
        const recipients =
          'user' in to
            ? [to.user]
            : groups
                .find(({ group }) => group === to.group)!
                .members.map(({ user }) => user)
                .filter((user) => user !== person.user);
        for (const user of recipients) expected.get(user)!.add(`${person.user} ${messageId}`);
      }
    const missing = () =>
      people.reduce(
        (sum, person) =>
          sum + [...expected.get(person.user)!].filter((key) => !person.received.has(key)).length,
        0,
      );
    const began = Date.now();
    await until('everything has arrived', 30_000, () => missing() === 0).catch(() => {});
    for (const person of people) {
      for (const key of expected.get(person.user)!)
        if (!person.received.has(key)) record(tally, 'lost', `${person.user} lacks ${key}`);
      for (const key of person.received)
        if (!expected.get(person.user)!.has(key)) record(tally, 'wrong', `${person.user} has ${key}`);
    }
    const received = people.reduce((sum, person) => sum + person.received.size, 0);
    tally.notes.push(
      `${count} people, ${tally.generations} messages, ${received} received; all there ${Date.now() - began} ms after the last`,
    );
  } finally {
    writing = false;
    await Promise.all(people.map((person) => person.stop()));
  }
}

/** SIGKILL of one of three gateways while messages flow; it comes back under the same id. */
export const peopleGatewayKilled: FaultClass = {
  name: 'people-gateway-killed',
  async run(context) {
    const stage = await context.stage(PEOPLE);
    await amongPeople(context, stage, {
      async inject() {
        const gateways = stage.gateways();
        const victim = gateways[Math.floor(context.random() * gateways.length)]!;
        await victim.kill('SIGKILL');
        await delay(1_000 * context.random());
        await stage.restartGateway(victim);
      },
      pauseMs: 500,
      ...(context.short ? { rounds: 1 } : {}),
    });
  },
};

/** A gateway frozen beyond its lease and thawed: what it still does late must not double or reorder anything. */
export const peopleGatewayFrozen: FaultClass = {
  name: 'people-gateway-frozen',
  async run(context) {
    const stage = await context.stage(PEOPLE);
    await amongPeople(context, stage, {
      async inject() {
        const gateways = stage.gateways();
        const victim = gateways[Math.floor(context.random() * gateways.length)]!;
        await victim.kill('SIGSTOP');
        await delay(8_000); // the lease of a gateway is 6 s
        await victim.kill('SIGCONT');
      },
      pauseMs: 1_000,
      ...(context.short ? { rounds: 1 } : {}),
    });
  },
};

/** The reply streams are deleted and trimmed under the tails: the inboxes have everything. */
export const peopleRepliesLost: FaultClass = {
  name: 'people-replies-lost',
  async run(context) {
    const stage = await context.stage(PEOPLE);
    await amongPeople(context, stage, {
      async inject(round) {
        const { look, keys } = stage.stack;
        for (const { node } of stage.gateways()) {
          if (round % 2 === 1) await look.client.del(keys.replies(node));
          else
            for (let times = 0; times < 50; times++) {
              await look.client.xtrim(keys.replies(node), 'MAXLEN', 0);
              await delay(5);
            }
        }
      },
      pauseMs: 700,
      ...(context.short ? { rounds: 4 } : {}),
    });
  },
};

/** SIGKILL of Redis, and a restart from its append-only file. */
export const peopleRedisKilled: FaultClass = {
  name: 'people-redis-killed',
  async run(context) {
    const stage = await context.stage(PEOPLE);
    await amongPeople(context, stage, {
      async inject() {
        await stage.stack.redis.kill('SIGKILL');
        await delay(300);
        await stage.stack.redis.restart();
      },
      pauseMs: 3_000,
      ...(context.short ? { rounds: 1 } : {}),
    });
  },
};
