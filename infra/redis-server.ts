import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, openSync, readFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join, resolve } from 'node:path';
import { endWithThisProcess } from './child-guard.ts';
import { readCommand, tryPort } from './ports.ts';
import { isProcessAlive } from './run-state.ts';

/**
 * A private Redis on loopback: append-only file synced every second, no snapshots, no eviction, its data and
 * its log in one folder. It runs in a process group of its own (Ctrl-C is ours to pass on) and ends with us.
 * States: running, or ended by `stop`, `kill` or itself; `restart` brings it back on the same port and data.
 */
export interface RedisServer {
  readonly url: string;
  readonly port: number;
  /** Of the current process; changes with `restart`. */
  readonly pid: number;
  /** Sends a signal: SIGKILL for a crash, SIGSTOP and SIGCONT for a hang. Resolves when a deadly one has worked. */
  kill(signal?: NodeJS.Signals): Promise<void>;
  /** Ends it in order, with everything on disk. Idempotent. */
  stop(): Promise<void>;
  /** Stops it if it runs, and starts it again on the same port and data. */
  restart(): Promise<void>;
}

export interface RedisServerOptions {
  /** Data, `redis.log` and `redis.pid`. Made when missing; never shared by two servers. */
  dir: string;
  /** 0 or absent = a free one. */
  port?: number;
  /** More settings, as on the command line: `['--maxmemory', '64mb']`. */
  args?: string[];
  /** `redis-server` or `valkey-server`; absent = `REDIS_SERVER`, else the first on the PATH. */
  program?: string;
  /** How long loading the data may take, ms. */
  startTimeoutMs?: number;
  /** Told when it ends without `stop`, `kill` or `restart` of ours, with what it wrote last. */
  onUnexpectedEnd?: (reason: string) => void;
}

const STOP_TIMEOUT_MS = 10_000; // a final fsync of a large append-only file on a slow disk
const DEADLY = new Set<NodeJS.Signals>(['SIGKILL', 'SIGTERM', 'SIGINT', 'SIGQUIT', 'SIGABRT']);

export async function startRedisServer(options: RedisServerOptions): Promise<RedisServer> {
  const dir = resolve(options.dir);
  mkdirSync(dir, { recursive: true });
  const leftover = findLeftover(dir);
  if (leftover) throw new Error(`${dir} is in use by the redis-server with process id ${leftover}`);

  let running: Running | null = null;
  let port = options.port ?? 0;
  const open = async () => {
    // A free port can be taken between our look and its use; only then is another one tried.
    for (let attempt = 1; ; attempt++) {
      const chosen = port || (await tryPort('127.0.0.1', 0));
      try {
        running = await launch(dir, chosen, options);
        port = chosen;
        return;
      } catch (error) {
        if (port || attempt === 3 || !/already in use/i.test(String(error))) throw error;
      }
    }
  };
  await open();

  return {
    get url() {
      return `redis://127.0.0.1:${port}`;
    },
    get port() {
      return port;
    },
    get pid() {
      return running!.child.pid!;
    },
    async kill(signal = 'SIGKILL') {
      if (DEADLY.has(signal)) running!.expected = true;
      running!.child.kill(signal);
      if (DEADLY.has(signal)) await running!.ended;
    },
    stop: () => stop(running!),
    async restart() {
      await stop(running!);
      await open();
    },
  };
}

/** The process id of a server that still runs on this folder's data, for example after its owner crashed. */
export function findLeftover(dir: string): number | null {
  let pid: number;
  try {
    pid = Number(readFileSync(join(dir, 'redis.pid'), 'utf8'));
  } catch {
    return null;
  }
  if (!pid || !isProcessAlive(pid)) return null;
  return /(redis|valkey)-(server|check)/.test(readCommand(pid) ?? '') ? pid : null;
}

interface Running {
  child: ChildProcess;
  /** Set before we end it ourselves. */
  expected: boolean;
  ended: Promise<void>;
}

