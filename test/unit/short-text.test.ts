import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { byteLength, quote } from '../../shared/short-text.ts';

test('short texts are quoted and counted as the platform does it', () => {
  const text = fc.oneof(
    fc.string({ unit: 'binary-ascii', maxLength: 60 }),
    fc.string({ unit: 'binary', maxLength: 60 }),
    fc.constantFrom('"', '\\', '\u007f', '\u0000', '\u2028', 'é', '\ud83e', '', ' river'),
  );
  fc.assert(
    fc.property(text, (value) => {
      assert.equal(quote(value), JSON.stringify(value));
      assert.equal(byteLength(value), Buffer.byteLength(value));
    }),
    { numRuns: 2_000 },
  );
});
