import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { type AddressInfo, createServer } from 'node:net';
import { readCommand } from './process-lock.mjs';

export { readCommand };

/** Resolves with the port, or rejects with the system's error (`EADDRINUSE`, `EACCES`). 0 means any free one. */
export function tryPort(host: string, port: number): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.once('error', reject);
    server.listen({ host, port, exclusive: true }, () => {
      const taken = (server.address() as AddressInfo).port;
      server.close(() => resolve(taken));
    });
  });
}

/** The process that listens on a TCP port, as far as this user may see it. */
export function findListener(port: number): { pid: number; command: string } | null {
  try {
    const pid = process.platform === 'linux' ? listenerFromProc(port) : listenerFromLsof(port);
    return pid ? { pid, command: readCommand(pid) ?? 'unknown' } : null;
  } catch {
    return null;
  }
}

function listenerFromProc(port: number): number | null {
  const suffix = `:${port.toString(16).toUpperCase().padStart(4, '0')}`;
  const sockets = new Set<string>();
  for (const table of ['/proc/net/tcp', '/proc/net/tcp6']) {
    for (const line of readFileSync(table, 'utf8').split('\n').slice(1)) {
      const fields = line.trim().split(/\s+/);
      if (fields[3] === '0A' && fields[1]?.endsWith(suffix)) sockets.add(`socket:[${fields[9]}]`);
    }
  }
  if (sockets.size === 0) return null;
  for (const entry of readdirSync('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    try {
      const folder = `/proc/${entry}/fd`;
      if (readdirSync(folder).some((fd) => sockets.has(readlinkOrEmpty(`${folder}/${fd}`))))
        return Number(entry);
    } catch {
      // Another user's process, or one that just ended.
    }
  }
  return null;
}

function readlinkOrEmpty(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return '';
  }
}

function listenerFromLsof(port: number): number | null {
  const out = execFileSync('lsof', ['-nP', `-iTCP:${port}`, '-sTCP:LISTEN', '-t'], { encoding: 'utf8' });
  return Number(out.split('\n')[0]) || null;
}
