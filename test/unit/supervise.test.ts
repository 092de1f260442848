import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { supervise } from '../../infra/supervise.ts';
import { eventually } from '../helpers/eventually.ts';

/** The autoscaler's workers have its output, and drain for long when it dies. */
test('a process whose own children hold its output open is started again as soon as it has died', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'rivulet-supervise-'));
  const script = join(folder, 'parent.mjs');
  writeFileSync(
    script,
    `import { spawn } from 'node:child_process';
    const { pid } = spawn('sleep', ['60'], { stdio: 'inherit', detached: true });
    console.log(JSON.stringify({ msg: 'up', child: pid }));
    setInterval(() => {}, 1_000);`,
  );
  const said: string[] = [];
  const children: number[] = [];
  const supervised = supervise({
    name: 'parent',
    script,
    cwd: process.cwd(),
    env: process.env,
    logPath: join(folder, 'log'),
    readyMessage: 'up',
    stopTimeoutMs: 5_000,
    say: (line) => said.push(line),
    onReady: ({ child }) => children.push(Number(child)),
  });
  t.after(async () => {
    await supervised.stop();
    for (const pid of children) process.kill(pid, 'SIGKILL');
    rmSync(folder, { recursive: true, force: true });
  });
  await supervised.ready;
  process.kill(supervised.pid!, 'SIGKILL');
  await eventually('second start', () => children.length === 2, 10_000);
  assert.deepEqual(said, ['parent ended (SIGKILL); starting it again in 1 s']);
});
