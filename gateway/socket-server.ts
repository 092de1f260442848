import uws, { type HttpRequest, type HttpResponse, type ListenSocket, type WebSocket } from 'uWebSockets.js';
import { STATUS_CODES } from 'node:http';
import { nowMs } from './now-ms.ts';

/**
 * The only file that knows uWebSockets.js. It turns its sockets into `Connection`s and its HTTP into plain
 * request and response objects. Request data is copied before anything is awaited, because uWS frees it.
 *
 * What is sent to a connection in one turn leaves in one corked write at the end of that turn, or of one of the next. A
 * connection that holds more than `SLOW_BYTES` unsent is slow: whoever has a stream for it stops pushing until it drains.
 */

export const SLOW_BYTES = 256 * 1024; // about 2,000 token frames
const DROP_BYTES = 16 * 1024 * 1024; // never reached by streams; a frame beyond it would be dropped by uWS, so we close first
const WRITES_PER_TURN = 64; // about 10 µs each: what comes in is read between these
const WATCH_SHARE = 1 / 20; // of the heartbeat: how often everybody is looked at
const LOOKS_PER_TURN = 2_000; // some 50 ns each
const PINGS_PER_TURN = 64; // or closes, about 15 to 30 µs each
const WHOLE_BYTES = 15_000; // of a frame: see sendText
const BODY_BYTES = 1024 * 1024;
const BODY_MS = 10_000;
const FORWARDED_FOR = 'x-forwarded-for';

export interface UpgradeRequest {
  url: string;
  query: URLSearchParams;
  origin: string;
  host: string;
  authorization: string;
  address: string;
  /** What proxies say about the address; believed only from TRUSTED_PROXIES. */
  forwardedFor: string;
}

export interface HttpCall {
  method: string;
  path: string;
  query: URLSearchParams;
  headers: Map<string, string>;
  body: Buffer;
  address: string;
}

export interface HttpAnswer {
  status: number;
  headers?: Record<string, string>;
  body?: string | Uint8Array;
  /** Instead of a body: called once the head is out, writes when it likes. With a closed stream if the client left before. */
  stream?: (stream: HttpStream) => StreamPeer;
}

/** A body that is written bit by bit. Bounded like a connection: whoever writes stops while it is slow. */
export interface HttpStream {
  write(text: string): void;
  end(): void;
  readonly open: boolean;
  readonly slow: boolean;
}

export interface StreamPeer {
  onDrain(): void;
  /** The client has left, or the server stops; not called after `end`. */
  onClose(): void;
}

/** What a connection does with what comes in. */
export interface Peer {
  onText(text: string): void;
  onDrain(): void;
  onClose(): void;
  /** The answer to a ping with this payload. */
  onPong?(payload: string): void;
}

export interface SocketServerOptions {
  maxFrameBytes: number;
  /** How long a client may be silent before it is pinged; after three times that it is closed. */
  heartbeatMs: number;
  /** Null lets the upgrade go on, else the HTTP answer that refuses it. */
  refuseUpgrade(request: UpgradeRequest): HttpAnswer | null;
  connect(connection: Connection, request: UpgradeRequest): Peer;
  answer(call: HttpCall): Promise<HttpAnswer>;
  /** The answer to a call whose body is too large or too slow, at once; null = in plain text. */
  refuseBody?(call: HttpCall, status: 413 | 408, message: string): HttpAnswer | null;
  close: { noHeartbeat: number; payloadTooLarge: number; protocolViolation: number; slowClient: number };
  onError(error: unknown, where: string): void;
}

/** uWS copies these fields onto its socket, so a class instance must be held, not be, the user data. */
interface UserData {
  connection: Connection;
}

/** One client's socket. */
export class Connection {
  peer: Peer | null = null;
  private socket: WebSocket<UserData> | null = null;
  private outbox: string[] | null = null;
  private queuedBytes = 0;
  /** What uWS holds for it, as it was last asked: after every write, and when that gets less. */
  private unsentBytes = 0;
  lastSeenMs = nowMs();
  pingedMs = 0;
  private readonly server: { readonly slowCode: number; dirty(connection: Connection, soon: boolean): void };
  private request: UpgradeRequest | null;

