import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import test from 'node:test';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));

interface Json {
  workloads: {
    id: string;
    systems: Record<string, { summary: Record<string, { median: number }>; failures: string[] }>;
  }[];
}

/** The short form as people run it. Every answer is checked inside; no time is asserted, machines differ. */
test('the short bench delivers the right text and finite numbers', { timeout: 180_000 }, async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-bench-test-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const json = join(dir, 'bench.json');
  const svg = join(dir, 'bench.svg');
  const child = spawn(
    process.execPath,
    ['--import', 'tsx', 'test/bench/main.ts', '--short', '--scale', '0.2', '--json', json, '--svg', svg],
    { cwd: ROOT, stdio: ['ignore', 'pipe', 'pipe'] },
  );
  t.after(() => child.kill('SIGTERM'));
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (chunk) => {
      output += chunk;
    });
  const code = await new Promise((resolve) => child.on('close', resolve));
  assert.equal(code, 0, output);

  const run = JSON.parse(readFileSync(json, 'utf8')) as Json;
  assert.deepEqual(
    run.workloads.map(({ id }) => id),
    ['a', 'b', 'c'],
  );
  for (const { id, systems } of run.workloads) {
    const median = (system: string, key: string) => {
      assert.deepEqual(systems[system]!.failures, [], `${id}: ${system}`);
      return systems[system]!.summary[key]!.median;
    };
    for (const key of ['tokensPerSecond', 'answersPerSecond', 'firstTokenP50', 'workerCpu']) {
      const ratio = median('rivulet', key) / median('control', key);
      assert.ok(Number.isFinite(ratio) && ratio > 0, `${id}: ${key} has the ratio ${ratio}`);
    }
  }
  assert.match(readFileSync(svg, 'utf8'), /^<svg [\s\S]*Rivulet[\s\S]*<\/svg>\n$/);
});
