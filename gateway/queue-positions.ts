import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { GenerationStore } from '../shared/generation-store.ts';
import { isOpenStatus } from '../shared/protocol.ts';
import { takeAnswers } from '../shared/redis.ts';
import type { AdmissionDesk } from './admission.ts';
import type { Delivery, Subscription } from './delivery.ts';
import type { Doubt, QueuePlaces } from './queue-places.ts';

/**
 * Tells waiting clients their place, at most once a second and only when it changed. One read of a node's stream
 * serves all who wait there, all whose answer stands still, and all that is doubted. What is nowhere for two rounds while
 * its record is open is looked up, and appended again: its stream was deleted, perhaps with its worker.
 */

const EVERY_MS = 1_000; // the protocol's bound
const MISSING_ROUNDS = 2; // begun or finished meanwhile is the usual reason
const INSPECT_BATCH = 500; // records that one round trip asks for

export async function tellPositions(parts: {
  delivery: Delivery;
  places: QueuePlaces;
  store: GenerationStore;
  desk: AdmissionDesk;
  log: Logger;
  signal: AbortSignal;
}): Promise<void> {
  const { delivery, places, store, desk, log, signal } = parts;
  while (!signal.aborted) {
    await delay(EVERY_MS, undefined, { signal }).catch(() => {});
    if (signal.aborted) return;
    try {
      await round();
    } catch (error) {
      log.warn({ err: (error as Error).message }, 'positions cannot be read; again soon');
    }
  }

  async function round(): Promise<void> {
    places.forgetOld();
    const byHome = new Map<string, { waiting: Subscription[]; doubts: Doubt[] }>();
    const at = (home: string) => {
      let there = byHome.get(home);
      if (!there) {
        there = { waiting: [], doubts: [] };
        byHome.set(home, there);
      }
      return there;
    };
    for (const one of delivery.watchingQueue()) if (one.home !== '') at(one.home).waiting.push(one);
    for (const doubt of places.doubts.values()) at(doubt.home).doubts.push(doubt);
    // Together: in a Cluster a node whose server is away must not hold up the others.
    const told = await Promise.allSettled([...byHome].map(([home, there]) => tell(home, there)));
    const failed = told.find((one) => one.status === 'rejected');
    if (failed) throw failed.reason;
  }

  async function tell(
    home: string,
    { waiting, doubts }: { waiting: Subscription[]; doubts: Doubt[] },
  ): Promise<void> {
    const { positions, whole } = await places.read(home);
    const missing: (Subscription | Doubt)[] = [];
    const isMissing = (one: Subscription | Doubt) => ++one.missing % MISSING_ROUNDS === 0 && whole;
    for (const subscription of waiting) {
      if (subscription.state !== 'live' || !subscription.follower.open) continue;
      const position = positions.get(subscription.key);
      if (position === undefined) {
        if (isMissing(subscription)) missing.push(subscription);
        continue;
      }
      subscription.missing = 0;
      if (!subscription.waiting || position === subscription.toldPosition) continue;
      subscription.toldPosition = position;
      subscription.follower.sendText(
        JSON.stringify({ type: 'queued', messageId: subscription.messageId, position }),
      );
    }
    for (const doubt of doubts)
      if (positions.has(doubt.key) || !whole) places.doubts.delete(doubt.key);
      else if (isMissing(doubt)) missing.push(doubt);
    for (let from = 0; from < missing.length; from += INSPECT_BATCH)
      await lookUp(home, missing.slice(from, from + INSPECT_BATCH));
  }

  /** Most of what is missing has ended. */
  async function lookUp(home: string, missing: (Subscription | Doubt)[]): Promise<void> {
    const open: (Subscription | Doubt)[] = [];
    const failure = takeAnswers(await store.inspectAll(missing), (record, index) => {
      const one = missing[index]!;
      if (!record || !isOpenStatus(record.status)) places.doubts.delete(one.key);
      else if (record.node !== home)
        one.home = record.node; // another gateway has appended it again
      else open.push(one);
    });
    const homes = new Map<string, string>(); // several may wait for one request: it is appended once
    for (const one of open) {
      const { key, user, messageId } = one;
      one.home = homes.get(key) ?? (await desk.locate(user, messageId, home)).home;
      homes.set(key, one.home);
      places.doubts.delete(key);
    }
    if (failure) throw failure;
  }
}