  constructor(server: Connection['server'], request: UpgradeRequest) {
    this.server = server;
    this.request = request;
  }

  get open(): boolean {
    return this.socket !== null;
  }

  /** True while so much is unsent that streams should pause. */
  get slow(): boolean {
    return this.socket !== null && this.queuedBytes + this.unsentBytes > SLOW_BYTES;
  }

  /**
   * Sends at the end of this turn, or, when very many have something to be sent, in one of the next.
   * Nothing happens on a closed connection.
   * @param soon goes, with all that waits here, before what only continues something
   */
  send(text: string, soon = false): void {
    if (!this.socket) return;
    this.queuedBytes += text.length;
    if (this.outbox) {
      this.outbox.push(text);
      if (!soon) return;
    } else this.outbox = [text];
    this.server.dirty(this, soon);
  }

  close(code: number, reason: string): void {
    if (!this.socket) return;
    this.write();
    this.socket?.end(code, reason.slice(0, 120)); // a close frame holds 123 bytes of reason
  }

  // What the server calls.

  opened(socket: WebSocket<UserData>): UpgradeRequest {
    this.socket = socket;
    const request = this.request!;
    this.request = null; // not kept for idle sockets
    return request;
  }

  closed(): void {
    this.socket = null;
    this.outbox = null;
  }

  drained(): void {
    this.unsentBytes = this.socket?.getBufferedAmount() ?? 0;
    this.peer?.onDrain();
  }

  /** Its answer comes after all that was sent before it has arrived. */
  ping(payload = ''): void {
    this.flush();
    this.socket?.ping(payload);
  }

  /** Writes what waits, and looks at how far the client is behind. */
  flush(): void {
    const wasSlow = this.queuedBytes > SLOW_BYTES;
    if (!this.write()) return;
    const socket = this.socket!;
    this.unsentBytes = socket.getBufferedAmount();
    if (this.unsentBytes > DROP_BYTES / 2) socket.end(this.server.slowCode, 'too far behind');
    else if (wasSlow && !this.slow) this.peer?.onDrain(); // all of it has left at once: uWS tells of no drain then
  }

  /** False when nothing waited. */
  private write(): boolean {
    const { socket, outbox } = this;
    this.outbox = null;
    this.queuedBytes = 0;
    if (!socket || !outbox) return false;
    if (outbox.length === 1) sendText(socket, outbox[0]!);
    else
      socket.cork(() => {
        for (const text of outbox) sendText(socket, text);
      });
    return true;
  }
}

/** One answer that is written bit by bit; what is written in one turn leaves in one write. */
class ResponseStream implements HttpStream {
  peer: StreamPeer | null = null;
  private response: HttpResponse | null;
  private outbox = '';
  private scheduled = false;
  private blocked = false;
  private ending = false;
  private readonly onGone: (stream: ResponseStream) => void;

  constructor(response: HttpResponse, onGone: (stream: ResponseStream) => void) {
    this.response = response;
    this.onGone = onGone;
  }

  get open(): boolean {
    return this.response !== null && !this.ending;
  }

  get slow(): boolean {
    return this.blocked || this.outbox.length > SLOW_BYTES;
  }

  write(text: string): void {
    if (!this.open) return;
    this.outbox += text;
    this.schedule();
  }

  end(): void {
    if (!this.open) return;
    this.ending = true;
    this.schedule();
  }

  private schedule(): void {
    if (this.scheduled) return;
    this.scheduled = true;
    queueMicrotask(() => this.flush());
  }

