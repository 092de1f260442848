import { randomUUID } from 'node:crypto';
import type { Redis } from 'ioredis';
import { CommandBuffer, createParser, RespError, type RespValue } from './resp.ts';

/**
 * Sends commands over a connection that ioredis has made (address, Sentinel, TLS, credentials, reconnects) but
 * speaks for itself once it is ready: all commands of an event-loop turn leave in one write, replies are read by
 * `resp.ts`. Nobody else may send on that connection then, ioredis itself included: the timer with which it asks a server
 * that is loading once more outlives its connection, and its question on the next one would shift all replies by one.
 *
 * States: away → ready → away … A command sent while away waits for the next connection; when a connection ends,
 * everything unanswered is rejected and never resent.
 */

export type PipelineReply = [error: Error | null, value: unknown];
export type Outcome = Error | boolean;
export type PipelineCommand = readonly (string | number)[];

export interface TurnPipeline {
  send(command: PipelineCommand): Promise<unknown>;
  /** Replies in order; never rejects. */
  batch(commands: readonly PipelineCommand[]): Promise<PipelineReply[]>;
  /** What became of each, in order: its error, or whether the reply was more than nil. Never rejects. */
  outcomes(commands: readonly PipelineCommand[]): Promise<Outcome[]>;
  /** Writes now what waits for the end of the turn. */
  flush(): void;
  close(): void;
}

/** What waits for replies: one command, or several that are answered together. */
interface Waiter {
  left: number;
  /** Nobody reads what the strings say. */
  bare: boolean;
  take(reply: RespValue): void;
  fail(error: Error): void;
}

const MOST_WAITING = 200_000; // commands without an answer; beyond it something is badly wrong
const FLUSH_BYTES = 32_768; // Redis gets to work while the rest of a busy turn goes on here

export function createTurnPipeline(redis: Redis): TurnPipeline {
  let ready = false;
  let closed = false;
  const outgoing = new CommandBuffer();
  let scheduled = false;
  /** Waiters in the order of their commands. A ring would save the compaction; an array with a head is enough. */
  let waiters: (Waiter | null)[] = [];
  let head = 0;
  let waiting = 0;
  let epoch = 0;

  const sendOfIoredis = redis.sendCommand.bind(redis);
  let taken = false; // from `ready` on, until the connection ends
  redis.sendCommand = (command, stream) => {
    if (!taken) return sendOfIoredis(command, stream);
    command.reject(new Error('this connection is for others'));
    return command.promise;
  };

  redis.on('ready', () => {
    taken = true;
    const { stream } = redis;
    const mine = ++epoch;
    // ioredis may still wait for replies of its own (a handshake that an earlier connection cut short is repeated on
    // this one). Ours begin after the echo of a word that nobody else can have sent: a reply that was taken for that
    // of the next command would give one user's answer to another.
    const mark = randomUUID();
    let isOurs = false;
    const parser = createParser(
      (reply) => {
        if (isOurs) {
          answer(reply);
          return;
        }
        if (reply !== mark) return;
        isOurs = true;
        ready = true;
        flush();
      },
      () => isOurs && waiters[head]?.bare === true,
    );
    stream.removeAllListeners('data');
    stream.on('data', (chunk: Buffer) => {
      if (mine !== epoch) return;
      try {
        parser.push(chunk);
      } catch (error) {
        stream.destroy(error as Error);
      }
    });
    stream.resume();
    const greeting = new CommandBuffer();
    greeting.add(['echo', mark]);
    stream.write(greeting.view());
  });
  redis.on('close', away);
  redis.on('end', away);

  function away(): void {
    taken = false;
    ready = false;
    epoch++;
    outgoing.clear(false);
    const lost = waiters.slice(head);
    waiters = [];
    head = 0;
    waiting = 0;
    const error = new Error('Connection is closed.');
    for (const waiter of lost) waiter!.fail(error);
  }

  function answer(reply: RespValue): void {
    const waiter = waiters[head];
    if (!waiter) throw new Error('RESP: a reply without a command');
    waiting--;
    if (--waiter.left === 0) {
      waiters[head++] = null; // it holds its reply, which may be megabytes
      if (head > 1024 && head * 2 > waiters.length) {
        waiters = waiters.slice(head);
        head = 0;
      }
    }
    if (reply instanceof RespError && reply.message.startsWith('READONLY')) redis.stream.destroy(reply); // a demoted master
    waiter.take(reply);
  }

  function enqueue(commands: readonly PipelineCommand[], waiter: Waiter): void {
    if (closed || waiting > MOST_WAITING) {
      waiter.fail(new Error(closed ? 'Connection is closed.' : 'too many commands wait for Redis'));
      return;
    }
    waiting += waiter.left;
    waiters.push(waiter);
    for (const command of commands) outgoing.add(command);
    if (outgoing.length > FLUSH_BYTES) writeOut();
    if (scheduled) return;
    scheduled = true;
    setImmediate(flush);
  }

  function flush(): void {
    scheduled = false;
    writeOut();
  }

  function writeOut(): void {
    if (!ready || outgoing.length === 0) return;
    const { stream } = redis;
    stream.write(outgoing.view());
    outgoing.clear(stream.writableLength > 0); // else the kernel has all of it
  }

  function sendList<T>(
    commands: readonly PipelineCommand[],
    bare: boolean,
    read: (reply: RespValue | Error) => T,
  ): Promise<T[]> {
    if (commands.length === 0) return Promise.resolve([]);
    const { waiter, replies } = awaitAll(commands.length, bare, read);
    enqueue(commands, waiter);
    return replies;
  }

  return {
    send(command) {
      const { waiter, reply } = awaitOne();
      enqueue([command], waiter);
      return reply;
    },
    batch: (commands) => sendList(commands, false, readReply),
    outcomes: (commands) => sendList(commands, true, readOutcome),
    flush,
    close() {
      closed = true;
    },
  };
}

// Apart from what sends, so that nothing holds commands while they are under way: they would survive a scavenge.

function awaitOne(): { waiter: Waiter; reply: Promise<unknown> } {
  let waiter!: Waiter;
  const reply = new Promise((resolve, reject) => {
    waiter = {
      left: 1,
      bare: false,
      take: (value) => (value instanceof RespError ? reject(value) : resolve(value)),
      fail: reject,
    };
  });
  return { waiter, reply };
}

/** @param read makes of a reply, or of the error that came instead, what the list holds */
function awaitAll<T>(
  count: number,
  bare: boolean,
  read: (reply: RespValue | Error) => T,
): { waiter: Waiter; replies: Promise<T[]> } {
  let waiter!: Waiter;
  const replies = new Promise<T[]>((resolve) => {
    const list: T[] = [];
    waiter = {
      left: count,
      bare,
      take(value) {
        list.push(read(value));
        if (list.length === count) resolve(list);
      },
      fail(error) {
        while (list.length < count) list.push(read(error));
        resolve(list);
      },
    };
  });
  return { waiter, replies };
}

function readReply(reply: RespValue | Error): PipelineReply {
  return reply instanceof Error ? [reply, null] : [null, reply];
}

function readOutcome(reply: RespValue | Error): Outcome {
  return reply instanceof Error ? reply : reply !== null;
}
