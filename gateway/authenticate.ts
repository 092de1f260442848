import { setTimeout as delay } from 'node:timers/promises';
import {
  createLocalJWKSet,
  createRemoteJWKSet,
  decodeProtectedHeader,
  errors,
  type JWTPayload,
  type JWTVerifyGetKey,
  jwtVerify,
} from 'jose';
import { RivuletError } from '../shared/errors.ts';
import { parseUserId } from '../shared/protocol.ts';
import type { GatewayConfig } from './config.ts';

/** Who is at the door. `expiresMs` is when the credentials end, if they do. */
export interface Identity {
  userId: string;
  expiresMs: number | null;
}

/**
 * Binds a claimed user id to credentials.
 * `none` believes the claim. `jwt` takes the user from `sub`; a claimed id that differs is refused.
 * @throws RivuletError unauthorized | forbidden | invalid_frame (no user id at all) | internal (the keys cannot be
 *   fetched: nobody's fault at the door, and worth another try)
 */
export type Authenticate = (claimedUserId: string | null, token: string) => Promise<Identity>;

/** A secret signs with HS256 only, a key set with these only: no public key can ever be taken for a secret. */
const ASYMMETRIC = [
  ...['RS256', 'RS384', 'RS512', 'PS256', 'PS384', 'PS512'],
  ...['ES256', 'ES384', 'ES512', 'EdDSA', 'Ed25519'],
];
const CLOCK_TOLERANCE_S = 5; // clocks of two machines with NTP are closer than this
const KEYS_FRESH_MS = 600_000; // a key that was taken out of the set is refused after this at the latest
const KEYS_COOLDOWN_MS = 1_000; // an unknown key id fetches the set at most this often, whoever sends it; it waits so long
const KEYS_TIMEOUT_MS = 5_000;
const KEYS_STALE_MS = 3_600_000; // for how long the last set serves while its server is away

export function createAuthenticate(
  config: Pick<GatewayConfig, 'AUTH' | 'JWT_SECRET' | 'JWKS_URL' | 'JWT_ISSUER' | 'JWT_AUDIENCE'>,
  keySetOptions: { freshMs?: number; cooldownMs?: number } = {},
): Authenticate {
  if (config.AUTH === 'none') {
    return async (claimedUserId) => {
      if (claimedUserId === null) throw new RivuletError('invalid_frame', 'userId is missing');
      return { userId: claimedUserId, expiresMs: null };
    };
  }
  const secret = config.JWT_SECRET ? new TextEncoder().encode(config.JWT_SECRET) : null;
  const keySet = config.JWKS_URL ? createKeySet(new URL(config.JWKS_URL), keySetOptions) : null;
  const options = {
    clockTolerance: CLOCK_TOLERANCE_S,
    requiredClaims: ['sub'],
    ...(config.JWT_ISSUER ? { issuer: config.JWT_ISSUER } : {}),
    ...(config.JWT_AUDIENCE ? { audience: config.JWT_AUDIENCE } : {}),
  };

  async function verify(token: string): Promise<JWTPayload> {
    if (secret !== null && (keySet === null || decodeProtectedHeader(token).alg === 'HS256'))
      return (await jwtVerify(token, secret, { ...options, algorithms: ['HS256'] })).payload;
    const rules = { ...options, algorithms: ASYMMETRIC };
    try {
      return (await jwtVerify(token, keySet!, rules)).payload;
    } catch (error) {
      if (!(error instanceof errors.JWKSMultipleMatchingKeys)) throw error;
      for await (const key of error) // it names no key, and several of the set fit: one of them may have signed it
        try {
          return (await jwtVerify(token, key, rules)).payload;
        } catch (failure) {
          if (!(failure instanceof errors.JWSSignatureVerificationFailed)) throw failure;
        }
      throw error;
    }
  }

  return async (claimedUserId, token) => {
    if (token === '') throw new RivuletError('unauthorized', 'a token is required');
    let payload: JWTPayload;
    try {
      payload = await verify(token);
    } catch (error) {
      if (error instanceof RivuletError) throw error;
      if (error instanceof errors.JWTExpired) throw new RivuletError('unauthorized', 'the token has expired');
      throw new RivuletError('unauthorized', 'the token is not valid', { cause: error });
    }
    const parsed = parseUserId(payload.sub);
    if ('reason' in parsed) throw new RivuletError('unauthorized', `the token's sub: ${parsed.reason}`);
    if (claimedUserId !== null && claimedUserId !== parsed.userId)
      throw new RivuletError('forbidden', 'the token belongs to another user');
    return { userId: parsed.userId, expiresMs: payload.exp === undefined ? null : endOf(payload.exp) };
  };
}

/** The token of an Authorization header, or ''. */
export function readBearer(authorization: string): string {
  return /^Bearer +(\S+) *$/i.exec(authorization)?.[1] ?? '';
}

const LONGEST_TIMER_MS = 2 ** 31 - 1; // Node fires longer ones at once

/** Calls back when credentials end. Returns what takes the call back. */
export function whenExpired(expiresMs: number, then: () => void): () => void {
  let timer: NodeJS.Timeout;
  const wait = () => {
    const leftMs = Math.max(0, expiresMs - Date.now());
    timer = setTimeout(leftMs > LONGEST_TIMER_MS ? wait : then, Math.min(leftMs, LONGEST_TIMER_MS));
    timer.unref();
  };
  wait();
  return () => clearTimeout(timer);
}

/** A token that the tolerance let in has the rest of the tolerance left, so that it is not closed at once. */
function endOf(expirySeconds: number): number {
  const ms = expirySeconds * 1000;
  return ms > Date.now() ? ms : ms + CLOCK_TOLERANCE_S * 1000;
}

/** Keys by id from a URL: cached, fetched again for an unknown id, and kept for a while when the URL does not answer. */
function createKeySet(
  url: URL,
  { freshMs = KEYS_FRESH_MS, cooldownMs = KEYS_COOLDOWN_MS }: { freshMs?: number; cooldownMs?: number },
): JWTVerifyGetKey {
  const remote = createRemoteJWKSet(url, {
    cacheMaxAge: freshMs,
    cooldownDuration: cooldownMs,
    timeoutDuration: KEYS_TIMEOUT_MS,
  });
  let fetchedMs = 0;
  return async (header, token) => {
    try {
      const mayBeNewer = remote.coolingDown; // then a key that is not known is not asked for yet
      return await remote(header, token).catch(async (error) => {
        if (!(error instanceof errors.JWKSNoMatchingKey) || !mayBeNewer) throw error;
        await delay(cooldownMs);
        return remote(header, token);
      });
    } catch (error) {
      if (
        error instanceof errors.JWKSNoMatchingKey ||
        error instanceof errors.JWKSMultipleMatchingKeys ||
        error instanceof errors.JOSENotSupported
      )
        throw error; // the set is there; the token is wrong
      const last = remote.jwks();
      if (last && Date.now() - fetchedMs < freshMs + KEYS_STALE_MS)
        try {
          return await createLocalJWKSet(last)(header, token);
        } catch (unknown) {
          if (!(unknown instanceof errors.JWKSNoMatchingKey)) throw unknown; // else its key may be a new one
        }
      throw new RivuletError('internal', 'the keys to check tokens with cannot be fetched; try again', {
        cause: error,
      });
    } finally {
      if (remote.fresh) fetchedMs = Date.now();
    }
  };
}
