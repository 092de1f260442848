import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { supervise } from '../../infra/supervise.ts';
import { eventually } from '../helpers/eventually.ts';

/** A process that is killed, with a child of its own that holds its output open, as workers do while they drain. */
async function killParent(t: TestContext, stopTimeoutMs: number) {
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
    stopTimeoutMs,
    say: (line) => said.push(line),
    onReady: ({ child }) => children.push(Number(child)),
  });
  const endChildren = () => {
    for (const pid of children.splice(0)) process.kill(pid, 'SIGKILL');
  };
  t.after(async () => {
    endChildren();
    await supervised.stop();
    rmSync(folder, { recursive: true, force: true });
  });
  await supervised.ready;
  process.kill(supervised.pid!, 'SIGKILL');
  await eventually('second start', () => children.length === 2, 10_000);
  return { supervised, said, endChildren };
}

test('a process whose own children hold its output open is started again as soon as it has died', async (t) => {
  const { said } = await killParent(t, 5_000);
  assert.deepEqual(said, ['parent ended (SIGKILL); starting it again in 1 s']);
});

test('a stop waits for what was left behind, so that nothing is taken from under it, but not for ever', async (t) => {
  const patient = await killParent(t, 60_000);
  let stopped = false;
  const stop = patient.supervised.stop().then(() => {
    stopped = true;
  });
  await delay(1_500); // the second run has ended by then
  assert.equal(stopped, false);
  patient.endChildren();
  await stop;

  const short = await killParent(t, 1_000);
  const sinceMs = performance.now();
  await short.supervised.stop();
  assert.ok(performance.now() - sinceMs < 5_000);
});