  private flush(): void {
    this.scheduled = false;
    const { response, outbox } = this;
    if (!response) return;
    const wasSlow = this.slow;
    this.outbox = '';
    response.cork(() => {
      if (outbox !== '' && !response.write(outbox)) {
        this.blocked = true;
        response.onWritable(() => {
          this.blocked = false;
          this.peer?.onDrain();
          return true;
        });
      }
      if (this.ending) response.end();
    });
    if (this.ending) this.gone();
    else if (wasSlow && !this.slow) this.peer?.onDrain(); // all of it has left at once: uWS tells of no drain then
  }

  /** The client has left. */
  aborted(): void {
    if (!this.response) return;
    const { peer } = this;
    this.gone();
    peer?.onClose();
  }

  cut(): void {
    this.response?.close(); // uWS calls onAborted
  }

  private gone(): void {
    this.response = null;
    this.outbox = '';
    this.peer = null;
    this.onGone(this);
  }
}

/**
 * Sends one text message. A frame of 16 KB or more that meets unsent bytes of earlier ones arrives as garbage with this
 * build of uWS (its cork buffer has that size): long messages leave as fragments below it.
 */
function sendText(socket: WebSocket<UserData>, text: string): void {
  const { length } = text;
  if (length * 3 < WHOLE_BYTES) {
    socket.send(text);
    return;
  }
  const bytes = Buffer.byteLength(text);
  if (bytes < WHOLE_BYTES) {
    socket.send(text);
    return;
  }
  const step = Math.floor(bytes === length ? WHOLE_BYTES : WHOLE_BYTES / 3); // of UTF-16 units
  for (let from = 0; from < length; ) {
    let to = Math.min(length, from + step);
    if (to < length && (text.charCodeAt(to - 1) & 0xfc00) === 0xd800) to--; // not between the halves of a character
    const part = text.slice(from, to);
    if (from === 0) socket.sendFirstFragment(part);
    else if (to < length) socket.sendFragment(part);
    else socket.sendLastFragment(part);
    from = to;
  }
}

/**
 * Copies the headers. Lines of X-Forwarded-For are one list in their order: a proxy may add its line behind the client's.
 * Of any other header that comes twice the last line counts.
 */
function readHeaders(request: HttpRequest): Map<string, string> {
  const headers = new Map<string, string>();
  request.forEachHeader((name, value) => {
    const before = name === FORWARDED_FOR ? headers.get(name) : undefined;
    headers.set(name, before === undefined ? value : `${before},${value}`);
  });
  return headers;
}

export interface SocketServer {
  readonly port: number;
  readonly connections: ReadonlySet<Connection>;
  /** Cuts what is still being streamed over HTTP; its clients see a lost connection, and come back. */
  cutStreams(): void;
  /** Refuses new sockets and HTTP from now on; open sockets stay. */
  stop(): void;
}

/**
 * Listens on a host and port (0 = any).
 * @throws Error when the port is taken: `EADDRINUSE`-like, one line
 */
