import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import {
  COMMANDS,
  dependencyProblem,
  describeNpmFailure,
  findTool,
  nodeProblem,
  parseServerVersion,
  planInstall,
  platformProblem,
  TOOLS,
} from '../../infra/bootstrap.mjs';

const linux = { platform: 'linux', arch: 'x64' };

function tempDir(t: TestContext): string {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-bootstrap-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  return dir;
}

test('Node 20.11 and later 20.x pass', () => {
  for (const version of ['v20.11.0', 'v20.20.2']) assert.equal(nodeProblem({ version, abi: '115' }), null);
});

test('every other Node is told which version is needed and how to get it', () => {
  const others = [
    ['v14.21.3', '83', /^Rivulet needs Node 20/],
    ['v16.20.2', '93', /uWebSockets\.js would run .* the code needs/],
    ['v18.20.8', '108', /the code needs what came with Node 20/],
    ['v20.10.0', '115', /this is Node 20\.10\.0/],
    ['v20.15.0', '999', /ABI 115; this Node has ABI 999/],
    ['v22.21.1', '127', /native build that supports Node up to 20/],
    ['v24.11.0', '137', /native build that supports Node up to 20/],
  ] as const;
  for (const [version, abi, reason] of others) {
    const text = nodeProblem({ version, abi });
    assert.match(text ?? '', reason, version);
    assert.match(text ?? '', new RegExp(`this is Node ${version.slice(1)}`));
    for (const way of ['nvm install', 'fnm use', 'nodesource', '.nvmrc']) assert.ok(text?.includes(way), way);
  }
});

test('platforms without a build are named before anything is installed', () => {
  assert.equal(platformProblem({ ...linux, musl: false }), null);
  assert.equal(platformProblem({ platform: 'darwin', arch: 'arm64', musl: false }), null);
  assert.match(platformProblem({ ...linux, musl: true }) ?? '', /musl.*node:20-slim/);
  assert.match(platformProblem({ platform: 'linux', arch: 's390x', musl: false }) ?? '', /linux s390x/);
  assert.match(platformProblem({ platform: 'win32', arch: 'x64', musl: false }) ?? '', /WSL 2/);
});

test('dependencies are fresh only when every package is the one of the lock file', () => {
  const a = { version: '1.0.0', integrity: 'sha512-a' };
  const foreign = { version: '1.0.0', optional: true, os: ['darwin'], cpu: ['arm64'] };
  const native = { version: '1.0.0', optional: true, os: ['linux'], cpu: ['x64'] };
  const lock = { packages: { '': {}, 'node_modules/a': a, 'node_modules/foreign': foreign } };
  const check = (installed: Record<string, object> | null) =>
    dependencyProblem(lock, installed && { packages: installed }, linux);

  assert.equal(check({ 'node_modules/a': a }), null);
  assert.equal(check(null), 'missing');
  assert.equal(check({}), 'missing: node_modules/a');
  assert.equal(check({ 'node_modules/a': { ...a, version: '1.0.1' } }), 'changed: node_modules/a');
  assert.equal(check({ 'node_modules/a': { ...a, integrity: 'sha512-b' } }), 'changed: node_modules/a');
  assert.equal(check({ 'node_modules/a': a, 'node_modules/old': a }), 'removed: node_modules/old');
  assert.equal(check({ 'node_modules/a': a, 'node_modules/native': native }), null); // a platform the lock lacks
  assert.equal(
    dependencyProblem({ packages: { 'node_modules/n': native } }, { packages: {} }, linux),
    'missing: node_modules/n', // node_modules came from another machine
  );
  const musl = { ...native, libc: ['musl'] };
  assert.equal(
    dependencyProblem({ packages: { 'node_modules/n': musl } }, { packages: {} }, linux),
    null, // npm leaves it out on glibc
  );
});

test('the dependencies of this very checkout are fresh', () => {
  const read = (path: string) => JSON.parse(readFileSync(path, 'utf8'));
  assert.equal(
    dependencyProblem(read('package-lock.json'), read('node_modules/.package-lock.json'), process),
    null,
  );
});

test('a failed npm ci is explained', () => {
  const explain = (output: string) => describeNpmFailure({ code: 1, output, missing: false });
  assert.match(
    explain('npm error code ENOTFOUND\nrequest to https://registry.npmjs.org/tsx failed'),
    /https:\/\/registry\.npmjs\.org cannot be reached.*proxy/,
  );
  assert.match(explain('npm error code EACCES'), /may not write here/);
  assert.match(explain('npm error something else'), /code 1\. Its last words:\nnpm error something else/);
  assert.match(describeNpmFailure({ code: 127, output: '', missing: true }), /npm is not on the PATH/);
});

