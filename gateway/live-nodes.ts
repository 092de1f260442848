import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { NodeRegistry } from '../shared/node-registry.ts';
import { createLiveNodes, type LiveNodes } from '../shared/presence.ts';
import type { RedisConnection } from '../shared/redis.ts';

/** Which gateways are alive, read from the registry again and again, so that nobody asks it for each message. */

const EVERY_MS = 2_000; // as often as leases are renewed

export interface LiveNodesWatch {
  readonly current: LiveNodes;
  /** Reads the registry now: for what must reach a gateway that has just come up. */
  look(): Promise<LiveNodes>;
  readonly ended: Promise<void>;
}

/** Resolves after the first reading. */
export async function watchLiveNodes(parts: {
  redis: RedisConnection;
  registry: NodeRegistry;
  log: Logger;
  signal: AbortSignal;
}): Promise<LiveNodesWatch> {
  const { redis, registry, log, signal } = parts;
  async function look(): Promise<LiveNodes> {
    const [entries, [seconds]] = await Promise.all([registry.nodes(), redis.client.time()]);
    current = createLiveNodes(entries, Number(seconds) * 1_000);
    return current;
  }
  let current: LiveNodes;
  await look();
  const ended = (async () => {
    while (!signal.aborted) {
      await delay(EVERY_MS, undefined, { signal }).catch(() => {});
      if (signal.aborted) return;
      try {
        await look();
      } catch (error) {
        log.debug({ err: (error as Error).message }, 'registry not read; again soon');
      }
    }
  })();
  return {
    look,
    get current() {
      return current;
    },
    ended,
  };
}
