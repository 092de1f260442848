import { randomUUID } from 'node:crypto';
import { RivuletError } from '../../shared/errors.ts';
import type { GenerationStore } from '../../shared/generation-store.ts';
import type { Keys } from '../../shared/keys.ts';
import { isOpenStatus, type ServerFrame } from '../../shared/protocol.ts';
import { type Command, type RedisConnection, retrying } from '../../shared/redis.ts';
import type { RequestQueue } from '../../shared/request-queue.ts';
import type { Tracing } from '../../shared/tracing.ts';
import type { AdmissionDesk } from '../admission.ts';
import { watchAnswer, watchOrEnd } from '../answer-watch.ts';
import { cancelGeneration, cancelWhenBack } from '../cancel.ts';
import type { Delivery, Follower, Subscription } from '../delivery.ts';
import type { GatewayMetrics } from '../metrics.ts';
import type { QueuePlaces } from '../queue-places.ts';
import type { AiDoor } from './ai-door.ts';
import { type Chunk, type ChunkWriter, createChunkWriter } from './chunks.ts';
import { conversationOf, type Question } from './questions.ts';

/**
 * Chats of the AI SDK on our generations. A chat has one generation at a time; a key of its user names it from
 * when it is admitted until its end has reached a client. So a client that comes back, on any gateway, gets the
 * whole answer from the log, also when it ended while nobody was there; and `null` when it has missed nothing.
 *
 * A stop may come, on any gateway, while its question is still on its way in and nothing names it. So a stop leaves a mark
 * before it reads that key, and a question looks for a new mark after it has written the key: one of them sees the other.
 */

const CHAT_MS = 24 * 3_600_000; // as long as an open generation may live
const STOP_MS = 600_000; // well above what admission may take
const MOST_TRIES = 10; // submissions of one message that failed or were cancelled, within the retention

export interface DeskParts {
  node: string;
  keys: Keys;
  redis: RedisConnection;
  store: GenerationStore;
  queue: RequestQueue;
  desk: AdmissionDesk;
  places: QueuePlaces;
  delivery: Delivery;
  door: AiDoor;
  metrics: GatewayMetrics;
  tracing: Tracing | null;
}

/**
 * Where an answer is written to: a request of a WebSocket, or an HTTP body. No getters: an object literal with getters has
 * a hidden class of its own, which keeps all that they see until the next full collection.
 */
export interface Sink {
  chunk(chunk: Chunk): void;
  /** The answer has ended, and everything was written. */
  end(): void;
  isOpen(): boolean;
  isSlow(): boolean;
}

/** One client that reads one answer. */
export class AiStream implements Follower {
  readonly user: string;
  readonly chat: string;
  readonly messageId: string;
  subscription: Subscription | null = null;
  private readonly sink: Sink;
  private readonly writer: ChunkWriter;
  private ended = false;

  constructor(user: string, chat: string, messageId: string, sink: Sink, resets: boolean) {
    this.user = user;
    this.chat = chat;
    this.messageId = messageId;
    this.sink = sink;
    this.writer = createChunkWriter({ messageId, resets, emit: (chunk) => sink.chunk(chunk) });
  }

  get open(): boolean {
    return this.sink.isOpen() && !this.ended;
  }

  get slow(): boolean {
    return this.sink.isSlow();
  }

  start(position: number | null): void {
    this.writer.open();
    if (position !== null) this.writer.take({ type: 'queued', messageId: this.messageId, position });
  }

  sendText(text: string): void {
    if (this.ended) return;
    if (!this.writer.take(JSON.parse(text) as ServerFrame)) return;
    this.ended = true;
    this.sink.end();
  }

  onEnded(): void {}

  /** Stops reading; the answer goes on. */
  leave(delivery: Delivery): void {
    this.ended = true;
    if (this.subscription) delivery.drop(this.subscription);
  }

  onDrain(delivery: Delivery): void {
    if (this.subscription) delivery.onDrain([this.subscription]);
  }
}

/** Not a bare comparison: the state changes while we wait. */
function hasEnded(subscription: Subscription): boolean {
  return subscription.state === 'ended';
}

export type AiDesk = ReturnType<typeof createAiDesk>;

