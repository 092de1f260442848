import { setTimeout as delay } from 'node:timers/promises';
import type { GenerationStore } from '../shared/generation-store.ts';
import type { Keys } from '../shared/keys.ts';
import { type RedisConnection, retrying } from '../shared/redis.ts';
import { addressHead, encodeLines, publishCommands } from '../shared/reply-stream.ts';
import type { RequestQueue } from '../shared/request-queue.ts';
import { GONE_LOOK_MS, GONE_MS } from './delivery.ts';
import type { GatewayMetrics } from './metrics.ts';

interface CancelParts {
  store: GenerationStore;
  redis: RedisConnection;
  keys: Keys;
  queue: RequestQueue;
  metrics: GatewayMetrics;
}

/**
 * Ends a user's generation: its terminal frame is in the log at once and on its way to whoever follows it; the
 * worker learns of it at its next append. False when there is no such generation; one that has ended stays as it is.
 */
export async function cancelGeneration(
  parts: CancelParts,
  user: string,
  messageId: string,
): Promise<boolean> {
  const { store, redis, keys, queue, metrics } = parts;
  const cancelled = await store.cancel(user, messageId);
  if (cancelled.state === 'unknown') return false;
  if (cancelled.state === 'ended') return true;
  metrics.cancelled.inc();
  const { id, before, frame, routes, node } = cancelled;
  await redis.batch(
    routes.flatMap((route) =>
      publishCommands(keys, route, [encodeLines(addressHead(user, messageId), before, id, 'e', frame)]),
    ),
  );
  if (node) await retrying(() => queue.removeQueued(node, user, messageId));
  return true;
}

/**
 * The same for one that somebody followed and that Redis does not know any more: it is waited for, because its worker makes
 * it again, and would not know of the stop.
 */
export async function cancelWhenBack(parts: CancelParts, user: string, messageId: string): Promise<boolean> {
  for (const deadline = performance.now() + GONE_MS; performance.now() < deadline; ) {
    await delay(GONE_LOOK_MS);
    if (await cancelGeneration(parts, user, messageId)) return true;
  }
  return false;
}
