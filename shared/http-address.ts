/** The address under which others reach a server that listens there; an IPv6 host needs brackets in one. */
export function httpAddress({
  isSecure,
  host,
  port,
}: {
  isSecure: boolean;
  host: string;
  port: number;
}): string {
  return `${isSecure ? 'https' : 'http'}://${host.includes(':') ? `[${host}]` : host}:${port}`;
}
