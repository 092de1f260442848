import { createHash, timingSafeEqual } from 'node:crypto';
import type { HttpCall } from '../socket-server.ts';

/** True when the call carries one of the keys as a bearer token. Compared in constant time, over hashes. */
export function isApiKey(call: HttpCall, keys: string[]): boolean {
  const match = /^Bearer (.+)$/i.exec(call.headers.get('authorization') ?? '');
  if (!match) return false;
  const given = digest(match[1]!);
  let found = false;
  for (const key of keys) if (timingSafeEqual(given, digest(key))) found = true; // no early way out
  return found;
}

function digest(text: string): Buffer {
  return createHash('sha256').update(text).digest();
}
