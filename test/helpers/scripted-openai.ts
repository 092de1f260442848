import { createServer, type IncomingHttpHeaders, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';

/**
 * A real HTTP server that speaks chat completions as a test dictates, chunk by chunk:
 *
 *     const server = await startScriptedOpenAi(t);
 *     … ask through the `openai` handler at server.baseUrl …
 *     const call = await server.next();
 *     call.token('Hello');
 *     call.finish('stop');
 *
 * It does nothing by itself: a call that the test leaves alone hangs, until the teardown cuts it.
 */
export interface ScriptedOpenAi {
  /** `http://127.0.0.1:<port>/v1` */
  readonly baseUrl: string;
  readonly port: number;
  /** How many TCP connections were opened so far. */
  readonly connections: number;
  /** How many requests came so far, taken by `next()` or not. */
  readonly requests: number;
  /** The next request that no `next()` has taken yet. Fails after 10 s without one. */
  next(): Promise<ScriptedCall>;
  /** Answers the next `count` requests by itself with these tokens and a finish reason. */
  autoAnswer(tokens: readonly string[], count?: number): void;
  /** Cuts every connection and stops to listen. Also the teardown. */
  stop(): Promise<void>;
}

export interface ScriptedCall {
  readonly path: string;
  readonly headers: IncomingHttpHeaders;
  // biome-ignore lint/suspicious/noExplicitAny: tests look into whatever was sent
  readonly body: any;
  /** Sends the head of an event stream now; the first chunk does it too. */
  open(headers?: Record<string, string>): void;
  /** A chunk with text. */
  token(text: string): void;
  /** Any object as a chunk. */
  chunk(value: unknown): void;
  /** These very bytes. */
  raw(bytes: string | Uint8Array): void;
  usage(promptTokens: number, completionTokens: number): void;
  finishReason(reason: string): void;
  /** `[DONE]` and the end. */
  done(): void;
  /** Finish reason, `[DONE]` and the end. */
  finish(reason?: string): void;
  /** The end, with nothing more said. */
  end(): void;
  /** Cuts the connection after what was written so far. */
  cut(): void;
  /** A whole answer other than a stream; objects go as JSON. */
  respond(status: number, body: unknown, headers?: Record<string, string>): void;
  /** Resolves when the exchange is over: `complete` if our answer went out whole, else `aborted`. */
  readonly closed: Promise<'complete' | 'aborted'>;
}

/** Anything with node:test's `after`, so that suites can own a server too. */
export interface TeardownOwner {
  after(fn: () => Promise<void>): void;
}

const NEXT_DEADLINE_MS = 10_000;

export async function startScriptedOpenAi(owner: TeardownOwner): Promise<ScriptedOpenAi> {
  const arrived: ScriptedCall[] = [];
  const waiting: { take: (call: ScriptedCall) => void; fail: (error: Error) => void }[] = [];
  let connections = 0;
  let requests = 0;
  let automatic: { tokens: readonly string[]; left: number } = { tokens: [], left: 0 };

  const server = createServer((request, response) => {
    const parts: Buffer[] = [];
    request.on('data', (part: Buffer) => parts.push(part));
    request.on('error', () => {}); // a client that leaves is told by `closed`
    request.on('end', () => {
      requests++;
      const text = Buffer.concat(parts).toString();
      const call = createCall(request.url ?? '', request.headers, text, response);
      if (automatic.left > 0) {
        automatic.left--;
        for (const token of automatic.tokens) call.token(token);
        call.finish();
        return;
      }
      const waiter = waiting.shift();
      if (waiter) waiter.take(call);
      else arrived.push(call);
    });
  });
  server.on('connection', () => connections++);
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(0, '127.0.0.1', resolve);
  });

  let stopping: Promise<void> | undefined;
  const stop = () => {
    stopping ??= new Promise<void>((resolve) => {
      for (const waiter of waiting.splice(0)) waiter.fail(new Error('the scripted server stopped'));
      server.close(() => resolve());
      server.closeAllConnections();
    });
    return stopping;
  };
  owner.after(stop);

  const { port } = server.address() as AddressInfo;
  return {
    baseUrl: `http://127.0.0.1:${port}/v1`,
    port,
    get connections() {
      return connections;
    },
    get requests() {
      return requests;
    },
    next() {
      const call = arrived.shift();
      if (call) return Promise.resolve(call);
      return new Promise((resolve, reject) => {
        const waiter = {
          take: (next: ScriptedCall) => {
            clearTimeout(deadline);
            resolve(next);
          },
          fail: (error: Error) => {
            clearTimeout(deadline);
            reject(error);
          },
        };
        const deadline = setTimeout(() => {
          waiting.splice(waiting.indexOf(waiter), 1);
          reject(new Error(`no request came to the scripted server within ${NEXT_DEADLINE_MS} ms`));
        }, NEXT_DEADLINE_MS);
        waiting.push(waiter);
      });
    },
    autoAnswer(tokens, count = Number.POSITIVE_INFINITY) {
      automatic = { tokens, left: count };
    },
    stop,
  };
}

function createCall(
  path: string,
  headers: IncomingHttpHeaders,
  text: string,
  response: ServerResponse,
): ScriptedCall {
  response.on('error', () => {});
  const closed = new Promise<'complete' | 'aborted'>((resolve) => {
    response.once('close', () => resolve(response.writableFinished ? 'complete' : 'aborted'));
  });
  const call: ScriptedCall = {
    path,
    headers,
    body: text === '' ? undefined : JSON.parse(text),
    closed,
    open(extra = {}) {
      if (response.headersSent) return;
      response.writeHead(200, { 'content-type': 'text/event-stream', ...extra });
      response.flushHeaders();
    },
    raw(bytes) {
      call.open();
      response.write(bytes);
    },
    chunk(value) {
      call.raw(`data: ${JSON.stringify(value)}\n\n`);
    },
    token(content) {
      call.chunk({ choices: [{ index: 0, delta: { content }, finish_reason: null }] });
    },
    usage(promptTokens, completionTokens) {
      call.chunk({
        choices: [],
        usage: { prompt_tokens: promptTokens, completion_tokens: completionTokens },
      });
    },
    finishReason(reason) {
      call.chunk({ choices: [{ index: 0, delta: {}, finish_reason: reason }] });
    },
    done() {
      call.open();
      response.end('data: [DONE]\n\n');
    },
    finish(reason = 'stop') {
      call.finishReason(reason);
      call.done();
    },
    end() {
      call.open();
      response.end();
    },
    cut() {
      // Soon: what was written before still goes out.
      response.socket?.destroySoon();
    },
    respond(status, body, extra = {}) {
      const isText = typeof body === 'string';
      response.writeHead(status, {
        'content-type': isText ? 'text/plain' : 'application/json',
        ...extra,
      });
      response.end(isText ? body : JSON.stringify(body));
    },
  };
  return call;
}
