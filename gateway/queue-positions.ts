import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { RequestQueue } from '../shared/request-queue.ts';
import type { AdmissionDesk } from './admission.ts';
import type { Delivery, Subscription } from './delivery.ts';

/**
 * Tells waiting clients their place, at most once a second and only when it changed. One read of a node's stream
 * serves all who wait there, and all whose answer stands still. A request that is nowhere for two rounds is looked
 * up, and appended again: its stream was deleted, perhaps with its worker.
 */

const EVERY_MS = 1_000; // the protocol's bound
const MOST_POSITIONS = 20_000; // farther back nobody is told a place
const MISSING_ROUNDS = 2; // begun or finished meanwhile is the usual reason

export async function tellPositions(parts: {
  delivery: Delivery;
  queue: RequestQueue;
  desk: AdmissionDesk;
  log: Logger;
  signal: AbortSignal;
}): Promise<void> {
  const { delivery, queue, desk, log, signal } = parts;
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
    const byHome = new Map<string, Subscription[]>();
    for (const one of delivery.watchingQueue()) {
      if (one.home === '') continue;
      const list = byHome.get(one.home);
      if (list) list.push(one);
      else byHome.set(one.home, [one]);
    }
    // Together: in a Cluster a node whose server is away must not hold up the others.
    const told = await Promise.allSettled([...byHome].map(([home, list]) => tell(home, list)));
    const failed = told.find((one) => one.status === 'rejected');
    if (failed) throw failed.reason;
  }

  async function tell(home: string, list: Subscription[]): Promise<void> {
    const positions = await queue.positions(home, MOST_POSITIONS);
    const missing: Subscription[] = [];
    for (const subscription of list) {
      if (subscription.state !== 'live' || !subscription.follower.open) continue;
      const position = positions.get(subscription.key);
      if (position === undefined) {
        if (++subscription.missing % MISSING_ROUNDS === 0 && positions.size < MOST_POSITIONS)
          missing.push(subscription);
        continue;
      }
      subscription.missing = 0;
      if (!subscription.waiting || position === subscription.toldPosition) continue;
      subscription.toldPosition = position;
      subscription.follower.sendText(
        JSON.stringify({ type: 'queued', messageId: subscription.messageId, position }),
      );
    }
    for (const subscription of missing)
      subscription.home = (await desk.locate(subscription.user, subscription.messageId, home)).home;
  }
}
