import { tryPort } from '../../infra/ports.ts';

/**
 * A free port below the range of outgoing connections (32768 on Linux), for what listens later, or again: one that the
 * system hands out may be somebody's by then.
 */
export function freePort(): Promise<number> {
  return freePortAndAt(0);
}

/** One with another free port so much higher. */
export async function freePortAndAt(distance: number): Promise<number> {
  const [lowest, highest] = [10_000, 32_000 - distance];
  for (let attempt = 1; ; attempt++) {
    const port = lowest + Math.floor(Math.random() * (highest - lowest));
    try {
      for (const wanted of new Set([port, port + distance])) await tryPort('127.0.0.1', wanted);
      return port;
    } catch (error) {
      if (attempt === 50) throw error;
    }
  }
}
