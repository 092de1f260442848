import fc from 'fast-check';
import { closePayload, encodeFrame, handshakeText, OPCODE } from './raw-socket.ts';

/**
 * What the fuzzer sends. A pool of frames comes from fast-check, by the grammar of the protocol and beside it; a
 * quick generator of our own then picks, mixes and breaks them, so that a million inputs take minutes. The same
 * seed gives the same inputs.
 */

export interface Random {
  /** A whole number from 0 up to, not including, `below`. */
  below(below: number): number;
  pick<T>(from: readonly T[]): T;
  chance(part: number): boolean;
}

/** Mulberry32: small, fast, and the same everywhere. */
export function createRandom(seed: number): Random {
  let state = seed >>> 0;
  const next = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let value = state;
    value = Math.imul(value ^ (value >>> 15), value | 1);
    value ^= value + Math.imul(value ^ (value >>> 7), value | 61);
    return ((value ^ (value >>> 14)) >>> 0) / 4_294_967_296;
  };
  const random: Random = {
    below: (below) => Math.floor(next() * below),
    pick: (from) => from[random.below(from.length)]!,
    chance: (part) => next() < part,
  };
  return random;
}

const ids = fc.oneof(
  { weight: 4, arbitrary: fc.constantFrom('m1', 'm2', 'm3', 'g1', '20001', '20002') },
  { weight: 1, arbitrary: fc.string({ maxLength: 140 }) },
);
const anything = fc.anything({ maxDepth: 3, withNullPrototype: true, withBigInt: false });
const text = fc.string({ unit: 'grapheme', maxLength: 200 });
const frameIds = fc.oneof(
  fc.tuple(fc.nat(), fc.nat()).map(([attempt, seq]) => `${attempt}-${seq}`),
  fc.constantFrom('0-0', '1-0', '1--1', '-', '99999999999999999999-1', '1-1-1', ''),
);
const parameters = fc.record(
  { tokens: fc.nat(5), intervalMs: fc.constant(0), seed: fc.nat(), failAttempts: fc.nat(2) },
  { requiredKeys: ['tokens', 'intervalMs'] },
);

/** Frames by the grammar, and the same with one field that is anything. */
const grammar = fc.oneof(
  fc.record({ type: fc.constant('init'), userId: fc.oneof(fc.nat(), ids) }),
  fc.record({ type: fc.constant('chat'), messageId: ids, contents: text, parameters }),
  fc.record({
    type: fc.constant('chat'),
    messageId: ids,
    contents: text,
    parameters,
    history: fc.array(
      fc.record({ role: fc.constantFrom('user', 'assistant', 'system', 'x'), content: text }),
    ),
    conversationId: ids,
  }),
  fc.record({ type: fc.constant('resume'), messageId: ids, after: frameIds }),
  fc.record({ type: fc.constant('cancel'), messageId: ids }),
  fc.record({
    type: fc.constant('send'),
    messageId: ids,
    to: fc.oneof(fc.record({ user: ids }), fc.record({ group: ids })),
    contents: text,
  }),
  fc.record({ type: fc.constant('ack'), id: frameIds }),
  fc.record({ type: fc.constantFrom('join', 'leave', 'members', 'groups'), group: ids }),
  fc.record({ type: fc.constant('presence'), userIds: fc.array(ids, { maxLength: 5 }) }),
  fc.record({ type: fc.constant('heartbeat') }),
);
const aiMessages = fc.array(
  fc.record({
    id: ids,
    role: fc.constantFrom('user', 'user', 'assistant', 'system'),
    parts: fc.array(fc.record({ type: fc.constantFrom('text', 'file', 'step-start', 'data-restart'), text })),
  }),
  { maxLength: 4 },
);
const aiGrammar = fc.oneof(
  fc.record({
    type: fc.constant('send'),
    requestId: ids,
    id: ids,
    trigger: fc.constantFrom('submit-message', 'regenerate-message'),
    messages: aiMessages,
    headers: fc.constant({}),
    body: fc.record({ parameters, userId: ids }),
  }),
  fc.record({
    type: fc.constant('resume'),
    requestId: ids,
    id: ids,
    headers: fc.constant({}),
    body: fc.constant({}),
  }),
  fc.record({ type: fc.constant('abort'), requestId: ids }),
);
const bent = (frames: fc.Arbitrary<object>) =>
  fc
    .tuple(
      frames,
      fc.constantFrom('type', 'messageId', 'to', 'after', 'userId', 'messages', '__proto__'),
      anything,
    )
    .map(([frame, field, value]) => ({ ...frame, [field]: value }));

