import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { TestContext } from 'node:test';
import { fileURLToPath } from 'node:url';
import { type RedisServer, startRedisServer } from '../../infra/redis-server.ts';
import { createKeys, type Keys } from '../../shared/keys.ts';
import { createRedis, type RedisConnection } from '../../shared/redis.ts';
import { openChat, type TestClient } from './chat-client.ts';
import { aclArgs, readDenials, urlFor } from './redis-users.ts';

/**
 * A real stack for a test: Redis with AOF, gateways and workers as processes of their own, on free ports. Every
 * part is stopped when the test ends. Processes log into `logs`, which a failed test prints.
 */

const ROOT = fileURLToPath(new URL('../../', import.meta.url));

/** For profiling by hand: `STACK_NODE_ARGS="--cpu-prof --cpu-prof-dir=/tmp/prof"`. */
const NODE_ARGS = process.env.STACK_NODE_ARGS?.split(' ') ?? [];

export interface Logged {
  msg?: string;
  level?: string;
  [field: string]: unknown;
}

export interface StackProcess {
  readonly pid: number;
  readonly child: ChildProcess;
  readonly logs: Logged[];
  /** Resolves with the exit code, or null after a signal. */
  readonly exited: Promise<number | null>;
  /** Sends a signal (SIGKILL by default) and, for one that ends it, waits for the end. */
  kill(signal?: NodeJS.Signals): Promise<void>;
  /** The first log line, past or to come, that fits. */
  logged(matches: (line: Logged) => boolean, timeoutMs?: number): Promise<Logged>;
}

export interface GatewayProcess extends StackProcess {
  readonly node: string;
  readonly port: number;
  /** ws://…/ws */
  readonly url: string;
  readonly http: string;
}

export interface Stack {
  readonly redis: RedisServer;
  readonly redisUrl: string;
  /** A connection for looking and meddling. */
  readonly look: RedisConnection;
  readonly keys: Keys;
  readonly gateways: GatewayProcess[];
  readonly workers: StackProcess[];
  addGateway(options?: {
    node?: string;
    port?: number;
    env?: Record<string, string>;
  }): Promise<GatewayProcess>;
  addWorker(env?: Record<string, string>): Promise<StackProcess>;
  /** A bound client on a gateway (the first by default). */
  client(userId: string | number, gateway?: GatewayProcess): Promise<TestClient>;
  stop(): Promise<void>;
}

export interface StackOptions {
  gateways?: number;
  workers?: number;
  /** For every process. */
  env?: Record<string, string>;
  gatewayEnv?: Record<string, string>;
  workerEnv?: Record<string, string>;
  redisArgs?: string[];
  /** Uses this server instead of its own; TEST_REDIS_URL does the same for a whole file (the Cluster runs them so). */
  redisUrl?: string;
  /** Processes connect as the roles of infra/redis-users.acl. On, unless the server is somebody else's. */
  acl?: boolean;
}

