import { BlockList, isIP, SocketAddress } from 'node:net';

/**
 * Whose connection it is, for the limit by address. A forwarded address counts only when the connection itself
 * comes from one of TRUSTED_PROXIES, and then the last one in the list that is not such a proxy: everything before
 * it was written by the client. An IPv6 client is its /64, which is what one household or server gets.
 *
 * Our own machine's address is not limited: '' means that nobody is counted.
 */
export function createClientAddress(trustedProxies: string[]): (peer: string, forwarded: string) => string {
  const trusted = new BlockList();
  for (const proxy of trustedProxies) {
    const { address, prefix, family } = parseNetwork(proxy)!;
    trusted.addSubnet(address, prefix, family);
  }
  const isTrusted = (address: string) => trusted.check(address, isIP(address) === 6 ? 'ipv6' : 'ipv4');

  return (peer, forwarded) => {
    let address = normalize(peer);
    if (trustedProxies.length > 0 && address !== '' && isTrusted(address)) {
      const hops = forwarded
        .split(',')
        .slice(-50)
        .map((hop) => normalize(hop.trim()));
      while (address !== '' && isTrusted(address)) {
        const before = hops.pop();
        if (!before) break;
        address = before;
      }
      return group(address);
    }
    return address === '::1' || address.startsWith('127.') ? '' : group(address);
  };
}

/** One spelling for each address; '' for what is none. */
function normalize(text: string): string {
  const bare = /^\[(.+)\](?::\d+)?$/.exec(text)?.[1] ?? text.replace(/^(\d+\.\d+\.\d+\.\d+):\d+$/, '$1');
  const version = isIP(bare);
  if (version === 0) return '';
  if (version === 4) return bare;
  const { address } = new SocketAddress({ address: bare, family: 'ipv6' });
  const mapped = /^::ffff:(\d+\.\d+\.\d+\.\d+)$/.exec(address);
  return mapped ? mapped[1]! : address;
}

function group(address: string): string {
  if (isIP(address) !== 6) return address;
  const [head, tail] = address.split('::') as [string, string?];
  const left = head === '' ? [] : head.split(':');
  const right = tail ? tail.split(':') : [];
  const zeros =
    tail === undefined ? [] : Array<string>(Math.max(0, 8 - left.length - right.length)).fill('0');
  return [...left, ...zeros, ...right].slice(0, 4).join(':');
}

/** `10.0.0.0/8`, `::1` and the like; null for anything else. */
export function parseNetwork(
  text: string,
): { address: string; prefix: number; family: 'ipv4' | 'ipv6' } | null {
  const [address, length, ...rest] = text.split('/') as [string, string?];
  const version = isIP(address);
  if (version === 0 || rest.length > 0) return null;
  const most = version === 6 ? 128 : 32;
  if (length !== undefined && !/^\d{1,3}$/.test(length)) return null;
  const prefix = length === undefined ? most : Number(length);
  return prefix <= most ? { address, prefix, family: version === 6 ? 'ipv6' : 'ipv4' } : null;
}
