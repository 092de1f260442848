import assert from 'node:assert/strict';
import { test } from 'node:test';
import { runClasses } from './run.ts';
import type { FaultClass } from './stage.ts';
import { isClean } from './tally.ts';

/** Fault classes in their short form, small numbers, as tests. `npm run faults` is the long one. */
export function testShort(title: string, classes: FaultClass[]): void {
  test(title, async (t) => {
    const rows = await runClasses({
      names: classes.map((one) => one.name),
      users: 16,
      seconds: 2,
      seed: 1,
      short: true,
      lanes: 2, // mostly waiting
      say: () => {},
    });
    for (const { name } of classes)
      await t.test(name, () => {
        const row = rows.find((one) => one.class === name);
        assert.ok(row, 'the class has run');
        assert.ok(isClean(row.tally), `\n${[...row.tally.problems, ...row.tally.notes].join('\n')}`);
        assert.ok(row.tally.faults > 0, 'it injected something');
        assert.ok(row.tally.generations > 0, 'somebody streamed');
      });
  });
}
