import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { WebSocket } from 'ws';
import { readCommand, tryPort } from '../../infra/ports.ts';
import { startRedisServer } from '../../infra/redis-server.ts';
import { readRunState } from '../../infra/run-state.ts';
import type { PipelineSnapshot } from '../../shared/pipeline.ts';
import { makeCertificate } from '../helpers/certificate.ts';
import { freePortAndAt } from '../helpers/free-port.ts';

/** The real `npm start`, with its data in a temporary folder and on free ports. */
function npmStart(t: TestContext, env: Record<string, string>) {
  const { REDIS_URL: _, ...inherited } = process.env;
  // A process group of its own: a signal to the group is what a terminal does on Ctrl-C.
  const child = spawn('npm', ['start'], { env: { ...inherited, ...env }, detached: true });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk) => {
      output += chunk;
    });
  }
  const ended = new Promise<number | string>((resolve) =>
    child.on('close', (code, signal) => resolve(code ?? signal!)),
  );
  const signalGroup = (signal: NodeJS.Signals) => {
    try {
      process.kill(-child.pid!, signal);
    } catch {
      // Nobody is left in it.
    }
  };
  t.after(async () => {
    signalGroup('SIGKILL');
    await ended;
  });
  return {
    pid: child.pid!,
    ended,
    signalGroup,
    output: () => output,
    async says(pattern: RegExp): Promise<RegExpExecArray> {
      for (let waited = 0; waited < 40_000; waited += 50) {
        const match = pattern.exec(output);
        if (match) return match;
        await delay(50);
      }
      throw new Error(`npm start did not say ${pattern}. It said:\n${output}`);
    },
  };
}

async function tempFolder(t: TestContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'rivulet-start-'));
  t.after(async () => {
    // The hooks run in the order of their making: the stack of a failed test may still be writing.
    await rm(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 200 });
  });
  return folder;
}

async function untilGone(pids: number[]): Promise<void> {
  for (let waited = 0; pids.some((pid) => readCommand(pid)); waited += 50) {
    assert.ok(waited < 20_000, `still running: ${pids.filter((pid) => readCommand(pid)).join(', ')}`);
    await delay(50);
  }
}

const readPids = (line: string) => [...line.matchAll(/\w+ (\d+)(?:,| )/g)].map(([, pid]) => Number(pid));

test('npm start: an address that answers, calm refusals of a second one, and a Ctrl-C that leaves nothing', async (t) => {
  const folder = await tempFolder(t);
  const port = await freePortAndAt(1);
  const first = npmStart(t, { RIVULET_DIR: folder, PORT: String(port) });
  const [, page] = await first.says(/Page +(http:\S+)/);
  assert.equal(page, `http://127.0.0.1:${port}`);
  const [line] = await first.says(/Processes.*\n/);
  const pids = readPids(line);
  assert.equal(pids.length, 6, line); // n1, n2, two workers, autoscaler, redis
  for (const offset of [0, 1])
    assert.equal((await fetch(`http://127.0.0.1:${port + offset}/healthz`)).status, 200);
  await first.says(new RegExp(`RIVULET_DIR=${folder} npm run chat -- --user 20001 "hello"`));
  await first.says(new RegExp(`RIVULET_DIR=${folder} npm run streams\n`));
  await first.says(/redis-cli -p \d+/);
  assert.deepEqual(readRunState(folder)?.gateways, [
    { node: 'n1', url: `http://127.0.0.1:${port}` },
    { node: 'n2', url: `http://127.0.0.1:${port + 1}` },
  ]);

  const samePort = npmStart(t, { RIVULET_DIR: folder, PORT: String(port) });
  assert.notEqual(await samePort.ended, 0);
  assert.match(samePort.output(), new RegExp(`Port ${port} is taken: Rivulet already runs from this folder`));
  const sameFolder = npmStart(t, { RIVULET_DIR: folder, PORT: String(await freePortAndAt(1)) });
  assert.notEqual(await sameFolder.ended, 0);
  assert.match(sameFolder.output(), /already runs from this folder \(process \d+\).*RIVULET_DIR=.*PORT=/);

  process.kill(pids[3]!, 'SIGKILL');
  await first.says(/workers warn: a worker ended; another starts/);

  first.signalGroup('SIGINT');
  assert.ok([0, 130, 'SIGINT'].includes(await first.ended), first.output()); // npm's own way to leave
  assert.match(first.output(), /Stopping, running answers first.*\n(.*\n)*Stopped\.\n$/);
  assert.doesNotMatch(first.output(), /Killed|did not leave/);
  await untilGone(pids);
  assert.ok(!existsSync(join(folder, 'run.json')) && !existsSync(join(folder, 'start.pid')));
  assert.ok(existsSync(join(folder, 'redis', 'appendonlydir'))); // the data stays for the next run
  await tryPort('127.0.0.1', port);
});