export function listen(
  host: string,
  port: number,
  options: SocketServerOptions,
  tls?: { keyFile: string; certFile: string },
): Promise<SocketServer> {
  const app = tls ? uws.SSLApp({ key_file_name: tls.keyFile, cert_file_name: tls.certFile }) : uws.App();
  const connections = new Set<Connection>();
  const streams = new Set<ResponseStream>();
  /** Who has something to be sent; whoever is sent to sooner is in both. */
  const dirty: Connection[] = [];
  let first: Connection[] = [];
  let flushing = false;
  const server = {
    slowCode: options.close.slowClient,
    dirty(connection: Connection, soon: boolean) {
      if (soon) first.push(connection);
      else dirty.push(connection);
      if (flushing) return;
      flushing = true;
      queueMicrotask(flush);
    },
  };

  /** Writes for one turn. What comes for the others meanwhile leaves with what they have. */
  function flush(): void {
    const batch = first;
    first = [];
    if (batch.length < WRITES_PER_TURN) batch.push(...dirty.splice(0, WRITES_PER_TURN - batch.length));
    for (const connection of batch) connection.flush();
    flushing = first.length + dirty.length > 0;
    if (flushing) setImmediate(flush);
  }

  app.ws<UserData>('/*', {
    // Room above our own bound, so that a frame that is too long can be answered with a code.
    maxPayloadLength: options.maxFrameBytes * 8,
    maxBackpressure: DROP_BYTES,
    // `watch` below pings, and closes with a code of ours, long before. This is for sockets that we have closed: a client
    // that reads a little of what is left, and then no more, would keep its descriptor and all of that for ever.
    idleTimeout: 120, // s
    sendPingsAutomatically: false,
    compression: uws.DISABLED,
    upgrade(response, request, context) {
      const query = new URLSearchParams(request.getQuery());
      const upgrade: UpgradeRequest = {
        url: request.getUrl(),
        query,
        origin: request.getHeader('origin'),
        host: request.getHeader('host'),
        authorization: request.getHeader('authorization'),
        address: Buffer.from(response.getRemoteAddressAsText()).toString(),
        forwardedFor: readHeaders(request).get(FORWARDED_FOR) ?? '',
      };
      const refusal =
        request.getHeader('sec-websocket-version') === '13'
          ? options.refuseUpgrade(upgrade)
          : { status: 426, headers: { 'sec-websocket-version': '13' }, body: 'Version 13 is spoken here.\n' };
      if (refusal) {
        writeAnswer(response, refusal);
        return;
      }
      response.upgrade(
        { connection: new Connection(server, upgrade) },
        request.getHeader('sec-websocket-key'),
        request.getHeader('sec-websocket-protocol'),
        request.getHeader('sec-websocket-extensions'),
        context,
      );
    },
    open(socket) {
      const connection = socket.getUserData().connection;
      connections.add(connection);
      connection.peer = options.connect(connection, connection.opened(socket));
    },
    message(socket, message, isBinary) {
      const connection = socket.getUserData().connection;
      connection.lastSeenMs = nowMs();
      if (message.byteLength > options.maxFrameBytes) {
        connection.close(options.close.payloadTooLarge, `a frame may have ${options.maxFrameBytes} bytes`);
        return;
      }
      if (isBinary) {
        connection.close(options.close.protocolViolation, 'frames must be text');
        return;
      }
      try {
        connection.peer?.onText(Buffer.from(message).toString());
      } catch (error) {
        options.onError(error, 'message');
      }
    },
    drain(socket) {
      socket.getUserData().connection.drained();
    },
    ping(socket) {
      socket.getUserData().connection.lastSeenMs = nowMs();
    },
    pong(socket, payload) {
      const { connection } = socket.getUserData();
      connection.lastSeenMs = nowMs();
      if (payload.byteLength > 0) connection.peer?.onPong?.(Buffer.from(payload).toString());
    },
    close(socket) {
      const connection = socket.getUserData().connection;
      connections.delete(connection);
      connection.closed();
      connection.peer?.onClose();
      connection.peer = null;
    },
  });

  app.any('/*', (response, request) => {
    const call: HttpCall = {
      method: request.getMethod().toUpperCase(),
      path: request.getUrl(),
      query: new URLSearchParams(request.getQuery()),
      headers: readHeaders(request),
      body: Buffer.alloc(0),
      address: Buffer.from(response.getRemoteAddressAsText()).toString(),
    };
    let hasAnswer = false;
    let hasLeft = false;
    let stream: ResponseStream | null = null;
    /** @param cut the rest of the request is not wanted: the connection goes with the answer */
    const reply = (answer: HttpAnswer, cut = false) => {
      if (hasAnswer) return;
      hasAnswer = true;
      if (!answer.stream) {
        if (!hasLeft) response.cork(() => writeAnswer(response, answer, call.method === 'HEAD', cut));
        return;
      }
      stream = new ResponseStream(response, (gone) => streams.delete(gone));
      if (hasLeft) {
        stream.aborted();
        answer.stream(stream).onClose(); // whoever made it lets go of it
        return;
      }
      streams.add(stream);
      response.cork(() => writeHead(response, answer));
      stream.peer = answer.stream(stream);
    };
    const refuse = (status: 413 | 408, message: string) =>
      reply(options.refuseBody?.(call, status, message) ?? { status, body: `${message}\n` }, true);
    response.onAborted(() => {
      hasLeft = true;
      stream?.aborted();
    });
    // Looked at when bytes come, never by a timer: uWS closes silent and dripping bodies itself, and sometimes frees
    // the response of a request behind a `connection: close`, before its data, without `onAborted` (the fuzzer saw
    // the crash that a timer made of that). After the last data, `onAborted` can be relied on.
    const startedMs = performance.now();
    const parts: Buffer[] = [];
    let size = 0;
    response.onData((chunk, isLast) => {
      if (hasAnswer || hasLeft) return;
      size += chunk.byteLength;
      if (size > BODY_BYTES) {
        refuse(413, `A request body may have ${BODY_BYTES} bytes.`);
        return;
      }
      parts.push(Buffer.from(Buffer.from(chunk))); // copied: uWS takes the chunk back
      if (!isLast) {
        if (performance.now() - startedMs > BODY_MS) refuse(408, 'The request body did not arrive in time.');
        return;
      }
      call.body = Buffer.concat(parts);
      options.answer(call).then(
        (answer) => reply(answer),
        (error) => {
          options.onError(error, `${call.method} ${call.path}`);
          reply({ status: 500, body: 'Something went wrong on our side.\n' });
        },
      );
    });
  });

  const { heartbeatMs } = options;
  let ring = connections.values();
  let isWatching = false;
  /** Looks at some, pings few. Who has been silent since the same moment is not pinged all at once. */
  function watch(): void {
    const now = nowMs();
    for (let looks = 0, pings = 0; looks < LOOKS_PER_TURN && pings < PINGS_PER_TURN; looks++) {
      const { value: connection, done } = ring.next();
      isWatching = !done;
      if (done) return;
      const silentMs = now - connection.lastSeenMs;
      if (silentMs < heartbeatMs) continue;
      if (silentMs >= 3 * heartbeatMs) connection.close(options.close.noHeartbeat, 'no heartbeat');
      else if (now - connection.pingedMs >= heartbeatMs) {
        connection.pingedMs = now;
        connection.ping();
      } else continue;
      pings++;
    }
    setImmediate(watch);
  }
  const watching = setInterval(() => {
    if (isWatching) return; // the last round is still under way
    ring = connections.values();
    watch();
  }, heartbeatMs * WATCH_SHARE);

  return new Promise((resolve, reject) => {
    app.listen(host, port, uws.LIBUS_LISTEN_EXCLUSIVE_PORT, (socket) => {
      if (!socket) {
        clearInterval(watching);
        reject(
          new Error(
            `PORT ${port} on HOST ${host} cannot be listened on: the port is taken, or not allowed, or the host is no address of this machine`,
          ),
        );
        return;
      }
      let listening: ListenSocket | null = socket;
      resolve({
        port: (uws.us_socket_local_port ?? uws.getSocketPort)!(socket),
        connections,
        cutStreams() {
          for (const one of [...streams]) one.cut();
        },
        stop() {
          clearInterval(watching);
          if (listening) (uws.us_listen_socket_close ?? uws.closeSocket)!(listening);
          listening = null;
        },
      });
    });
  });
}

function writeAnswer(response: HttpResponse, answer: HttpAnswer, isHead = false, cut = false): void {
  writeHead(response, answer);
  const { body = '' } = answer;
  if (isHead) response.endWithoutBody(Buffer.byteLength(body), cut);
  else response.end(body, cut);
}

function writeHead(response: HttpResponse, answer: HttpAnswer): void {
  response.writeStatus(`${answer.status} ${STATUS_CODES[answer.status] ?? ''}`);
  const headers = answer.headers ?? { 'content-type': 'text/plain; charset=utf-8' };
  for (const [name, value] of Object.entries(headers)) response.writeHeader(name, value);
}
