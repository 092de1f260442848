import { spawn } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Certificate } from './certificate.ts';
import { eventually } from './eventually.ts';
import { freePort } from './free-port.ts';

/** The shipped load balancer configurations, run by the real programs on free ports. */
export interface LoadBalancer {
  readonly name: string;
  readonly url: string;
  readonly tlsUrl: string;
  readonly http: string;
  output(): string;
  stop(): Promise<void>;
}

export const INFRA = fileURLToPath(new URL('../../infra/', import.meta.url));

export async function startHaproxy(
  gateways: { port: number; host?: string }[],
  certificate: Certificate,
  config = `${INFRA}haproxy.cfg`,
): Promise<LoadBalancer & { stats: string }> {
  const [port, tlsPort, statsPort] = await freePorts(3);
  const addresses = gateways.map(({ host = '127.0.0.1', port }, index) => [
    `GATEWAY_${index + 1}`,
    `${host}:${port}`,
  ]);
  const balancer = await run('haproxy', process.env.HAPROXY ?? 'haproxy', ['-f', config], {
    ...Object.fromEntries(addresses),
    HTTP_BIND: `127.0.0.1:${port}`,
    TLS_BIND: `127.0.0.1:${tlsPort}`,
    STATS_BIND: `127.0.0.1:${statsPort}`,
    TLS_CERT: certificate.both,
  });
  return { ...balancer(port!, tlsPort!), stats: `http://127.0.0.1:${statsPort}` };
}

/** nginx reads no environment: the lines that its comment says to edit are edited here, nothing else. */
export async function startNginx(
  gateways: { port: number }[],
  certificate: Certificate,
  dir: string,
): Promise<LoadBalancer> {
  const [port, tlsPort] = await freePorts(2);
  const servers = gateways.map(
    (gateway) => `server 127.0.0.1:${gateway.port} weight=16 max_fails=1 fail_timeout=2s;`,
  );
  const config = readFileSync(`${INFRA}nginx.conf`, 'utf8')
    .replace(/server gateway-1:8080[^;]*;\s*server gateway-2:8080[^;]*;/, servers.join('\n'))
    .replace('listen 8000;', `listen 127.0.0.1:${port};`)
    .replace('listen 8443 ssl;', `listen 127.0.0.1:${tlsPort} ssl;`)
    .replace('/etc/ssl/rivulet.pem', certificate.cert)
    .replace('/etc/ssl/rivulet.key', certificate.key)
    .replaceAll('/tmp/rivulet-nginx', join(dir, 'nginx'));
  const path = join(dir, 'nginx.conf');
  writeFileSync(path, config);
  const balancer = await run(
    'nginx',
    process.env.NGINX ?? 'nginx',
    ['-c', path, '-p', dir, '-g', 'daemon off;'],
    {},
  );
  return balancer(port!, tlsPort!);
}

async function freePorts(count: number): Promise<number[]> {
  const ports = new Set<number>();
  while (ports.size < count) ports.add(await freePort());
  return [...ports];
}

async function run(name: string, program: string, args: string[], env: Record<string, string>) {
  const child = spawn(program, args, {
    env: { PATH: process.env.PATH, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (chunk) => {
      output = (output + chunk).slice(-20_000);
    });
  let hasExited = false;
  const exited = new Promise<void>((resolve) => {
    child.on('error', (error) => {
      output += error.message;
      hasExited = true;
      resolve();
    });
    child.on('exit', () => {
      hasExited = true;
      resolve();
    });
  });
  return (port: number, tlsPort: number): LoadBalancer => ({
    name,
    url: `ws://127.0.0.1:${port}/ws`,
    tlsUrl: `wss://127.0.0.1:${tlsPort}/ws`,
    http: `http://127.0.0.1:${port}`,
    output: () => output,
    async stop() {
      if (!hasExited) child.kill('SIGTERM');
      const timer = setTimeout(() => child.kill('SIGKILL'), 2_000);
      await exited;
      clearTimeout(timer);
    },
  });
}

/** Waits until requests get through. */
export async function untilItServes(balancer: LoadBalancer): Promise<void> {
  await eventually(`answer of ${balancer.name}: ${balancer.output()}`, async () => {
    const response = await fetch(`${balancer.http}/readyz`).catch(() => null);
    await response?.arrayBuffer();
    return response?.status === 200;
  });
}