test('a program comes from its variable, then the PATH; a wrong variable is named', (t) => {
  const dir = tempDir(t);
  const path = join(dir, 'valkey-server');
  writeFileSync(path, '#!/bin/sh\n');
  const tool = { ...TOOLS.redis, names: ['rivulet-no-such-server', 'valkey-server'] };
  assert.equal(findTool({ ...tool, names: ['rivulet-no-such-server'] }, { PATH: dir }), null);
  chmodSync(path, 0o755);
  assert.equal(findTool(tool, { PATH: dir }), path);
  assert.equal(findTool(tool, { PATH: '', REDIS_SERVER: path }), path);
  assert.throws(
    () => findTool(tool, { PATH: dir, REDIS_SERVER: '/nonexistent' }),
    /REDIS_SERVER=\/nonexistent/,
  );
});

test('reads the versions of Redis and Valkey', () => {
  assert.deepEqual(parseServerVersion('Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc'), [7, 0]);
  assert.deepEqual(parseServerVersion('Valkey server v=8.1.4 sha=00000000:0'), [8, 1]);
  assert.equal(parseServerVersion('what'), null);
});

test('a missing program is installed where we may, otherwise one line says how', () => {
  const none = { root: false, apt: false, sudo: false, brew: false };
  const plan = (host: Partial<typeof none>) => planInstall(TOOLS.redis, { ...none, ...host });
  const asRoot = plan({ root: true, apt: true });
  assert.ok('file' in asRoot && asRoot.file === 'sh');
  const script = asRoot.args.join(' ');
  assert.match(script, /apt-get update/);
  assert.match(script, /policy-rc\.d/); // Debian must not start its own server on 6379
  assert.match(script, /systemctl disable redis-server/);
  execFileSync('sh', ['-n', '-c', asRoot.args[1]!]); // it parses
  assert.ok('file' in plan({ apt: true, sudo: true }));
  assert.deepEqual(plan({ brew: true }), {
    how: 'brew',
    file: 'brew',
    args: ['install', '--quiet', 'redis'],
  });
  for (const host of [{ apt: true }, {}]) {
    const refusal = plan(host);
    assert.ok(refusal.advice);
    assert.doesNotMatch(refusal.advice, /\n/);
    assert.match(refusal.advice, /redis-server/);
    assert.match(refusal.advice, /REDIS_SERVER=/);
  }
});

test('each command asks only for what it needs', () => {
  assert.deepEqual(COMMANDS.start.tools([], {}), ['redis']);
  assert.deepEqual(COMMANDS.start.tools([], { REDIS_URL: 'redis://elsewhere' }), []);
  assert.deepEqual(COMMANDS.start.tools(['--help'], {}), [], 'help installs no Redis');
  assert.ok(COMMANDS.test.tools([], {}).includes('chromium'));
  assert.ok(COMMANDS.test.tools(['test/browser/page.test.ts'], {}).includes('chromium'));
  assert.ok(!COMMANDS.test.tools(['unit'], {}).includes('chromium'));
});

test('an unknown command prints the usage and leaves with 1', () => {
  const run = spawnSync(process.execPath, ['infra/bootstrap.mjs', 'nonsense'], { encoding: 'utf8' });
  assert.equal(run.status, 1);
  assert.match(run.stderr, /^Usage: node infra\/bootstrap\.mjs start\|test\|bench\|faults/);
});

test('an installation lock of a process that is gone, whose id is ours or another program has now, holds nobody up', (t) => {
  const folder = tempDir(t);
  cpSync('infra', join(folder, 'infra'), { recursive: true });
  mkdirSync(join(folder, '.rivulet'));
  writeFileSync(join(folder, 'package.json'), '{}');
  writeFileSync(join(folder, 'package-lock.json'), JSON.stringify({ packages: { a: { version: '1.0.0' } } }));
  for (const pid of ['$$', process.pid]) {
    const { stderr } = spawnSync(
      '/bin/sh',
      ['-c', `echo ${pid} > .rivulet/install.lock; exec "$0" infra/bootstrap.mjs start`, process.execPath],
      // npm is one that fails at once: it is asked when the lock was taken.
      { cwd: folder, encoding: 'utf8', timeout: 20_000, env: { PATH: '/nowhere' } },
    );
    assert.match(stderr, /npm is not on the PATH/, `the lock of ${pid}`);
    assert.equal(existsSync(join(folder, '.rivulet/install.lock')), false);
  }
});

test('SIGTERM to npm reaches the processes that drain on it', () => {
  // Without `exec` npm stops only the shell in between, and the process stays behind.
  const { scripts } = JSON.parse(readFileSync('package.json', 'utf8'));
  for (const name of ['gateway', 'worker', 'autoscaler']) assert.match(scripts[name], /^exec node /);
});
