import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Registry } from '../shared/metrics.ts';

/** The worker's only port, and only when METRICS_PORT is set: `/metrics`, and `/healthz` and `/readyz` for probes. */
export interface MetricsServer {
  readonly port: number;
  stop(): Promise<void>;
}

export function startMetricsServer(parts: {
  host: string;
  port: number;
  registry: Registry;
  isReady: () => boolean;
}): Promise<MetricsServer> {
  const { registry } = parts;
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
  return new Promise((resolve, reject) => {
    server.once('error', (error) =>
      reject(
        new Error(`METRICS_PORT ${parts.port} on ${parts.host} cannot be listened on: ${error.message}`),
      ),
    );
    server.listen(parts.port, parts.host, () =>
      resolve({
        port: (server.address() as AddressInfo).port,
        stop: () =>
          new Promise((done) => {
            server.close(() => done());
            server.closeAllConnections();
          }),
      }),
    );
  });
}