test('npm start with a certificate: https addresses, and a chat that finds them', async (t) => {
  const folder = await tempFolder(t);
  const { cert, key } = makeCertificate(folder);
  const port = await freePortAndAt(1);
  const started = npmStart(t, {
    RIVULET_DIR: folder,
    PORT: String(port),
    TLS_CERT_FILE: cert,
    TLS_KEY_FILE: key,
  });
  await started.says(
    new RegExp(`Page +https://127.0.0.1:${port} +\\(the other gateway: https://127.0.0.1:${port + 1}\\)`),
  );
  await started.says(/Processes/);
  const chat = (env: Record<string, string>) =>
    spawnSync(
      process.execPath,
      ['--import', './infra/typescript.mjs', 'infra/chat.ts', '-u', '20001', '6 * 7'],
      {
        encoding: 'utf8',
        env: { PATH: process.env.PATH, RIVULET_DIR: folder, ...env },
      },
    );
  const stranger = chat({});
  assert.equal(stranger.status, 3);
  assert.match(stranger.stderr, /certificate of https:\S+ is not trusted: self-signed.*NODE_EXTRA_CA_CERTS=/);
  const friend = chat({ NODE_EXTRA_CA_CERTS: cert });
  assert.match(friend.stdout, /42/);
  assert.equal(friend.status, 0);
  const fromTheOther = new WebSocket(`wss://127.0.0.1:${port}/ws?userId=20001`, {
    origin: `https://localhost:${port + 1}`,
    ca: readFileSync(cert),
  });
  await once(fromTheOther, 'open');
  fromTheOther.terminate();
  started.signalGroup('SIGINT');
  await started.ended;
});

test('npm start with a Redis of your own: its password is not shown', async (t) => {
  const redis = await startRedisServer({ dir: await tempFolder(t), args: ['--requirepass', 'open-sesame'] });
  t.after(() => redis.stop());
  const started = npmStart(t, {
    RIVULET_DIR: await tempFolder(t),
    PORT: String(await freePortAndAt(1)),
    REDIS_URL: redis.url.replace('//', '//:open-sesame@'),
  });
  await started.says(new RegExp(`Redis +redis://\\*\\*\\*@127\\.0\\.0\\.1:${redis.port}\n`));
  started.signalGroup('SIGINT');
  await started.ended;
  assert.doesNotMatch(started.output(), /open-sesame/);
});

test('npm start with HOST=::1: addresses that are some, and a page of one gateway may use the other', async (t) => {
  const isThere = await tryPort('::1', 0).catch(() => null);
  if (isThere === null) return t.skip('no IPv6 here');
  const port = await freePortAndAt(1);
  const started = npmStart(t, { RIVULET_DIR: await tempFolder(t), PORT: String(port), HOST: '::1' });
  const [, page] = await started.says(/Page +(http:\S+)/);
  const [one, two] = [`http://[::1]:${port}`, `http://[::1]:${port + 1}`];
  assert.equal(page, one);
  // A user's token is asked for; where anybody may be anybody, the pipeline tells the addresses.
  const { nodes } = (await (await fetch(`${one}/pipeline`)).json()) as PipelineSnapshot;
  assert.deepEqual(
    nodes.map(({ url }) => url),
    [one, two],
  );
  const fromTheOther = new WebSocket(`ws://[::1]:${port}/ws?userId=20001`, { origin: two });
  await once(fromTheOther, 'open');
  fromTheOther.terminate();
  started.signalGroup('SIGINT');
  await started.ended;
});

test('npm start: a port that another program has is named, with its owner and the way out', async (t) => {
  const folder = await tempFolder(t);
  const port = await freePortAndAt(1);
  const advised = port + 1 < 9090 ? 9090 : port + 11;
  for (const taken of [port + 1, advised + 1]) {
    const other = createServer().listen(taken, '127.0.0.1');
    other.on('error', () => {}); // somebody else's, and so as good
    t.after(() => other.close());
  }
  const started = npmStart(t, { RIVULET_DIR: folder, PORT: String(port) });
  assert.notEqual(await started.ended, 0);
  assert.match(
    started.output(),
    new RegExp(`Port ${port + 1} is taken by process ${process.pid} .*PORT=(?!${advised} )\\d+ npm start`),
  );
  assert.doesNotMatch(started.output(), /\n {4}at /);
  assert.ok(!existsSync(join(folder, 'redis'))); // looked before it leapt
});

test('npm start: a wrong setting or folder is named', async (t) => {
  const wrongPort = npmStart(t, { RIVULET_DIR: await tempFolder(t), PORT: 'eighty' });
  assert.notEqual(await wrongPort.ended, 0);
  assert.match(wrongPort.output(), /PORT must be a whole number/);
  const noFolder = npmStart(t, { RIVULET_DIR: '/dev/null/rivulet' });
  assert.notEqual(await noFolder.ended, 0);
  assert.match(noFolder.output(), /\/dev\/null\/rivulet cannot be written \(ENOTDIR\)/);
});

test('npm start: a setting that a gateway refuses ends all, with its words', async (t) => {
  const folder = await tempFolder(t);
  const started = npmStart(t, {
    RIVULET_DIR: folder,
    PORT: String(await freePortAndAt(1)),
    QUEUE_LIMIT: 'many',
  });
  assert.notEqual(await started.ended, 0);
  assert.match(started.output(), /n[12] did not start: .*QUEUE_LIMIT must be a whole number/);
  assert.ok(!existsSync(join(folder, 'start.pid')));
});

test('npm start: when npm is killed, what it started ends by itself', async (t) => {
  const folder = await tempFolder(t);
  const started = npmStart(t, {
    RIVULET_DIR: folder,
    PORT: String(await freePortAndAt(1)),
    DRAIN_MS: '1000',
  });
  const pids = readPids((await started.says(/Processes.*\n/))[0]);
  started.signalGroup('SIGKILL'); // npm, the bootstrap and infra/local.ts at once
  await untilGone(pids);
});
