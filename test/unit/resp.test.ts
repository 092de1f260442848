import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { CommandBuffer, createParser, RespError, type RespValue } from '../../shared/resp.ts';

/** What a server would send for a value. */
function encodeReply(value: RespValue): string {
  if (value === null) return '$-1\r\n';
  if (typeof value === 'number') return `:${value}\r\n`;
  if (value instanceof RespError) return `-${value.message}\r\n`;
  if (typeof value === 'string') return `$${Buffer.byteLength(value)}\r\n${value}\r\n`;
  return `*${value.length}\r\n${value.map(encodeReply).join('')}`;
}

function parseInPieces(bytes: Buffer, cuts: number[]): RespValue[] {
  const replies: RespValue[] = [];
  const parser = createParser((reply) => replies.push(reply));
  let from = 0;
  for (const cut of [...cuts.map((at) => at % (bytes.length + 1)).sort((a, b) => a - b), bytes.length]) {
    parser.push(Buffer.from(bytes.subarray(from, cut)));
    from = cut;
  }
  return replies;
}

const reply = fc.letrec<{ value: RespValue }>((tie) => ({
  value: fc.oneof(
    { maxDepth: 4 },
    fc.string({ unit: 'binary' }).filter((text) => text.isWellFormed()),
    fc.integer(),
    fc.constant(null),
    fc.stringMatching(/^[A-Z]{1,8} [a-z ]{0,20}$/).map((text) => new RespError(text)),
    fc.array(tie('value'), { maxLength: 5 }),
  ),
})).value;

test('replies are read whole, however the bytes are cut', () => {
  fc.assert(
    fc.property(
      fc.array(reply, { minLength: 1, maxLength: 6 }),
      fc.array(fc.nat(), { maxLength: 20 }),
      (values, cuts) => {
        const bytes = Buffer.from(values.map(encodeReply).join(''));
        assert.deepEqual(parseInPieces(bytes, cuts), values);
      },
    ),
    { numRuns: 500 },
  );
});

test('of replies that nobody reads, strings are left out and nothing else', () => {
  const values: RespValue[] = ['gone', null, 7, new RespError('ERR no'), ['kept', ['too']], '', 'gone'];
  const bytes = Buffer.from(values.map(encodeReply).join(''));
  for (const piece of [1, 3, bytes.length]) {
    const replies: RespValue[] = [];
    const parser = createParser(
      (reply) => replies.push(reply),
      () => true,
    );
    for (let from = 0; from < bytes.length; from += piece) parser.push(bytes.subarray(from, from + piece));
    assert.deepEqual(replies, ['', null, 7, new RespError('ERR no'), ['kept', ['too']], '', '']);
  }
});

test('a reply is read byte by byte, and a large one is not parsed twice', () => {
  const value: RespValue = ['status', ['1-0', ['token', 'né 😀\r\n$3\r\n']], null, -42, []];
  const bytes = Buffer.from(encodeReply(value));
  assert.deepEqual(
    parseInPieces(
      bytes,
      Array.from({ length: bytes.length }, (_, index) => index),
    ),
    [value],
  );
  const large = Buffer.from(encodeReply('x'.repeat(4_000_000)));
  let got = 0;
  const parser = createParser((text) => {
    got = (text as string).length;
  });
  for (let from = 0; from < large.length; from += 16_384) parser.push(large.subarray(from, from + 16_384));
  assert.equal(got, 4_000_000);
});

test('a status reply and a null array are read; garbage is refused', () => {
  assert.deepEqual(parseInPieces(Buffer.from('+OK\r\n*-1\r\n+\r\n'), []), ['OK', null, '']);
  for (const bytes of ['HTTP/1.1 400\r\n', '$x\r\n', ':\r\n', '*99999999999\r\n'])
    assert.throws(() => parseInPieces(Buffer.from(bytes), []), /RESP/);
});

test('commands carry lengths in bytes', () => {
  const commands = new CommandBuffer();
  commands.add(['XADD', 'k', 7, 'né']);
  commands.add(['get', '']);
  assert.equal(
    commands.view().toString(),
    '*4\r\n$4\r\nXADD\r\n$1\r\nk\r\n$1\r\n7\r\n$3\r\nné\r\n*2\r\n$3\r\nget\r\n$0\r\n\r\n',
  );
  const part = fc.oneof(
    fc.string({ unit: 'binary', maxLength: 120 }),
    fc.string({ unit: 'binary-ascii', maxLength: 120 }),
    fc.integer({ min: 0, max: 40_000 }).map((length) => '漢'.repeat(length)),
  );
  fc.assert(
    fc.property(
      fc.array(fc.array(part, { minLength: 1, maxLength: 120 }), { minLength: 1, maxLength: 5 }),
      fc.boolean(),
      (list, inUse) => {
        const clean = list.map((parts) => parts.map((text) => text.toWellFormed()));
        commands.clear(inUse); // the same memory, however large the turn before was
        for (const parts of clean) commands.add(parts);
        assert.deepEqual(parseInPieces(commands.view(), []), clean);
      },
    ),
    { numRuns: 200 },
  );
});

test('what somebody still reads is not written over', () => {
  const commands = new CommandBuffer();
  commands.add(['get', 'one']);
  const view = commands.view();
  commands.clear(true);
  commands.add(['get', 'two']);
  assert.match(view.toString(), /one/);
  assert.match(commands.view().toString(), /two/);
});