const nasty = [
  'PING',
  'PING ',
  '',
  '{}',
  '[]',
  'null',
  '"',
  '{"type":"chat"',
  '{"type":"__proto__"}',
  '{"__proto__":{"type":"heartbeat"}}',
  '{"type":"heartbeat","type":"chat"}',
  '{"type":"presence","userIds":["constructor","__proto__","toString"]}',
  `${'['.repeat(20_000)}`,
  `{"type":"chat","messageId":"m1","contents":${'['.repeat(5_000)}${']'.repeat(5_000)}}`,
  `{"type":"init","userId":1e400}`,
  `{"type":"init","userId":-0}`,
  `{"type":"init","userId":"\\u0000"}`,
  `{"type":"chat","messageId":"m1","contents":"\\ud800"}`,
  `{"type":"chat","messageId":"m1","contents":"${'x'.repeat(20_000)}","parameters":{"tokens":1,"intervalMs":0}}`,
];

const toJson = (value: unknown) => JSON.stringify(value) ?? 'undefined';

export interface Pools {
  native: string[];
  ai: string[];
}

/** The pool that everything is made of. */
export function createPools(seed: number, size: number): Pools {
  const sample = (frames: fc.Arbitrary<object>) => {
    const good = fc.sample(frames, { numRuns: size, seed }).map(toJson);
    const wrong = fc.sample(bent(frames), { numRuns: size, seed }).map(toJson);
    return [...good, ...wrong, ...nasty];
  };
  return { native: sample(grammar), ai: sample(aiGrammar) };
}

/** A frame's text: as it is, cut, doubled, or with bytes changed. May be no UTF-8 any more. */
export function mutate(random: Random, pool: readonly string[]): Buffer {
  const bytes = Buffer.from(random.pick(pool));
  switch (random.below(8)) {
    case 0:
      return bytes.subarray(0, random.below(bytes.length + 1));
    case 1: {
      for (let count = random.below(4) + 1; count > 0 && bytes.length > 0; count--)
        bytes[random.below(bytes.length)] = random.below(128);
      return bytes;
    }
    case 2: {
      const other = Buffer.from(random.pick(pool));
      return Buffer.concat([
        bytes.subarray(0, random.below(bytes.length + 1)),
        other.subarray(random.below(other.length + 1)),
      ]);
    }
    default:
      return bytes;
  }
}

/** A WebSocket frame around some text: mostly right. `ends` = the server may hang up for it. */
export function frameOf(random: Random, payload: Buffer): { bytes: Buffer; ends: boolean } {
  switch (random.below(60)) {
    case 0:
      return { bytes: encodeFrame(OPCODE.binary, payload), ends: true };
    case 1:
      return { bytes: encodeFrame(random.below(16), payload, { rsv: random.below(8) }), ends: true };
    case 2:
      return { bytes: encodeFrame(OPCODE.text, payload, { masked: false }), ends: true };
    case 3:
      return { bytes: encodeFrame(OPCODE.text, payload, { fin: false }), ends: true };
    case 4:
      return { bytes: encodeFrame(OPCODE.continuation, payload), ends: true };
    case 5: {
      const bytes = Buffer.from(payload);
      if (bytes.length > 0) bytes[random.below(bytes.length)] = 128 + random.below(128);
      return { bytes: encodeFrame(OPCODE.text, bytes), ends: true };
    }
    case 6:
      return {
        bytes: encodeFrame(OPCODE.text, payload, {
          length: BigInt(random.below(1 << 30)) << BigInt(random.below(34)),
        }),
        ends: true,
      };
    case 7:
      return {
        bytes: encodeFrame(OPCODE.close, closePayload(random.below(65_536), payload.subarray(0, 200))),
        ends: true,
      };
    case 8:
      return { bytes: encodeFrame(OPCODE.ping, payload.subarray(0, random.below(130))), ends: true };
    case 9: {
      const cut = random.below(payload.length + 1);
      return {
        bytes: Buffer.concat([
          encodeFrame(OPCODE.text, payload.subarray(0, cut), { fin: false }),
          encodeFrame(OPCODE.ping, 'between'),
          encodeFrame(OPCODE.continuation, payload.subarray(cut)),
        ]),
        ends: false,
      };
    }
    case 10:
      return { bytes: encodeFrame(OPCODE.text, 'x'.repeat(random.below(600_000))), ends: true };
    default:
      return { bytes: encodeFrame(OPCODE.text, payload), ends: false };
  }
}

