import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { type Stack, startStack } from '../helpers/stack.ts';
import {
  closePayload,
  encodeFrame,
  type Frame,
  handshakeText,
  OPCODE,
  openRaw,
  openRawWebSocket,
  type RawSocket,
} from './raw-socket.ts';

/**
 * The cases of the Autobahn test suite that matter here (it is a Python 2 program that neither npm nor Debian has),
 * and hostile HTTP, byte by byte against a real gateway. `PING` and its heartbeat stand for Autobahn's echo.
 */

let stack: Stack;
let port: number;
before(async () => {
  stack = await startStack(null, { workers: 0 });
  port = stack.gateways[0]!.port;
});
after(async () => {
  const { logs } = stack.gateways[0]!;
  await stack.stop();
  assert.deepEqual(
    logs.filter((line) => line.level === 'error' || line.level === 'fatal' || line.level === 'stderr'),
    [],
  );
});

/** Sends bytes, one write each, and gives what came back before the end, or before the sentinel's heartbeat. */
async function converse(...writes: (Uint8Array | string)[]): Promise<{ frames: Frame[]; closed: boolean }> {
  const raw = await openRawWebSocket(port);
  for (const bytes of writes) raw.write(bytes);
  raw.write(encodeFrame(OPCODE.ping, 'sentinel'));
  const frames: Frame[] = [];
  for (;;) {
    const frame = await raw.frame();
    if (!frame) return { frames, closed: true };
    if (frame.opcode === OPCODE.pong && frame.payload.toString() === 'sentinel') break;
    frames.push(frame);
  }
  raw.destroy();
  return { frames, closed: false };
}

const texts = (frames: Frame[]) =>
  frames.filter((frame) => frame.opcode === OPCODE.text).map((frame) => JSON.parse(frame.payload.toString()));

async function assertHeartbeat(...writes: (Uint8Array | string)[]): Promise<Frame[]> {
  const { frames, closed } = await converse(...writes);
  assert.equal(closed, false);
  assert.deepEqual(
    texts(frames).map(({ type }) => type),
    ['heartbeat'],
  );
  return frames;
}

async function assertClosed(code: number | null, ...writes: (Uint8Array | string)[]): Promise<void> {
  const { frames, closed } = await converse(...writes);
  assert.equal(closed, true, `open: ${JSON.stringify(frames)}`);
  assert.deepEqual(texts(frames), []);
  const close = frames.find((frame) => frame.opcode === OPCODE.close);
  const given = close && close.payload.length >= 2 ? close.payload.readUInt16BE(0) : null;
  assert.equal(given, code);
}

const { continuation, text, binary, close, ping, pong } = OPCODE;
const frame = encodeFrame;

test('1: text of every length of length, whole and byte by byte', async () => {
  for (const length of [125, 126, 127, 128, 65_535, 65_536, 131_072]) {
    const heartbeat = '{"type":"heartbeat"}';
    await assertHeartbeat(frame(text, heartbeat.padEnd(length)));
  }
  const empty = await converse(frame(text, ''));
  assert.equal(texts(empty.frames)[0].code, 'invalid_frame');
  await assertHeartbeat(...[...frame(text, 'PING')].map((byte) => Buffer.from([byte])));
  await assertClosed(4503, frame(binary, 'PING'));
});

test('2: pings are answered in kind, pongs are taken silently', async () => {
  for (const payload of ['', 'hello', '\0\xff\xfe', 'x'.repeat(125)]) {
    const [answer] = (await converse(frame(ping, Buffer.from(payload, 'latin1')))).frames;
    assert.equal(answer!.opcode, pong);
    assert.equal(answer!.payload.toString('latin1'), payload);
  }
  await assertClosed(null, frame(ping, 'x'.repeat(126)));
  await assertHeartbeat(frame(pong, 'nobody asked'), frame(text, 'PING'));
  const ten = await converse(Buffer.concat(Array.from({ length: 10 }, (_, n) => frame(ping, String(n)))));
  assert.deepEqual(
    ten.frames.map(({ payload }) => payload.toString()),
    [...'0123456789'],
  );
});

