import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { parse } from 'yaml';
import { eventually } from '../helpers/eventually.ts';
import { freePort } from '../helpers/free-port.ts';

/**
 * What `infra/compose.yaml` runs of other people's programs, run outside a container with compose's own arguments
 * and environment: its volumes are mapped back to the checkout, its ports to free ones. What the image of
 * Rivulet runs is in infra-files.test.ts. Programs are Debian's, so older than those of the named images.
 */

const INFRA = fileURLToPath(new URL('../../infra/', import.meta.url));

interface Service {
  command: string[];
  environment: Record<string, string>;
  volumes: string[];
  healthcheck: { test: [string, string] };
}
const { services } = parse(readFileSync(`${INFRA}compose.yaml`, 'utf8'), { merge: true }) as {
  services: Record<'redis' | 'haproxy' | 'prometheus', Service>;
};

/** A path inside the container as the file of the checkout that compose mounts there. */
function mapped({ volumes }: Service, path: string): string {
  const mount = volumes.map((volume) => volume.split(':')).find(([, inside]) => inside === path);
  return mount ? join(INFRA, mount[0]!) : path;
}

function start(t: TestContext, file: string, args: string[], cwd: string, env: Record<string, string> = {}) {
  const child = spawn(file, args, { cwd, env: { PATH: process.env.PATH, ...env } });
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (chunk) => {
      output += chunk;
    });
  const exited = new Promise<number | null>((resolve) => {
    child.on('error', (error) => {
      output += error.message;
      resolve(null);
    });
    child.on('exit', resolve);
  });
  t.after(() => child.kill('SIGKILL'));
  return { output: () => output, exited, stop: () => child.kill('SIGTERM') };
}

function folder(t: TestContext): string {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-compose-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  return dir;
}

test('redis: starts on redis.conf, is healthy, keeps an append-only file, evicts nothing', async (t) => {
  const service = services.redis;
  const server = process.env.REDIS_SERVER ?? 'redis-server';
  const cli = server.replace(/-server$/, '-cli');
  const port = await freePort();
  const conf = readFileSync(`${INFRA}redis.conf`, 'utf8');
  const acl = /^aclfile (\S+)$/m.exec(conf)![1]!;
  assert.notEqual(mapped(service, acl), acl, 'compose mounts the ACL file where redis.conf looks for it');
  const [program, ...args] = service.command.map((arg) => mapped(service, arg));
  assert.equal(program, 'redis-server');
  // The working directory is /data in the image of Redis, and compose keeps that one.
  const redis = start(
    t,
    server,
    [...args, '--port', String(port), '--bind', '127.0.0.1', '--aclfile', mapped(service, acl)],
    folder(t),
  );

  const [kind, script] = service.healthcheck.test;
  assert.equal(kind, 'CMD-SHELL');
  const check = script.replace('redis-cli', `"${cli}" -p ${port}`);
  await eventually(
    `health of redis: ${redis.output()}`,
    async () => spawnSync('sh', ['-c', check]).status === 0,
  );
  const ask = (...words: string[]) =>
    spawnSync(cli, ['-p', String(port), '--no-auth-warning', '--user', 'operator', ...words], {
      encoding: 'utf8',
      env: { PATH: process.env.PATH, REDISCLI_AUTH: 'CHANGE-ME-operator' },
    }).stdout;
  assert.equal(ask('PING').trim(), 'PONG');
  assert.match(ask('INFO', 'persistence'), /^aof_enabled:1\r?$/m);
  assert.match(ask('INFO', 'memory'), /^maxmemory_policy:noeviction\r?$/m);
  assert.match(ask('INFO', 'memory'), /^maxmemory:2147483648\r?$/m);
  redis.stop();
  assert.equal(await redis.exited, 0, redis.output());
  assert.notEqual(spawnSync('sh', ['-c', check]).status, 0, 'the health check does notice');
});

test('haproxy: the configuration is valid and runs before any gateway has a name', async (t) => {
  const service = services.haproxy;
  const [program, ...args] = service.command.map((arg) => mapped(service, arg));
  assert.equal(program, 'haproxy');
  const haproxy = process.env.HAPROXY ?? 'haproxy';
  const env = { PATH: process.env.PATH, ...service.environment };
  const check = spawnSync(haproxy, ['-c', ...args], { encoding: 'utf8', env });
  assert.equal(check.status, 0, check.stdout + check.stderr);
  const warnings = check.stderr.split('\n').filter((line) => line.startsWith('[WARNING]'));
  assert.ok(
    warnings.every((line) => /could not resolve address 'gateway-[12]'/.test(line)),
    warnings.join('\n'),
  );
  const broken = spawnSync(haproxy, ['-c', ...args], {
    encoding: 'utf8',
    env: { ...env, GATEWAY_1: 'a:b:c' },
  });
  assert.notEqual(broken.status, 0, 'the check does check');

  const [clients, stats] = [await freePort(), await freePort()];
  const running = start(t, haproxy, args, folder(t), {
    ...service.environment,
    HTTP_BIND: `127.0.0.1:${clients}`,
    STATS_BIND: `127.0.0.1:${stats}`,
  });
  const metrics = await eventually(`metrics of haproxy: ${running.output()}`, async () => {
    const response = await fetch(`http://127.0.0.1:${stats}/metrics`).catch(() => null);
    return response?.status === 200 && response.text();
  });
  for (const server of ['n1', 'n2'])
    assert.match(metrics as string, new RegExp(`proxy="gateways",server="${server}"`));
  const response = await fetch(`http://127.0.0.1:${clients}/readyz`);
  assert.equal(response.status, 503, 'it serves, and has nobody to ask');
  await response.arrayBuffer();
  running.stop();
  await running.exited;
});

test('prometheus: settings and rules are valid', (t) => {
  const service = services.prometheus;
  assert.equal(
    service.command,
    undefined,
    'the command of the image: --config.file=/etc/prometheus/prometheus.yml',
  );
  const promtool = process.env.PROMTOOL ?? 'promtool';
  if (spawnSync(promtool, ['--version']).error)
    return t.skip('promtool is not installed (Debian: the package prometheus), or set PROMTOOL');
  const check = (what: string, file: string) =>
    spawnSync(promtool, ['check', what, mapped(service, `/etc/prometheus/${file}`)], { encoding: 'utf8' });
  const config = check('config', 'prometheus.yml');
  assert.equal(config.status, 0, config.stderr);
  assert.match(config.stdout, /1 rule files found/);
  const rules = check('rules', 'alerts.yml');
  assert.equal(rules.status, 0, rules.stderr);
  assert.notEqual(check('rules', 'prometheus.yml').status, 0, 'the check does check');
});
