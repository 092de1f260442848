import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { cpSync, mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { WebSocketServer } from 'ws';
import { startRedisServer } from '../../infra/redis-server.ts';

/** The commands of `infra/`, as a person calls them: what they say and how they leave when something is wrong. */

async function call(
  script: string,
  args: readonly string[],
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

test('chat: an answer that is cut off, kept back or empty does not pass for a whole one', async (t) => {
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1' });
  await once(server, 'listening');
  t.after(() => server.close());
  server.on('connection', (socket) =>
    socket.on('message', (data) => {
      const { type, messageId, contents } = JSON.parse(String(data));
      const send = (frame: object) => socket.send(JSON.stringify({ messageId, ...frame }));
      if (type === 'init') send({ type: 'ready', node: 'n1', heartbeatMs: 0 });
      if (type !== 'chat') return;
      const [finishReason, text = ''] = contents.split(' ');
      send({ type: 'accepted', position: 0 });
      send({ type: 'start', id: '1-0', attempt: 1 });
      if (text) send({ type: 'token', id: '1-1', text });
      send({ type: 'done', id: `1-${text ? 2 : 1}`, finishReason, length: text.length });
    }),
  );
  const url = `ws://127.0.0.1:${(server.address() as AddressInfo).port}`;
  for (const [question, told] of [
    ['content_filter so', 'so\n[cut off by the content filter of the model]\n'],
    ['content_filter', '[kept back by the content filter of the model]\n'],
    ['stop', '[the answer was empty]\n'],
    ['stop so', 'so\n'],
  ] as const)
    assert.deepEqual(await call('chat', ['--url', url, question]), { code: 0, said: told });
});

test('chat: a terminal gets no control characters from a model or its server; a pipe gets them', async (t) => {
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1' });
  await once(server, 'listening');
  t.after(() => server.close());
  server.on('connection', (socket) =>
    socket.on('message', (data) => {
      const { type, messageId } = JSON.parse(String(data));
      const send = (frame: object) => socket.send(JSON.stringify({ messageId, ...frame }));
      if (type === 'init') send({ type: 'ready', node: 'n1', heartbeatMs: 0 });
      if (type !== 'chat') return;
      send({ type: 'accepted', position: 0 });
      send({ type: 'start', id: '1-0', attempt: 1 });
      send({ type: 'token', id: '1-1', text: 'a\x1b]0;b\x07\n\tc\x7f\x9bd' });
      send({ type: 'failed', id: '1-2', code: 'model_error', message: 'no\x1b[2J', temporary: false });
    }),
  );
  const args = ['--url', `ws://127.0.0.1:${(server.address() as AddressInfo).port}`, 'hello'];
  const streams = 'process.stdout.isTTY=process.stderr.isTTY=';
  for (const [isTerminal, answer, failure] of [
    [true, 'a]0;b\n\tcd', 'model_error: no[2J'],
    [false, 'a\x1b]0;b\x07\n\tc\x7f\x9bd', 'model_error: no\x1b[2J'],
  ] as const) {
    const { said } = await call('chat', args, {
      NODE_OPTIONS: `--import=data:text/javascript,${streams}${isTerminal}`,
    });
    assert.ok(said.includes(answer) && said.includes(failure), JSON.stringify(said));
  }
});

test('chat, streams, users, dead, autoscaler, bench, local: a wrong call leaves with 2 and says how to call', async () => {
  for (const [script, args, says] of [
    ['chat', ['--bogus'], /Unknown option '--bogus'.*--help/s],
    ['streams', ['--bogus'], /Unknown option '--bogus'.*Usage: npm run streams/s],
    ['streams', ['bogus'], /Unexpected argument 'bogus'.*Usage: npm run streams/s],
    ['users', ['bogus', '3'], /there is no command bogus\n.*Usage: npm run users/s],
    ['users', [], /a command is missing\n.*Usage: npm run users/s],
    ['dead', ['show'], /show needs names as list prints them\n.*Usage: npm run dead/s],
    ['dead', ['bogus'], /there is no command bogus\n.*Usage: npm run dead/s],
    ['dead', ['list', '--limit', 'x'], /--limit must be a whole number.*Usage: npm run dead/s],
    ['autoscaler', ['--bogus'], /Unknown option '--bogus'.*Usage: npm run autoscaler/s],
    ['local', ['--bogus'], /Unknown option '--bogus'.*Usage: npm start/s],
    ['../test/bench/main', ['zzz'], /Unexpected argument 'zzz'.*Usage: npm run bench/s],
    ['../test/bench/main', ['--systems', 'x'], /there is no system x; .*Usage: npm run bench/s],
    ['local', ['9090'], /Unexpected argument '9090'.*Usage: npm start/s],
  ] as const) {
    const { code, said } = await call(script, [...args]);
    assert.match(said, says);
    assert.doesNotMatch(said, /\n {4}at /);
    assert.equal(code, 2, `${script} ${args.join(' ')}`);
  }
  const { code, said } = await call('local', ['--help']);
  assert.match(said, /^Usage: npm start\n/);
  assert.equal(code, 0);
});

test('what is not Redis, and a file that is not there, are named', async (t) => {
  const web = createServer((_, response) => response.end()).listen(0, '127.0.0.1');
  await once(web, 'listening');
  t.after(() => web.close());
  const url = `redis://127.0.0.1:${(web.address() as AddressInfo).port}`;
  const wrongServer = await call('streams', ['--redis', url]);
  assert.deepEqual(wrongServer, {
    code: 1,
    said: `What answers at ${url} is not Redis: Protocol error, got "H" as reply type byte\n`,
  });
  for (const script of ['streams', '../worker/main']) {
    const { code, said } = await call(script, [], {
      REDIS_URL: 'rediss://127.0.0.1:1',
      REDIS_TLS_CA: '/nope',
    });
    assert.match(said, /^Wrong settings: REDIS_TLS_CA .*\/nope cannot be read \(ENOENT\)\n/);
    assert.equal(code, 2);
  }
});

test('a REDIS_URL that cannot be meant is named by every process and command', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-redis-'));
  const server = await startRedisServer({ dir });
  t.after(async () => {
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  });
  const env = { NODE_ID: 'n1', LOG_LEVEL: 'silent' };
  for (const [script, ...args] of [
    ['../gateway/main'],
    ['../worker/main'],
    ['autoscaler'],
    ['streams'],
    ['users', 'show', '20001'],
    ['dead', 'drop', '--all'],
  ] as const)
    assert.deepEqual(
      await call(script, args, { ...env, REDIS_URL: `${server.url}/99` }),
      {
        code: 2,
        said: 'Wrong settings: REDIS_URL: the database 99 cannot be selected: ERR DB index is out of range\n',
      },
      script,
    );
  assert.deepEqual(await call('../worker/main', [], { ...env, REDIS_URL: 'redis://127.0.0.1:99999' }), {
    code: 2,
    said: 'Wrong settings: REDIS_URL: the port of 127.0.0.1:99999 must be from 1 to 65535\n',
  });
});