test('3, 4: reserved bits and opcodes end the connection', async () => {
  for (const rsv of [1, 2, 3, 4, 5, 6, 7]) await assertClosed(null, frame(text, 'PING', { rsv }));
  for (const opcode of [3, 4, 5, 6, 7, 11, 12, 13, 14, 15]) await assertClosed(null, frame(opcode, 'PING'));
});

test('5: fragments', async () => {
  const open = { fin: false };
  await assertHeartbeat(frame(text, 'PI', open), frame(continuation, 'NG'));
  await assertHeartbeat(
    Buffer.concat([frame(text, 'P', open), frame(continuation, 'IN', open), frame(continuation, 'G')]),
  );
  await assertHeartbeat(
    frame(text, '', open),
    ...Array.from({ length: 200 }, () => frame(continuation, '', open)),
    frame(continuation, 'PING'),
  );
  const between = await assertHeartbeat(
    frame(text, 'PI', open),
    frame(ping, 'in between'),
    frame(continuation, 'NG'),
  );
  assert.equal(between[0]!.opcode, pong, 'a ping between fragments is answered at once');
  await assertClosed(null, frame(ping, 'PI', open), frame(continuation, 'NG'));
  await assertClosed(null, frame(pong, 'PI', open), frame(continuation, 'NG'));
  await assertClosed(null, frame(close, '', open));
  await assertClosed(null, frame(continuation, 'PING'));
  await assertClosed(null, frame(continuation, 'PI', open), frame(text, 'PING'));
  await assertClosed(null, frame(text, 'PI', open), frame(text, 'PING'));
  const late = await converse(frame(text, 'PI', open), frame(continuation, 'NG'), frame(continuation, 'NG'));
  assert.equal(late.closed, true);
  // The answer to the good message leaves at the end of the turn; in one segment the bad frame comes before that.
  assert.ok(texts(late.frames).length <= 1);
});

test('6: text must be UTF-8, also over fragments', async () => {
  const json = Buffer.from('{"type":"heartbeat","note":"κόσμε 😀 \u{10ffff}"}');
  await assertHeartbeat(frame(text, json));
  for (let cut = 1; cut < json.length; cut += 3)
    await assertHeartbeat(
      frame(text, json.subarray(0, cut), { fin: false }),
      frame(continuation, json.subarray(cut)),
    );
  const invalid = [
    [0xff],
    [0x80], // a continuation alone
    [0xc0, 0xaf], // overlong
    [0xe0, 0x80, 0xaf],
    [0xed, 0xa0, 0x80], // half of a surrogate pair
    [0xf4, 0x90, 0x80, 0x80], // above U+10FFFF
    [0xf8, 0x88, 0x80, 0x80, 0x80],
    [0xce, 0xba, 0xe1], // cut off
  ];
  for (const bytes of invalid) {
    await assertClosed(null, frame(text, Buffer.from(bytes)));
    await assertClosed(
      null,
      frame(text, Buffer.from(bytes.slice(0, 1)), { fin: false }),
      frame(continuation, Buffer.from(bytes.slice(1))),
    );
  }
});

test('7: the closing handshake', async () => {
  for (const code of [1000, 1001, 1007, 1011, 4000, 4999])
    await assertClosed(code, frame(close, closePayload(code, 'good bye')));
  await assertClosed(null, frame(close));
  await assertClosed(null, frame(close, 'x'));
  for (const code of [0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65_535])
    await assertClosed(null, frame(close, closePayload(code)));
  await assertClosed(null, frame(close, closePayload(1000, Buffer.from([0xff]))));
  await assertClosed(null, frame(close, closePayload(1000, 'x'.repeat(124))));
  await assertClosed(1000, frame(close, closePayload(1000)), frame(text, 'PING'), frame(ping, 'x'));
});

