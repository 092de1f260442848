/**
 * How much one client may ask of a gateway: frames of a connection, frames of a user, connections of an address.
 *
 * Frames are counted by a token bucket in one number: the time at which the bucket would be full again. A frame
 * moves it on by its share of a second; too far ahead of the clock means that the bucket is empty. A connection
 * keeps its number itself, and a user's is forgotten as soon as the bucket is full, so memory is bounded by who
 * was active in the last seconds.
 *
 * Times are those of a clock that nobody sets, `performance.now()`: a step of the other one would refuse everybody.
 *
 * A user is counted by each gateway for itself. The load balancer brings all connections of a user to one
 * gateway, so that this is the user's rate; someone who goes around it gets it once a gateway.
 */

const BURST_S = 10; // a bucket holds this many seconds of its rate
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
    /** Counts a frame. 0 = go on, else the time in ms after which the next one is let through. */
    take(client: Rated, nowMs: number): number {
      if (connectionMs > 0) {
        const fullMs = Math.max(client.rateMs, nowMs) + connectionMs;
        if (fullMs - nowMs > BURST_S * 1_000) return Math.ceil(fullMs - nowMs - BURST_S * 1_000);
        client.rateMs = fullMs;
      }
      return client.userId === '' ? 0 : this.takeUser(client.userId, nowMs);
    },

    takeUser(userId: string, nowMs: number): number {
      if (userMs === 0) return 0;
      if (nowMs - sweptMs > SWEEP_MS) sweep(nowMs);
      const fullMs = Math.max(users.get(userId) ?? 0, nowMs) + userMs;
      if (fullMs - nowMs > BURST_S * 1_000) return Math.ceil(fullMs - nowMs - BURST_S * 1_000);
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