const PATHS = [
  ...['/', '/ws', '/ai', '/healthz', '/readyz', '/metrics', '/pipeline', '/client.js', '/v1/messages'],
  ...['/api/chat', '/api/chat/m1/stream', '/api/chat/m1/stop', '/api/chat/%zz/stream', '/../etc/passwd'],
  ...['/%00', '/<script>', '//', '/ws?userId=20001&token=x', '/api/chat?userId=20001', '/openapi.json'],
];
const METHODS = ['GET', 'GET', 'POST', 'POST', 'PUT', 'OPTIONS', 'HEAD', 'DELETE', 'get', 'BREW', ''];
const HEADERS = [
  'host: x',
  'host: x',
  'content-length: 5',
  'content-length: 99999999999999999999',
  'content-length: -1',
  'transfer-encoding: chunked',
  'transfer-encoding: gzip, chunked',
  'connection: close',
  'expect: 100-continue',
  'origin: https://evil.example',
  'authorization: Bearer x',
  'x-forwarded-for: 1.2.3.4, ::1, garbage',
  'x-ai-sdk: 6',
  'sec-websocket-extensions: permessage-deflate; server_max_window_bits=99',
  'upgrade: websocket',
  'content-type: application/json',
  'no colon here',
  ': no name',
  'x: \0',
  ' folded: yes',
];

/** One request, or what somebody takes for one. */
export function requestOf(random: Random, pools: Pools): Buffer {
  if (random.chance(0.3)) {
    const handshake = handshakeText(random.pick(PATHS), {
      ...(random.chance(0.5)
        ? { 'sec-websocket-key': random.pick(['', 'x', 'dGhlIHNhbXBsZSBub25jZQ==']) }
        : {}),
      ...(random.chance(0.3) ? { 'sec-websocket-version': String(random.below(20)) } : {}),
      ...(random.chance(0.2) ? { 'sec-websocket-protocol': 'a, b' } : {}),
    });
    const { bytes } = frameOf(random, mutate(random, random.pick([pools.native, pools.ai])));
    return Buffer.concat([breakBytes(random, Buffer.from(handshake)), bytes]);
  }
  const body = mutate(random, pools.ai);
  const lines = [
    `${random.pick(METHODS)} ${random.pick(PATHS)} HTTP/${random.pick(['1.1', '1.1', '1.1', '1.0', '2.0'])}`,
  ];
  for (let count = random.below(5); count > 0; count--) lines.push(random.pick(HEADERS));
  if (random.chance(0.7)) lines.push('host: x');
  if (random.chance(0.5)) lines.push(`content-length: ${body.length}`);
  const head = Buffer.from(`${lines.join('\r\n')}\r\n\r\n`, 'latin1');
  return Buffer.concat([breakBytes(random, head), body]);
}

function breakBytes(random: Random, bytes: Buffer): Buffer {
  if (random.chance(0.8)) return bytes;
  if (random.chance(0.5)) return bytes.subarray(0, random.below(bytes.length + 1));
  bytes[random.below(bytes.length)] = random.below(256);
  return bytes;
}