export function createAiDesk(parts: DeskParts) {
  const { node, keys, redis, store, desk, places, delivery, door, metrics } = parts;

  /** Writes one key of a chat, then reads another, in one round trip. */
  async function inOrder(write: Command, read: Command): Promise<string | null> {
    return retrying(async () => {
      const replies = await redis.batch([write, read]);
      for (const [error] of replies) if (error) throw error;
      return replies[1]![1] as string | null;
    });
  }

  /** The open answer of a chat whose key was lost: its worker makes the record again, and its place, but not that. */
  async function findOpen(user: string, chat: string): Promise<string | null> {
    const open = await retrying(() => redis.client.hgetall(keys.active(user)));
    return Object.keys(open).find((messageId) => open[messageId] === chat) ?? null;
  }

  function follow(stream: AiStream): Subscription {
    const subscription = delivery.hold(stream, stream.user, stream.messageId);
    stream.subscription = subscription;
    return subscription;
  }

  /** Reads what is there and goes on live. False when nothing is known of it any more. */
  async function attach(stream: AiStream, subscription: Subscription): Promise<boolean> {
    const attached = await store.attach(stream.user, stream.messageId, node, '');
    const isOpen = attached.state === 'attached' && isOpenStatus(attached.status);
    if (isOpen) places.doubt(attached.node, stream.user, stream.messageId);
    if (hasEnded(subscription)) return true; // the client has left
    if (attached.state === 'unknown') return false;
    const { status, whole, entries, more } = attached;
    let position: number | null = null;
    if (isOpen) {
      subscription.home = attached.node;
      if (status === 'queued' && entries.length === 0) {
        position = await places.find(attached.node, stream.user, stream.messageId);
        subscription.waiting = true;
        subscription.toldPosition = position;
      }
    }
    if (hasEnded(subscription)) return true;
    stream.start(position);
    delivery.release(subscription, '', entries, more, whole);
    return true;
  }

  return {
    /**
     * Asks, or joins the answer to the same question. An answer that failed or was cancelled is not given again:
     * asking once more is the wish for another.
     * @throws RivuletError with the code of the refusal
     */
    async ask(user: string, question: Question, sink: Sink, resets: boolean): Promise<AiStream> {
      const chat = question.conversationId!;
      const [, lastStop] = await Promise.all([
        door.assertAllowed(user),
        retrying(() => redis.send(['get', keys.aiStop(user, chat)])),
      ]);
      for (let attempt = 1; attempt <= MOST_TRIES; attempt++) {
        const messageId = attempt === 1 ? question.messageId : `${question.messageId}.${attempt}`;
        const stream = new AiStream(user, chat, messageId, sink, resets);
        const subscription = follow(stream);
        const asked = { ...question, messageId };
        const started = performance.now();
        const watch = watchAnswer(user, asked, started, parts);
        try {
          const admission = await desk.admit(user, asked, watch.trace);
          metrics.admission.observe((performance.now() - started) / 1000);
          if (admission.state === 'rejected') {
            metrics.rejected.inc({ code: admission.code });
            watch.refused(admission.code);
            const { code, message, ...rest } = admission;
            throw new RivuletError(code, message, rest);
          }
          if (admission.state === 'joined') watch.joined();
          else watchOrEnd(subscription, watch);
          if (
            admission.state === 'joined' &&
            (admission.status === 'failed' || admission.status === 'cancelled')
          ) {
            delivery.drop(subscription);
            continue;
          }
          const stop = await inOrder(
            ['set', keys.aiChat(user, chat), messageId, 'PX', CHAT_MS],
            ['get', keys.aiStop(user, chat)],
          );
          if (stop !== null && stop !== lastStop) await this.cancel(user, chat, messageId, false);
          if (admission.state === 'joined') {
            metrics.joined.inc();
            if (await attach(stream, subscription)) return stream;
            throw new RivuletError('unknown_message');
          }
          metrics.admitted.inc();
          const { position, home } = admission;
          subscription.home = home;
          subscription.waiting = true;
          subscription.toldPosition = position;
          stream.start(position);
          delivery.release(subscription, '', [], false);
          return stream;
        } catch (error) {
          watch.refused('internal');
          delivery.drop(subscription);
          throw error;
        }
      }
      throw new RivuletError('attempts_exhausted');
    },

    /** The answer that runs in a chat, or has ended unseen, from its beginning. Null when there is none. */
    async resume(user: string, chatId: string, sink: Sink, resets: boolean): Promise<AiStream | null> {
      await door.assertAllowed(user);
      const chat = conversationOf(chatId);
      const named = await retrying(() => redis.client.get(keys.aiChat(user, chat)));
      const messageId = named ?? (await findOpen(user, chat));
      if (messageId === null) return null;
      metrics.resumed.inc();
      const stream = new AiStream(user, chat, messageId, sink, resets);
      const subscription = follow(stream);
      try {
        if (await attach(stream, subscription)) return stream;
        delivery.drop(subscription);
        return null;
      } catch (error) {
        delivery.drop(subscription);
        throw error;
      }
    },

    /** Ends what runs in a chat, and what is on its way in. False when nothing runs. */
    async stop(user: string, chatId: string): Promise<boolean> {
      const chat = conversationOf(chatId);
      const named = await inOrder(
        ['set', keys.aiStop(user, chat), randomUUID(), 'PX', STOP_MS],
        ['get', keys.aiChat(user, chat)],
      );
      const messageId = named ?? (await findOpen(user, chat));
      return messageId !== null && this.cancel(user, chat, messageId, delivery.isFollowed(user, messageId));
    },

    /** @param followed somebody followed it here: should Redis have lost it, it may come back */
    async cancel(user: string, chat: string, messageId: string, followed: boolean): Promise<boolean> {
      const cancelled =
        (await cancelGeneration(parts, user, messageId)) ||
        (followed && (await cancelWhenBack(parts, user, messageId)));
      await this.settle(user, chat, messageId);
      return cancelled;
    },

    /** The end of this answer has reached a client: there is nothing to resume. */
    async settle(user: string, chat: string, messageId: string): Promise<void> {
      await retrying(() => redis.script('settle_chat', [keys.aiChat(user, chat)], [messageId]));
    },

    leave(stream: AiStream): void {
      stream.leave(delivery);
    },

    drain(streams: Iterable<AiStream>): void {
      for (const stream of streams) stream.onDrain(delivery);
    },
  };
}
