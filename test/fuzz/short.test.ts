import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { compareFrameIds, formatFrameId, parseFrameId } from '../../shared/frame-id.ts';
import { parseUserId } from '../../shared/protocol.ts';
import { fuzz, parse } from './fuzz.ts';
import { createPools, createRandom } from './inputs.ts';

/** The fuzzer's short form, for every run of the tests; `test/fuzz/main.ts` is the long one. */

test('fifteen thousand inputs at a real gateway', { timeout: 60_000 }, async () => {
  const report = await fuzz({ inputs: 15_000, seed: Date.now() % 1_000_000 });
  assert.deepEqual(report.failures, []);
});

test('no text makes a parser throw, or lets anything through that is no frame', () => {
  const pools = createPools(7, 500);
  const random = createRandom(7);
  for (let count = 0; count < 20_000; count++) assert.equal(parse(random, pools), null);
});

const frameId = fc
  .tuple(
    fc.nat(1_000),
    fc.maxSafeNat().map((seq) => seq % 1_000_000_000_000_000),
  )
  .map(([attempt, seq]) => ({ attempt, seq }));

test('frame ids: written and read back, ordered by attempt and then by sequence', () => {
  fc.assert(
    fc.property(frameId, frameId, (a, b) => {
      const [left, right] = [a, b].map(({ attempt, seq }) => formatFrameId(attempt, seq)) as [string, string];
      assert.deepEqual(parseFrameId(left), a);
      const order = Math.sign(compareFrameIds(left, right));
      assert.equal(order, Math.sign(a.attempt - b.attempt || a.seq - b.seq));
      assert.equal(order, 0 - Math.sign(compareFrameIds(right, left)));
      assert.equal(Math.sign(compareFrameIds('', left)), -1);
    }),
  );
  fc.assert(
    fc.property(fc.string(), (text) => {
      const parsed = parseFrameId(text);
      if (parsed) assert.equal(formatFrameId(parsed.attempt, parsed.seq), text, 'one spelling for each id');
    }),
  );
});

test('user ids: one spelling, never a reserved one, nothing that a key name minds', () => {
  fc.assert(
    fc.property(fc.oneof(fc.string(), fc.integer(), fc.double(), fc.anything()), (value) => {
      const parsed = parseUserId(value);
      if ('reason' in parsed) return assert.ok(parsed.reason);
      assert.match(parsed.userId, /^[A-Za-z0-9._:@-]{1,64}$/);
      assert.ok(!/^\d+$/.test(parsed.userId) || Number(parsed.userId) > 10_000);
      assert.deepEqual(parseUserId(parsed.userId), parsed);
    }),
    { numRuns: 2_000 },
  );
});
