import type { PipelineSnapshot } from '../../shared/pipeline.ts';
import { isConnectionError } from '../../shared/redis.ts';
import type { GatewayMetrics } from '../metrics.ts';
import type { Origins } from '../origins.ts';
import type { HttpAnswer, HttpCall } from '../socket-server.ts';
import { isApiKey } from './api-key.ts';

/** HTTP beside the sockets: the page, health, metrics, the pipeline's numbers. */
export interface RouteParts {
  files: Map<string, HttpAnswer>;
  metrics: GatewayMetrics;
  /** Why this gateway is not ready, or null. */
  notReady: () => Promise<string | null>;
  pipeline: () => Promise<PipelineSnapshot>;
  /** The pipeline names users; it is open only where anybody may be anybody. */
  pipelineIsOpen: boolean;
  apiKeys: string[];
  /** Whether a user's token comes with the call, and not too often. */
  isUser: (call: HttpCall) => Promise<boolean>;
  /** The addresses of the live gateways. */
  nodeUrls: () => Promise<string[]>;
  /** Pages of other origins that may use this gateway may see its pipeline too. */
  origins: Origins;
  /** The HTTP API. */
  api: Record<string, Record<string, HttpRoute>>;
}

export type HttpRoute = (call: HttpCall) => Promise<HttpAnswer>;

export function createRoutes(parts: RouteParts): (call: HttpCall) => Promise<HttpAnswer> {
  const routes: Record<string, Record<string, HttpRoute>> = {
    ...parts.api,
    '/healthz': { GET: async () => text(200, 'ok\n') },
    '/readyz': {
      GET: async () => {
        const reason = await parts.notReady();
        return reason === null ? text(200, 'ready\n') : text(503, `not ready: ${reason}\n`);
      },
    },
    '/metrics': {
      GET: async () => ({
        status: 200,
        headers: { 'content-type': parts.metrics.registry.contentType, 'cache-control': 'no-store' },
        body: await parts.metrics.registry.metrics(),
      }),
    },
    '/pipeline': {
      GET: async (call) => {
        if (!parts.pipelineIsOpen && !isApiKey(call, parts.apiKeys))
          return json(401, {
            error: { code: 'unauthorized', message: 'the pipeline view needs an API key here' },
          });
        const answer = await unlessAway(async () => json(200, await parts.pipeline()));
        if (answer.status !== 200) return answer;
        const origin = call.headers.get('origin') ?? '';
        if (origin !== '' && parts.origins.allows(origin, call.headers.get('host') ?? ''))
          return {
            ...answer,
            headers: { ...answer.headers, 'access-control-allow-origin': origin, vary: 'origin' },
          };
        return answer;
      },
    },
    '/nodes': {
      GET: async (call) => {
        if (!(await parts.isUser(call)))
          return json(401, { error: { code: 'unauthorized', message: "a user's token is needed" } });
        return unlessAway(async () => {
          const urls = (await parts.nodeUrls()).filter((url) => URL.canParse(url));
          const loopback = (host: string) => host.replace('localhost', '127.0.0.1');
          const host = loopback(call.headers.get('host') ?? '');
          // Whoever came through a load balancer has no use for what is behind it.
          return json(200, { urls: urls.some((url) => loopback(new URL(url).host) === host) ? urls : [] });
        });
      },
    },
  };

  return async (call) => {
    const route = routes[call.path];
    if (route) {
      const handler = route[call.method === 'HEAD' ? 'GET' : call.method];
      if (handler) return handler(call);
      return text(405, `${call.path} answers ${Object.keys(route).join(', ')}.\n`, {
        allow: Object.keys(route).join(', '),
      });
    }
    const file = parts.files.get(call.path);
    if (file) {
      if (call.method === 'GET' || call.method === 'HEAD') return file;
      return text(405, `${call.path} answers GET.\n`, { allow: 'GET, HEAD' });
    }
    if (call.path === '/ws' || call.path === '/ai')
      return text(426, 'This is a WebSocket: connect with ws:// or wss://.\n', { upgrade: 'websocket' });
    return text(404, `Nothing is at ${call.path.slice(0, 200)}.\n`);
  };
}

/** 503 while Redis does not answer. */
async function unlessAway(answer: () => Promise<HttpAnswer>): Promise<HttpAnswer> {
  try {
    return await answer();
  } catch (error) {
    if (!isConnectionError(error)) throw error;
    return json(503, { error: { code: 'internal', message: 'Redis does not answer' } });
  }
}

export function text(status: number, body: string, headers: Record<string, string> = {}): HttpAnswer {
  return {
    status,
    headers: { 'content-type': 'text/plain; charset=utf-8', 'x-content-type-options': 'nosniff', ...headers },
    body,
  };
}

export function json(status: number, value: unknown): HttpAnswer {
  return {
    status,
    headers: {
      'content-type': 'application/json; charset=utf-8',
      'cache-control': 'no-store',
      'x-content-type-options': 'nosniff',
    },
    body: JSON.stringify(value),
  };
}
