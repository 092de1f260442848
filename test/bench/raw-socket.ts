import { randomBytes } from 'node:crypto';
import { createConnection, type NetConnectOpts, type Socket } from 'node:net';

/**
 * A WebSocket client without anything that costs: one receive buffer for all sockets, frames handed out as ranges
 * of it, masks of zero. Text frames only; it answers pings and close frames.
 */
export interface RawSocket {
  send(text: string): void;
  destroy(): void;
}

export interface RawSocketEvents {
  open(): void;
  /** The payload is `data[from, to)`; valid during the call. */
  frame(data: Buffer, from: number, to: number): void;
  close(reason: string): void;
}

const shared = Buffer.allocUnsafe(1024 * 1024); // what one read may take
const HEAD_END = Buffer.from('\r\n\r\n');

export function openRawSocket(
  target: { port: number; path: string; localAddress?: string | undefined },
  events: RawSocketEvents,
): RawSocket {
  let upgraded = false;
  let rest: Buffer | null = null;
  let closed = false;
  const close = (reason: string) => {
    if (closed) return;
    closed = true;
    events.close(reason);
  };

  const socket: Socket = createConnection({
    host: '127.0.0.1',
    port: target.port,
    localAddress: target.localAddress,
    noDelay: true,
    onread: {
      buffer: shared,
      callback(size: number, buffer: Uint8Array) {
        let data = buffer as Buffer;
        let length = size;
        if (rest) {
          data = Buffer.concat([rest, data.subarray(0, size)]);
          length = data.length;
          rest = null;
        }
        let at = 0;
        if (!upgraded) {
          const end = data.subarray(0, length).indexOf(HEAD_END);
          if (end < 0) {
            rest = Buffer.from(data.subarray(0, length));
            return true;
          }
          const head = data.toString('latin1', 0, end);
          if (!head.startsWith('HTTP/1.1 101')) {
            close(head.split('\r\n')[0]!);
            socket.destroy();
            return true;
          }
          upgraded = true;
          at = end + 4;
          events.open();
        }
        for (;;) {
          if (length - at < 2) break;
          let size = data[at + 1]! & 127;
          let head = 2;
          if (size === 126) {
            if (length - at < 4) break;
            size = data.readUInt16BE(at + 2);
            head = 4;
          } else if (size === 127) {
            if (length - at < 10) break;
            size = Number(data.readBigUInt64BE(at + 2));
            head = 10;
          }
          if (length - at < head + size) break;
          const opcode = data[at]! & 15;
          const from = at + head;
          at = from + size;
          if (opcode === 1) events.frame(data, from, at);
          else if (opcode === 9) socket.write(encode(0x8a, data.toString('latin1', from, at)));
          else if (opcode === 8) {
            close(`closed with ${size >= 2 ? data.readUInt16BE(from) : 1005}`);
            socket.destroy();
            return true;
          }
        }
        if (at < length) rest = Buffer.from(data.subarray(at, length));
        return true;
      },
    },
  } as NetConnectOpts);
  socket.on('connect', () => {
    socket.write(
      `GET ${target.path} HTTP/1.1\r\nHost: 127.0.0.1:${target.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n` +
        `Sec-WebSocket-Key: ${randomBytes(16).toString('base64')}\r\nSec-WebSocket-Version: 13\r\n\r\n`,
    );
  });
  socket.on('error', (error) => close(error.message));
  socket.on('close', () => close('connection ended'));
  return {
    send: (text) => {
      if (!closed) socket.write(encode(0x81, text));
    },
    destroy: () => {
      closed = true;
      socket.destroy();
    },
  };
}

/** A client frame; the mask is zero, so the payload stays as it is. */
function encode(first: number, text: string): Buffer {
  const size = Buffer.byteLength(text);
  const head = size < 126 ? 6 : 8;
  if (size > 65_535) throw new Error('frames of the bench are short');
  const frame = Buffer.alloc(head + size);
  frame[0] = first;
  if (size < 126) frame[1] = 0x80 | size;
  else {
    frame[1] = 0x80 | 126;
    frame.writeUInt16BE(size, 2);
  }
  frame.write(text, head);
  return frame;
}