test('9: too large: told with a code while that is possible, cut off beyond', async () => {
  await assertClosed(4504, frame(text, 'x'.repeat(262_145)));
  await assertHeartbeat(frame(text, '{"type":"heartbeat"}'.padEnd(262_144)));
  await assertClosed(4504, frame(text, 'x'.repeat(2_097_152)));
  await assertClosed(null, frame(text, '', { length: 2_097_153n }));
  for (const length of [1n << 31n, 1n << 32n, 1n << 63n, (1n << 64n) - 1n])
    await assertClosed(null, frame(text, '', { length }));
  const piece = 'x'.repeat(100_000);
  await assertClosed(
    null,
    frame(text, piece, { fin: false }),
    ...Array.from({ length: 21 }, () => frame(continuation, piece, { fin: false })),
  );
});

test('12: compression is declined, and what claims to be compressed is not unpacked', async () => {
  const raw = await openRawWebSocket(port, '/ws', {
    'sec-websocket-extensions': 'permessage-deflate; client_max_window_bits, x-webkit-deflate-frame',
  });
  assert.doesNotMatch(raw.head, /sec-websocket-extensions/i);
  raw.write(frame(text, Buffer.alloc(1_000), { rsv: 4 }));
  assert.equal(await raw.frame(), undefined);
});

test('an unmasked frame is read as if it were masked: garbage in, an error or the end out', async () => {
  // RFC 6455 wants the connection to be failed. The library does not look at the mask bit, and takes the first
  // four bytes for the mask: nothing of what was meant gets through.
  const raw = await openRawWebSocket(port);
  raw.write(frame(text, '{"type":"heartbeat"}', { masked: false }));
  raw.write(frame(text, '{"type":"heartbeat"}', { masked: false }));
  const answer = await raw.frame(2_000).catch(() => undefined);
  assert.ok(!answer?.payload.includes('heartbeat'));
  raw.destroy();
});

/** Sends bytes and gives the status lines that came back, once as many are there or the connection has ended. */
async function statuses(bytes: string | Uint8Array, count = 1): Promise<{ lines: string[]; raw: RawSocket }> {
  const raw = await openRaw(port);
  raw.write(bytes);
  const find = (received: Buffer) => received.toString('latin1').match(/HTTP\/1\.1 \d{3}/g) ?? [];
  await raw.until((received) => (find(received).length >= count ? true : undefined), 15_000);
  const lines = find(raw.received).map((line) => line.slice(9));
  raw.destroy();
  return { lines, raw };
}

test('handshakes that are none', async () => {
  const good = handshakeText('/ws');
  const wrong: [string, RegExp, string][] = [
    ['no key', /^426/, good.replace(/sec-websocket-key.*\r\n/, '')],
    ['a short key', /^426/, handshakeText('/ws', { 'sec-websocket-key': 'abc' })],
    ['an old version', /^426/, handshakeText('/ws', { 'sec-websocket-version': '8' })],
    ['no version', /^426/, good.replace(/sec-websocket-version.*\r\n/, '')],
    ['a POST', /^426/, handshakeText('/ws', {}, 'POST /ws HTTP/1.1')],
    ['HTTP 1.0', /^505/, handshakeText('/ws', {}, 'GET /ws HTTP/1.0')],
    ['elsewhere', /^404/, handshakeText('/elsewhere')],
    ['a strange origin', /^403/, handshakeText('/ws', { origin: 'https://evil.example' })],
    ['no upgrade', /^426/, 'GET /ws HTTP/1.1\r\nhost: x\r\n\r\n'],
  ];
  for (const [name, expected, bytes] of wrong)
    assert.match((await statuses(bytes)).lines[0]!, expected, name);
});

