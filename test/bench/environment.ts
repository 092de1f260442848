import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { cpus, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { ROOT } from './processes.ts';

/** What a run needs beside the product, and what it ran on. */

const PEERS = join(ROOT, 'test/bench/peers');

/** Installs the peers' packages, as their lock file says, when they are missing or others. */
export function installPeers(say: (text: string) => void): void {
  const wanted = packages(join(PEERS, 'package-lock.json'));
  const present = packages(join(PEERS, 'node_modules/.package-lock.json'));
  const missing = Object.entries(wanted).some(
    ([path, { version, optional }]) => path !== '' && !optional && present[path]?.version !== version,
  );
  if (!missing) return;
  say('Installing the packages of the peers…');
  execFileSync('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'], {
    cwd: PEERS,
    stdio: 'inherit',
  });
}

type Packages = Record<string, { version: string; optional?: boolean }>;

function packages(path: string): Packages {
  return existsSync(path) ? (JSON.parse(readFileSync(path, 'utf8')) as { packages: Packages }).packages : {};
}

export function describeMachine() {
  const own = packages(join(ROOT, 'node_modules/.package-lock.json'));
  const peers = packages(join(PEERS, 'node_modules/.package-lock.json'));
  const version = (list: Packages, name: string) => list[`node_modules/${name}`]?.version;
  return {
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: cpus().length,
    memoryGb: Math.round(totalmem() / 1e9),
    kernel: release(),
    node: process.version,
    redis: run(process.env.REDIS_SERVER ?? 'redis-server', ['--version']),
    commit: run('git', ['rev-parse', '--short', 'HEAD']),
    packages: {
      'uWebSockets.js': version(own, 'uWebSockets.js'),
      ioredis: version(own, 'ioredis'),
      ...Object.fromEntries(
        ['bullmq', 'socket.io', '@socket.io/redis-streams-adapter', 'ws'].map((name) => [
          name,
          version(peers, name),
        ]),
      ),
    },
  };
}

function run(program: string, args: string[]): string {
  try {
    return execFileSync(program, args, {
      cwd: ROOT,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    }).trim();
  } catch {
    return 'unknown';
  }
}
