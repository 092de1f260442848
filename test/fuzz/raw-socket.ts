import { randomBytes } from 'node:crypto';
import { connect, type Socket } from 'node:net';

/**
 * A TCP connection that says whatever it is told to, byte by byte: what no WebSocket or HTTP library would send.
 */
export interface RawSocket {
  readonly socket: Socket;
  /** All bytes that came so far and were not taken. */
  received: Buffer;
  /** Settles when the connection is over, however it ended. */
  readonly closed: Promise<void>;
  readonly isClosed: boolean;
  write(bytes: string | Uint8Array): void;
  /** Waits until the test finds what it looks for in the bytes; undefined when the connection ends first. */
  until<T>(find: (received: Buffer) => T | undefined, timeoutMs?: number): Promise<T | undefined>;
  /** The next WebSocket frame; undefined when the connection ends first. */
  frame(timeoutMs?: number): Promise<Frame | undefined>;
  destroy(): void;
}

export interface Frame {
  fin: boolean;
  rsv: number;
  opcode: number;
  payload: Buffer;
}

export const OPCODE = { continuation: 0, text: 1, binary: 2, close: 8, ping: 9, pong: 10 } as const;
const TIMEOUT_MS = 10_000;

export function openRaw(port: number): Promise<RawSocket> {
  return new Promise((resolve, reject) => {
    const socket = connect({ port, host: '127.0.0.1', noDelay: true });
    let isClosed = false;
    let wake = () => {};
    const closed = new Promise<void>((done) => {
      socket.on('close', () => {
        isClosed = true;
        done();
        wake();
      });
    });
    socket.on('error', reject); // once it is open, a reset is an end like another
    const raw: RawSocket = {
      socket,
      received: Buffer.alloc(0),
      closed,
      get isClosed() {
        return isClosed;
      },
      write(bytes) {
        if (!isClosed && socket.writable) socket.write(bytes);
      },
      until(find, timeoutMs = TIMEOUT_MS) {
        return new Promise((found, failed) => {
          const timer = setTimeout(
            () =>
              failed(new Error(`not within ${timeoutMs} ms; received: ${raw.received.toString('latin1')}`)),
            timeoutMs,
          );
          wake = () => {
            const value = find(raw.received);
            if (value === undefined && !isClosed) return;
            clearTimeout(timer);
            wake = () => {};
            found(value);
          };
          wake();
        });
      },
      frame(timeoutMs) {
        return raw.until(() => {
          const read = readFrame(raw.received);
          if (!read) return undefined;
          raw.received = raw.received.subarray(read.length);
          return read.frame;
        }, timeoutMs);
      },
      destroy: () => socket.destroy(),
    };
    socket.on('data', (data) => {
      raw.received = raw.received.length === 0 ? data : Buffer.concat([raw.received, data]);
      wake();
    });
    socket.on('connect', () => resolve(raw));
  });
}

export function handshakeText(
  path: string,
  headers: Record<string, string> = {},
  requestLine = `GET ${path} HTTP/1.1`,
): string {
  const all: Record<string, string> = {
    host: '127.0.0.1',
    upgrade: 'websocket',
    connection: 'Upgrade',
    'sec-websocket-key': randomBytes(16).toString('base64'),
    'sec-websocket-version': '13',
    ...headers,
  };
  return `${requestLine}\r\n${Object.entries(all)
    .map(([name, value]) => `${name}: ${value}\r\n`)
    .join('')}\r\n`;
}

/** Opens a WebSocket; `head` is what the server answered. */
export async function openRawWebSocket(
  port: number,
  path = '/ws',
  headers: Record<string, string> = {},
): Promise<RawSocket & { head: string }> {
  const raw = await openRaw(port);
  raw.write(handshakeText(path, headers));
  const head = await takeHead(raw);
  if (!head?.startsWith('HTTP/1.1 101')) throw new Error(`no upgrade: ${head}`);
  return Object.assign(raw, { head });
}

/** Takes one HTTP head out of what was received. */
export function takeHead(raw: RawSocket): Promise<string | undefined> {
  return raw.until((received) => {
    const end = received.indexOf('\r\n\r\n');
    if (end < 0) return undefined;
    raw.received = received.subarray(end + 4);
    return received.toString('latin1', 0, end);
  });
}

/** A client's frame; everything that can be wrong with one can be chosen. */
export function encodeFrame(
  opcode: number,
  payload: string | Uint8Array = '',
  options: { fin?: boolean; rsv?: number; masked?: boolean; mask?: Buffer; length?: bigint } = {},
): Buffer {
  const body = Buffer.from(payload as string);
  const { fin = true, rsv = 0, masked = true, mask = MASK } = options;
  const length = options.length ?? BigInt(body.length);
  const first = (fin ? 0x80 : 0) | (rsv << 4) | opcode;
  const bit = masked ? 0x80 : 0;
  let head: Buffer;
  if (length < 126n) head = Buffer.from([first, bit | Number(length)]);
  else if (length < 65_536n) {
    head = Buffer.from([first, bit | 126, 0, 0]);
    head.writeUInt16BE(Number(length), 2);
  } else {
    head = Buffer.from([first, bit | 127, 0, 0, 0, 0, 0, 0, 0, 0]);
    head.writeBigUInt64BE(length, 2);
  }
  if (!masked) return Buffer.concat([head, body]);
  for (let index = 0; index < body.length; index++) body[index] = body[index]! ^ mask[index & 3]!;
  return Buffer.concat([head, mask, body]);
}

const MASK = Buffer.from([0x37, 0xfa, 0x21, 0x3d]);

export function closePayload(code: number, reason: string | Uint8Array = ''): Buffer {
  const head = Buffer.alloc(2);
  head.writeUInt16BE(code);
  return Buffer.concat([head, Buffer.from(reason as string)]);
}

function readFrame(bytes: Buffer): { frame: Frame; length: number } | undefined {
  if (bytes.length < 2) return undefined;
  let length = bytes[1]! & 0x7f;
  let at = 2;
  if (length === 126) {
    if (bytes.length < 4) return undefined;
    length = bytes.readUInt16BE(2);
    at = 4;
  } else if (length === 127) {
    if (bytes.length < 10) return undefined;
    length = Number(bytes.readBigUInt64BE(2));
    at = 10;
  }
  if (bytes.length < at + length) return undefined;
  return {
    frame: {
      fin: (bytes[0]! & 0x80) !== 0,
      rsv: (bytes[0]! >> 4) & 7,
      opcode: bytes[0]! & 15,
      payload: Buffer.from(bytes.subarray(at, at + length)),
    },
    length: at + length,
  };
}