async function launch(dir: string, port: number, options: RedisServerOptions): Promise<Running> {
  const program = options.program ?? process.env.REDIS_SERVER ?? findOnPath();
  const logPath = join(dir, 'redis.log');
  const log = openSync(logPath, 'a');
  const logStart = readFileSync(logPath).length;
  const child = spawn(
    program,
    [
      ...['--port', String(port), '--bind', '127.0.0.1', '--dir', dir, '--pidfile', join(dir, 'redis.pid')],
      ...['--daemonize', 'no', '--appendonly', 'yes', '--appendfsync', 'everysec', '--save', ''],
      ...['--auto-aof-rewrite-min-size', '128mb'], // as in redis.conf: under load 64 MB are a few seconds
      ...['--maxmemory-policy', 'noeviction'],
      ...(options.args ?? []),
    ],
    { cwd: dir, stdio: ['ignore', log, log], detached: true },
  );
  closeSync(log);

  let ready = false;
  let failure: Error | null = null;
  const lastWords = () => {
    try {
      const lines = readFileSync(logPath).subarray(logStart).toString().trim().split('\n');
      return `Its last words:\n${lines.slice(-6).join('\n')}`;
    } catch {
      return `Its log ${logPath} is gone.`;
    }
  };
  const ended = new Promise<void>((resolve) => {
    child.once('error', (error: NodeJS.ErrnoException) => {
      failure = new Error(
        error.code === 'ENOENT'
          ? `${program} is not on the PATH: install redis-server or valkey-server, or set REDIS_SERVER=/path/to/it`
          : `${program} could not be started: ${error.message}`,
      );
      resolve();
    });
    child.once('exit', (code, signal) => {
      const reason = `redis-server on port ${port} ended with ${signal ?? `code ${code}`}. ${lastWords()}`;
      failure ??= new Error(reason);
      resolve();
      if (ready && !current.expected) options.onUnexpectedEnd?.(reason);
    });
  });
  const current: Running = { child, expected: false, ended };
  if (child.pid) ended.then(endWithThisProcess(child.pid, STOP_TIMEOUT_MS));

  const timeoutMs = options.startTimeoutMs ?? 30_000;
  const deadline = Date.now() + timeoutMs;
  let delayMs = 10;
  while (!failure && !(await answers(port, child.pid!))) {
    if (Date.now() > deadline) {
      const words = lastWords();
      await stop(current);
      throw new Error(`redis-server on port ${port} did not answer in ${timeoutMs} ms. ${words}`);
    }
    await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, delayMs))]);
    delayMs = Math.min(delayMs * 2, 200);
  }
  if (failure) throw failure;
  ready = true;
  return current;
}

async function stop(running: Running): Promise<void> {
  running.expected = true;
  running.child.kill('SIGCONT'); // a stopped process would not see SIGTERM
  running.child.kill('SIGTERM');
  const timer = setTimeout(() => running.child.kill('SIGKILL'), STOP_TIMEOUT_MS);
  await running.ended;
  clearTimeout(timer);
}

/** Whether this very process answers PING with its data loaded; another server on the port does not count. */
function answers(port: number, pid: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection({ host: '127.0.0.1', port, timeout: 1_000 });
    let text = '';
    const finish = (result: boolean) => {
      socket.destroy();
      resolve(result);
    };
    socket.on('connect', () => socket.write('PING\r\nINFO server\r\n'));
    socket.on('data', (chunk) => {
      text += chunk;
      if (text.startsWith('-NOAUTH')) return finish(true); // it is up; the password is the caller's
      if (!'+PONG'.startsWith(text.slice(0, 5))) return finish(false); // -LOADING
      const match = /process_id:(\d+)\r/.exec(text);
      if (match) finish(Number(match[1]) === pid);
    });
    socket.on('timeout', () => finish(false));
    socket.on('error', () => finish(false));
    socket.on('close', () => resolve(false));
  });
}

function findOnPath(): string {
  const folders = [
    ...(process.env.PATH ?? '').split(':'),
    '/usr/sbin',
    '/usr/local/bin',
    '/opt/homebrew/bin',
  ];
  for (const name of ['redis-server', 'valkey-server']) {
    const folder = folders.find((folder) => folder && existsSync(join(folder, name)));
    if (folder) return join(folder, name);
  }
  return 'redis-server';
}