test('HTTP that is none, or two things at once', async () => {
  const host = 'host: x\r\n';
  const wrong: [string, RegExp, string][] = [
    ['garbage', /^(400|505)/, 'asdf\r\n\r\n'],
    ['TLS', /^(400|505)/, '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n'],
    [
      'two lengths',
      /^400/,
      `POST /api/chat HTTP/1.1\r\n${host}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n`,
    ],
    ['a negative length', /^400/, `POST /api/chat HTTP/1.1\r\n${host}content-length: -5\r\n\r\n`],
    ['a length in words', /^400/, `POST /api/chat HTTP/1.1\r\n${host}content-length: five\r\n\r\n`],
    [
      'a broken chunk',
      /^400/,
      `POST /api/chat HTTP/1.1\r\n${host}transfer-encoding: chunked\r\n\r\nzz\r\n\r\n`,
    ],
  ];
  for (const [name, expected, bytes] of wrong)
    assert.match((await statuses(bytes)).lines[0]!, expected, name);
});

test('what is too large is refused, and the gateway reads no further', async () => {
  const host = 'host: x\r\n';
  const chunk = `ffff\r\n${'x'.repeat(65_535)}\r\n`;
  const large: [string, RegExp, string][] = [
    ['a huge header', /^431/, `GET / HTTP/1.1\r\n${host}x: ${'a'.repeat(1_000_000)}\r\n\r\n`],
    ['a huge URL', /^(404|414|431|505)/, `GET /${'a'.repeat(1_000_000)} HTTP/1.1\r\n${host}\r\n`],
    [
      'a huge body',
      /^413/,
      `POST /api/chat HTTP/1.1\r\n${host}content-length: 2000000\r\n\r\n${'x'.repeat(1_100_000)}`,
    ],
    [
      'chunks above the limit',
      /^(400|413)/,
      `POST /api/chat HTTP/1.1\r\n${host}transfer-encoding: chunked\r\n\r\n${chunk.repeat(20)}`,
    ],
  ];
  for (const [name, expected, bytes] of large) {
    const [line] = (await statuses(bytes)).lines;
    // The end of the connection may reach a client in the middle of its write, and then takes the answer with it.
    if (line !== undefined) assert.match(line, expected, name);
    assert.deepEqual((await statuses(`GET /healthz HTTP/1.1\r\n${host}connection: close\r\n\r\n`)).lines, [
      '200',
    ]);
  }
});

test('pipelined requests are answered in order, all of them', async () => {
  const get = 'GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n';
  const post = 'POST /api/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}';
  const { lines } = await statuses((get + post).repeat(100), 200);
  assert.deepEqual(
    lines,
    Array.from({ length: 200 }, (_, index) => (index % 2 === 0 ? '200' : '400')),
  );
});

test('whoever is slow on purpose is cut off: no head, half a head, a head in drops, half a body', async () => {
  const slow = [
    '',
    'GET /healthz HTTP/1.1\r\nhos',
    'POST /api/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\nabc',
  ];
  const sockets = await Promise.all(
    [...slow, 'GET /healthz HTTP/1.1\r\nhost: x\r\nx: '].map(async (bytes) => {
      const raw = await openRaw(port);
      raw.write(bytes);
      return raw;
    }),
  );
  // Behind a `connection: close` the library may free a request's response without a word: nothing may touch it later.
  const last = 'GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n';
  const behind = [
    'GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n',
    handshakeText('/x', { 'sec-websocket-key': '' }),
    slow[2]!,
  ];
  for (const bytes of behind)
    for (const body of [
      '\r\n',
      'content-length: 2\r\n\r\n{}',
      'expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}',
    ])
      (await openRaw(port)).write(last + body + bytes + bytes);
  const drops = setInterval(() => sockets.at(-1)!.write('a'), 500);
  try {
    await Promise.all(sockets.map((raw) => raw.until(() => (raw.isClosed ? true : undefined), 17_000)));
  } finally {
    clearInterval(drops);
  }
  for (const raw of sockets) assert.equal(raw.isClosed, true);
  assert.equal(stack.gateways[0]!.child.exitCode ?? stack.gateways[0]!.child.signalCode, null);
  assert.equal((await statuses('GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n')).lines[0], '200');
});
