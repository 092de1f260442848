import { isIP } from 'node:net';
import type { GatewayConfig } from './config.ts';

/**
 * Which pages may use this gateway: those that ALLOWED_ORIGINS names, and its own, those whose host is the one that they
 * call.
 *
 * Where anybody may be anybody, a name on both sides proves nothing: a hostile page can have its own name lead to this
 * machine (DNS rebinding). So there its own are only names that no stranger can give out, addresses, and PUBLIC_URL's.
 */

export interface Origins {
  /** '' is no page. */
  allows(origin: string, host: string): boolean;
  /** For people, who can do something about it. */
  explain(origin: string): string;
}

export function createOrigins(
  config: Pick<GatewayConfig, 'AUTH' | 'ALLOWED_ORIGINS' | 'PUBLIC_URL'>,
): Origins {
  const { AUTH, ALLOWED_ORIGINS: allowed, PUBLIC_URL } = config;
  const publicHost = PUBLIC_URL ? new URL(PUBLIC_URL).host : '';
  return {
    allows(origin, host) {
      if (origin === '' || allowed.includes('*') || allowed.includes(origin)) return true;
      try {
        const page = new URL(origin);
        if (page.host !== host) return false;
        return AUTH === 'jwt' || page.host === publicHost || isOwnName(page.hostname);
      } catch {
        return false;
      }
    },
    explain: (origin) => `Origin ${origin.slice(0, 200)} is not allowed: name it in ALLOWED_ORIGINS`,
  };
}

/** An address, or a name that no public DNS leads to us: of this machine, or of the local network. */
function isOwnName(name: string): boolean {
  return isIP(name.replace(/^\[|\]$/g, '')) > 0 || !name.includes('.') || /\.(localhost|local)$/.test(name);
}
