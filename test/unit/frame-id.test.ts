import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { compareFrameIds, formatFrameId, parseFrameId } from '../../shared/frame-id.ts';

const part = fc.nat({ max: 1_000_000 });

test('an id is read as it was written', () => {
  fc.assert(
    fc.property(part, part, (attempt, seq) => {
      assert.deepEqual(parseFrameId(formatFrameId(attempt, seq)), { attempt, seq });
    }),
  );
});

test('ids sort by attempt, then by sequence; nothing is below everything', () => {
  fc.assert(
    fc.property(part, part, part, part, (a, b, c, d) => {
      const sign = Math.sign(compareFrameIds(formatFrameId(a, b), formatFrameId(c, d)));
      assert.equal(sign, Math.sign(a - c || b - d));
    }),
  );
  assert.ok(compareFrameIds('', '0-0') < 0);
  assert.ok(compareFrameIds('1-10', '1-9') > 0, 'not as text');
});

test('what is not an id is refused', () => {
  for (const text of [
    '',
    '1',
    '1-',
    '-1',
    '1-2-3',
    '01-2',
    '1-02',
    'a-b',
    ' 1-2',
    '1-2\n',
    '1e3-0',
    '9'.repeat(30),
  ])
    assert.equal(parseFrameId(text), null, JSON.stringify(text));
});
