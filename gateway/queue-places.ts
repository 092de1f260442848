import { retrying } from '../shared/redis.ts';
import type { RequestQueue } from '../shared/request-queue.ts';

/**
 * Where requests are in their queues, for all who ask: a node's stream is read for everybody at once, and what was read
 * serves for a second. To look for one request alone is a scan of the whole stream, and whoever comes back to an answer
 * again and again, or all clients of a node that was lost, would fill Redis with these.
 *
 * Who comes back to an open answer has it doubted as well: its stream may have lost the request, and nobody else may ever
 * ask. `tellPositions` looks for what is doubted, also when who asked has left meanwhile.
 */

const FRESH_MS = 1_000; // what was read serves for so long
const FRESH_FOR_NEW_MS = 100; // and for what is not in it: that may have come since
const MOST_POSITIONS = 20_000; // farther back nobody is told a place
const MOST_DOUBTS = 10_000; // beyond it only those are looked after whose clients stay

export interface Doubt {
  readonly key: string;
  readonly user: string;
  readonly messageId: string;
  /** The node whose request stream should carry it. */
  home: string;
  /** Rounds in which it was not there. */
  missing: number;
}

/** What a stream holds: `user messageId` → requests ahead. */
export interface Places {
  readonly positions: ReadonlyMap<string, number>;
  /** Nothing is left out: what is not here is not in the stream. */
  readonly whole: boolean;
}

export type QueuePlaces = ReturnType<typeof createQueuePlaces>;

export function createQueuePlaces({ queue }: { queue: Pick<RequestQueue, 'positions'> }) {
  const known = new Map<string, Places & { readMs: number }>();
  const reading = new Map<string, Promise<Places>>();
  const doubts = new Map<string, Doubt>();

  /** All of one node, as it is now. */
  function read(home: string): Promise<Places> {
    let read = reading.get(home);
    if (!read) {
      read = queue
        .positions(home, MOST_POSITIONS)
        .then((positions) => {
          const places = { positions, whole: positions.size < MOST_POSITIONS, readMs: performance.now() };
          known.set(home, places);
          return places;
        })
        .finally(() => reading.delete(home));
      reading.set(home, read);
    }
    return read;
  }

  return {
    doubts,
    read,

    /** The number of requests ahead of one. What is not found is new, and so behind all that are there. */
    async find(home: string, user: string, messageId: string): Promise<number> {
      const key = `${user} ${messageId}`;
      let places: Places | undefined = known.get(home);
      const ageMs = performance.now() - (known.get(home)?.readMs ?? Number.NEGATIVE_INFINITY);
      if (ageMs >= (places?.positions.has(key) ? FRESH_MS : FRESH_FOR_NEW_MS)) places = undefined;
      places ??= await retrying(() => read(home));
      return places.positions.get(key) ?? places.positions.size;
    },

    doubt(home: string, user: string, messageId: string): void {
      const key = `${user} ${messageId}`;
      if (home !== '' && doubts.size < MOST_DOUBTS && !doubts.has(key))
        doubts.set(key, { key, user, messageId, home, missing: 0 });
    },

    /** Lets go of what was read a while ago. */
    forgetOld(): void {
      for (const [home, { readMs }] of known) if (performance.now() - readMs > FRESH_MS) known.delete(home);
    },
  };
}
