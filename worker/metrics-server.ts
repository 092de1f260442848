import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from '../shared/logger.ts';
import type { Registry } from '../shared/metrics.ts';

/**
 * The worker's only port, and only when METRICS_PORT is set: `/metrics`, and `/healthz` and `/readyz` for probes.
 *
 * A port that is taken keeps no worker from its work: it is asked for again until it is free. Workers of an autoscaler that
 * died drain for minutes, and those of the next one come to the same ports. Where a platform probes the port, its
 * probes say that nobody is there.
 */
export interface MetricsServer {
  stop(): Promise<void>;
}

const AGAIN_MS = 2_000;

/** @throws Error when it can never listen there */
export async function startMetricsServer(parts: {
  host: string;
  port: number;
  registry: Registry;
  isReady: () => boolean;
  log: Logger;
}): Promise<MetricsServer> {
  const { registry, host, port, log } = parts;
  const server = createServer(async (request, response) => {
    const answer = (status: number, body: string, type = 'text/plain; charset=utf-8') =>
      response.writeHead(status, { 'content-type': type, 'cache-control': 'no-store' }).end(body);
    if (request.method !== 'GET' && request.method !== 'HEAD') return answer(405, 'GET only.\n');
    switch (request.url) {
      case '/metrics':
        return answer(200, await registry.metrics(), registry.contentType);
      case '/healthz':
        return answer(200, 'ok\n');
      case '/readyz':
        return parts.isReady() ? answer(200, 'ready\n') : answer(503, 'not ready: no connection to Redis\n');
      default:
        return answer(404, 'Here are /metrics, /healthz and /readyz.\n');
    }
  });
  server.on('error', () => {}); // `open` hears of those that matter; numbers are not worth a worker

  /** False while somebody else has the port. */
  async function open(): Promise<boolean> {
    server.listen(port, host);
    try {
      await once(server, 'listening');
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException;
      if (code === 'EADDRINUSE') return false;
      throw new Error(`METRICS_PORT ${port} on ${host} cannot be listened on: ${message}`);
    }
    log.info({ host, port: (server.address() as AddressInfo).port }, 'metrics');
    return true;
  }

  const stopping = new AbortController();
  async function openLater(): Promise<void> {
    while (!stopping.signal.aborted) {
      await delay(AGAIN_MS, undefined, { signal: stopping.signal }).catch(() => {});
      if (stopping.signal.aborted || (await open())) return;
    }
  }

  let opening = Promise.resolve();
  if (!(await open())) {
    log.warn({ host, port }, 'METRICS_PORT is taken; going on without metrics until it is free');
    opening = openLater().catch((error: Error) => log.error({ err: error.message }, 'no metrics'));
  }
  return {
    async stop() {
      stopping.abort();
      await opening;
      if (!server.listening) return;
      const closed = once(server, 'close');
      server.close();
      server.closeAllConnections();
      await closed;
    },
  };
}
