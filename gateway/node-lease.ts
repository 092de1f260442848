import { randomBytes } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { NodeFacts, NodeRegistry } from '../shared/node-registry.ts';
import { isConnectionError } from '../shared/redis.ts';

/**
 * Holds this gateway's id in the registry. Two live gateways with one id would share a reply stream and lose
 * frames, so the second refuses to start; a gateway that died without leaving is replaced when its lease runs out.
 */

export const NODE_LEASE_MS = 6_000;
const BEAT_MS = 2_000; // a third of the lease

export interface NodeLease {
  /** This very process, as others see it. */
  readonly instance: string;
  /** Rejects when another instance has taken the id. */
  readonly lost: Promise<never>;
  /** When Redis last took a renewal, by `performance.now()`. */
  readonly renewedMs: number;
  /** Writes changed facts at once. */
  renew(): Promise<void>;
  leave(): Promise<void>;
}

/** @throws Error when a live gateway has this id */
export async function holdNodeLease(parts: {
  node: string;
  registry: NodeRegistry;
  facts: () => NodeFacts;
  onBeat: () => Promise<void>;
  log: Logger;
}): Promise<NodeLease> {
  const { node, registry, log } = parts;
  const instance = randomBytes(8).toString('hex');
  const stop = new AbortController();

  let renewedMs = 0;
  /** How long another instance still holds the id, ms; 0 = it is ours. */
  async function register(): Promise<number> {
    const heldMs = await registry.register(node, instance, NODE_LEASE_MS, parts.facts());
    if (heldMs <= 0) renewedMs = performance.now();
    return heldMs;
  }

  let leftMs = await register();
  for (let waited = 0; leftMs > 0; waited += BEAT_MS / 2) {
    if (waited === 0)
      log.warn({ leftMs }, 'this NODE_ID is held; waiting whether its gateway is still alive');
    await delay(BEAT_MS / 2);
    const before = leftMs;
    leftMs = await register();
    // Its lease grew while we watched: somebody renews it.
    if (leftMs > before)
      throw new Error(`NODE_ID ${node} is used by another live gateway; give each its own`);
  }

  let fail: (error: Error) => void = () => {};
  const lost = new Promise<never>((_, reject) => {
    fail = reject;
  });
  lost.catch(() => {});
  const beating = (async () => {
    while (!stop.signal.aborted) {
      await delay(BEAT_MS, undefined, { signal: stop.signal }).catch(() => {});
      if (stop.signal.aborted) return;
      try {
        if ((await register()) > 0)
          fail(new Error(`NODE_ID ${node} was taken by another gateway while this one was silent`));
        await parts.onBeat();
      } catch (error) {
        if (!isConnectionError(error)) log.error({ err: error }, 'lease not renewed');
      }
    }
  })();

  return {
    instance,
    lost,
    get renewedMs() {
      return renewedMs;
    },
    async renew() {
      await register();
    },
    async leave() {
      stop.abort();
      await beating;
      await registry.leave(node, instance).catch(() => {});
    },
  };
}
