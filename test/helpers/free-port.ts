import { tryPort } from '../../infra/ports.ts';

/**
 * Free ports below the range of outgoing connections (32768 on Linux), for what listens later, or again: a port that
 * the system hands out may be somebody's by then.
 */
export async function freePort(host = '127.0.0.1'): Promise<number> {
  return freePortAndAt(0, host);
}

/** One whose port so much higher is free too. */
export async function freePortAndAt(distance: number, host = '127.0.0.1'): Promise<number> {
  const [lowest, highest] = [10_000, 32_000 - distance];
  for (let attempt = 1; ; attempt++) {
    const port = lowest + Math.floor(Math.random() * (highest - lowest));
    try {
      for (const wanted of new Set([port, port + distance])) await tryPort(host, wanted);
      return port;
    } catch (error) {
      if (attempt === 50) throw error;
    }
  }
}
