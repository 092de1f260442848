/**
 * How much one client may ask of a gateway: frames of a connection, frames of a user, connections of an address.
 *
 * Frames are counted by a token bucket in one number: the time at which the bucket would be full again. A frame
 * moves it on by its share of a second; too far ahead of the clock means that the bucket is empty. A connection
 * keeps its number itself, and a user's is forgotten as soon as the bucket is full, so memory is bounded by who
 * was active in the last seconds.
 *
 * A long frame counts as several: to read it takes the longer, the more it holds. None counts as more than a full bucket.
 *
 * Times are those of a clock that nobody sets, `performance.now()`: a step of the other one would refuse everybody.
 *
 * A user is counted by each gateway for itself. The load balancer brings all connections of a user to one
 * gateway, so that this is the user's rate; someone who goes around it gets it once a gateway.
 */

const BURST_MS = 10_000; // a bucket holds so much time of its rate
const COUNTED_CHARACTERS = 4_096; // each so many in a frame count as one frame more
const SWEEP_MS = 10_000;

export interface FrameLimits {
  /** 0 = no limit. */
  connectionFramesPerSecond: number;
  userFramesPerSecond: number;
}

/** What a connection keeps for us. */
export interface Rated {
  rateMs: number;
  readonly userId: string;
}

export type FrameRates = ReturnType<typeof createFrameRates>;

/** As how many frames one of this length counts. */
export function frameCost(length: number): number {
  return 1 + Math.floor(length / COUNTED_CHARACTERS);
}

function costMs(frameMs: number, length: number): number {
  return Math.min(frameMs * frameCost(length), BURST_MS - 1); // a full bucket lets each frame through, however it rounds
}

export function createFrameRates(limits: FrameLimits) {
  const connectionMs = limits.connectionFramesPerSecond > 0 ? 1_000 / limits.connectionFramesPerSecond : 0;
  const userMs = limits.userFramesPerSecond > 0 ? 1_000 / limits.userFramesPerSecond : 0;
  const users = new Map<string, number>();
  let sweptMs = 0;

  function sweep(nowMs: number): void {
    sweptMs = nowMs;
    for (const [user, fullMs] of users) if (fullMs <= nowMs) users.delete(user);
  }

  return {
    /** Counts a frame of this length. 0 = go on, else the time in ms after which the next one is let through. */
    take(client: Rated, nowMs: number, length = 0): number {
      if (connectionMs > 0) {
        const fullMs = Math.max(client.rateMs, nowMs) + costMs(connectionMs, length);
        if (fullMs - nowMs > BURST_MS) return Math.ceil(fullMs - nowMs - BURST_MS);
        client.rateMs = fullMs;
      }
      return client.userId === '' ? 0 : this.takeUser(client.userId, nowMs, length);
    },

    takeUser(userId: string, nowMs: number, length = 0): number {
      if (userMs === 0) return 0;
      if (nowMs - sweptMs > SWEEP_MS) sweep(nowMs);
      const fullMs = Math.max(users.get(userId) ?? 0, nowMs) + costMs(userMs, length);
      if (fullMs - nowMs > BURST_MS) return Math.ceil(fullMs - nowMs - BURST_MS);
      users.set(userId, fullMs);
      return 0;
    },

    get users(): number {
      return users.size;
    },
  };
}

export type AddressLimit = ReturnType<typeof createAddressLimit>;

/** Counts open connections by address; 0 = no limit. `enter` is false when the address has too many. */
export function createAddressLimit(most: number) {
  const open = new Map<string, number>();
  return {
    enter(address: string): boolean {
      if (most === 0 || address === '') return true;
      const count = open.get(address) ?? 0;
      if (count >= most) return false;
      open.set(address, count + 1);
      return true;
    },

    leave(address: string): void {
      const count = open.get(address);
      if (count === undefined) return;
      if (count > 1) open.set(address, count - 1);
      else open.delete(address);
    },

    get size(): number {
      return open.size;
    },
  };
}