/** Spawns one of our processes and reads its log. */
export function spawnProcess(
  script: string,
  env: Record<string, string>,
  signal?: AbortSignal,
  args: string[] = [],
): StackProcess {
  const child = spawn(
    process.execPath,
    [...NODE_ARGS, '--import', './infra/typescript.mjs', script, ...args],
    {
      cwd: ROOT,
      env: { PATH: process.env.PATH, HOME: process.env.HOME, LOG_LEVEL: 'debug', ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
      signal,
    },
  );
  const logs: Logged[] = [];
  const waiting = new Set<() => void>();
  const note = (line: Logged) => {
    logs.push(line);
    if (logs.length > 5_000) logs.splice(0, 1_000);
    for (const wake of waiting) wake();
  };
  createInterface({ input: child.stdout! }).on('line', (text) => {
    try {
      note(JSON.parse(text) as Logged);
    } catch {
      note({ msg: text });
    }
  });
  createInterface({ input: child.stderr! }).on('line', (text) => note({ level: 'stderr', msg: text }));
  let hasExited = false;
  const exited = new Promise<number | null>((resolve) => {
    child.on('exit', (code) => {
      hasExited = true;
      for (const wake of waiting) wake();
      resolve(code);
    });
    child.on('error', () => resolve(null));
  });
  return {
    pid: child.pid!,
    child,
    logs,
    exited,
    async kill(name = 'SIGKILL') {
      if (hasExited) return;
      child.kill(name);
      if (name !== 'SIGSTOP' && name !== 'SIGCONT') await exited;
    },
    logged(matches, timeoutMs = 20_000) {
      return new Promise((resolve, reject) => {
        const timer = setTimeout(
          () => done(new Error(`no such log line within ${timeoutMs} ms:\n${tail(logs)}`)),
          timeoutMs,
        );
        const done = (error: Error | null, line?: Logged) => {
          clearTimeout(timer);
          waiting.delete(look);
          if (error) reject(error);
          else resolve(line!);
        };
        const look = () => {
          const line = logs.find(matches);
          if (line) done(null, line);
          else if (hasExited) done(new Error(`the process ended:\n${tail(logs)}`));
        };
        waiting.add(look);
        look();
      });
    },
  };
}

const tail = (logs: Logged[]) =>
  logs
    .slice(-15)
    .map((line) => JSON.stringify(line))
    .join('\n');

export async function startStack(t: TestContext | null, options: StackOptions = {}): Promise<Stack> {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-test-'));
  const acl = options.acl ?? !options.redisUrl;
  const redis = await startRedisServer({ dir, args: [...aclArgs(dir), ...(options.redisArgs ?? [])] });
  const redisUrl = options.redisUrl ?? process.env.TEST_REDIS_URL ?? redis.url;
  const look = createRedis({ url: redisUrl, name: 'test' });
  const gateways: GatewayProcess[] = [];
  const workers: StackProcess[] = [];
  const clients: TestClient[] = [];
  let stopped: Promise<void> | undefined;

  const stack: Stack = {
    redis,
    redisUrl,
    look,
    keys: createKeys('chat:'),
    gateways,
    workers,
    async addGateway(extra = {}) {
      const node = extra.node ?? `n${gateways.length + 1}`;
      const started = spawnProcess('gateway/main.ts', {
        REDIS_URL: acl ? urlFor('gateway', redisUrl) : redisUrl,
        NODE_ID: node,
        PORT: String(extra.port ?? 0),
        ...options.env,
        ...options.gatewayEnv,
        ...extra.env,
      });
      const process = Object.assign(started, { node, port: 0, url: '', http: '' });
      gateways.push(process);
      const line = await started.logged((entry) => entry.msg === 'listening');
      process.port = line.port as number;
      process.url = `ws://127.0.0.1:${process.port}/ws`;
      process.http = `http://127.0.0.1:${process.port}`;
      return process;
    },
    async addWorker(env = {}) {
      const process = spawnProcess('worker/main.ts', {
        REDIS_URL: acl ? urlFor('worker', redisUrl) : redisUrl,
        ...options.env,
        ...options.workerEnv,
        ...env,
      });
      workers.push(process);
      await process.logged((entry) => entry.msg === 'ready');
      return process;
    },
    async client(userId, gateway = gateways[0]!) {
      const client = await openChat(gateway.url, userId);
      clients.push(client);
      return client;
    },
    stop() {
      stopped ??= (async () => {
        for (const client of clients) client.close();
        await Promise.all(
          [...gateways, ...workers].map(async (process) => {
            process.child.kill('SIGCONT');
            await process.kill('SIGKILL');
          }),
        );
        const denied = acl && look.isReady() ? await look.client.call('acl', 'LOG').catch(() => []) : [];
        await look.close();
        await redis.kill('SIGCONT').catch(() => {});
        await redis.kill('SIGKILL');
        rmSync(dir, { recursive: true, force: true });
        if ((denied as unknown[]).length > 0)
          throw new Error(`infra/redis-users.acl lacks rights:\n${readDenials(denied)}`);
      })();
      return stopped;
    },
  };
  t?.after(() => stack.stop());
  try {
    await look.connected();
    await Promise.all([
      ...Array.from({ length: options.gateways ?? 1 }, (_, index) =>
        stack.addGateway({ node: `n${index + 1}` }),
      ),
      ...Array.from({ length: options.workers ?? 1 }, () => stack.addWorker()),
    ]);
    gateways.sort((a, b) => a.node.localeCompare(b.node));
  } catch (error) {
    await stack.stop();
    throw error;
  }
  return stack;
}
