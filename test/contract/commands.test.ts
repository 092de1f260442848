import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { cpSync, mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';

/** The commands of `infra/`, as a person calls them: what they say and how they leave when something is wrong. */

async function call(
  script: string,
  args: string[],
  env: Record<string, string> = {},
): Promise<{ code: number; said: string }> {
  const child = spawn(
    process.execPath,
    ['--import', './infra/typescript.mjs', `infra/${script}.ts`, ...args],
    {
      env: { PATH: process.env.PATH, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    },
  );
  let said = '';
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (chunk) => {
      said += chunk;
    });
  const [code] = await once(child, 'close');
  return { code, said };
}

test('without node_modules, one line says what to run', async (t) => {
  const clone = mkdtempSync(join(tmpdir(), 'rivulet-clone-'));
  t.after(() => rmSync(clone, { recursive: true, force: true }));
  for (const folder of ['gateway', 'infra', 'shared'])
    cpSync(new URL(`../../${folder}`, import.meta.url), join(clone, folder), { recursive: true });
  for (const script of ['gateway/main.ts', 'infra/chat.ts']) {
    const { status, stdout, stderr } = spawnSync(
      process.execPath,
      ['--import', './infra/typescript.mjs', script],
      { cwd: clone, encoding: 'utf8' },
    );
    assert.deepEqual(
      [status, stdout, stderr],
      [1, '', 'The dependencies are not installed: run npm ci\n'],
      script,
    );
  }
});

test('RIVULET_DIR of a folder where nothing runs: it says so, and looks nowhere else', async () => {
  for (const [script, args, code] of [
    ['chat', ['hello'], 3],
    ['streams', ['--once'], 1],
    ['users', ['show', '20001'], 1],
    ['dead', ['list'], 1],
  ] as const) {
    const { code: left, said } = await call(script, [...args], { RIVULET_DIR: '/tmp/no such folder' });
    assert.equal(
      said,
      "Nothing runs from RIVULET_DIR=/tmp/no such folder. Start it: RIVULET_DIR='/tmp/no such folder' npm start\n",
    );
    assert.equal(left, code, script);
  }
});

test('chat: a gateway that is not ready says why', async (t) => {
  const server = createServer((request, response) => {
    response.writeHead(request.url === '/readyz' ? 503 : 404);
    response.end('not ready: no connection to Redis\n');
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  t.after(() => server.close());
  const url = `ws://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const there = await call('chat', ['--url', url, 'hello']);
  assert.deepEqual(there, { code: 3, said: `The gateway at ${url} is not ready: no connection to Redis.\n` });
  const nobody = await call('chat', ['--url', 'ws://127.0.0.1:1', 'hello']);
  assert.equal(nobody.code, 3);
  assert.match(nobody.said, /^No gateway answers at ws:\/\/127\.0\.0\.1:1\. Start one with "npm start"/);
});
