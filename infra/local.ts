import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { basename, dirname, join, relative } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { z } from 'zod';
import { ConfigError, commonSettings, drainMs, integer, parseConfig } from '../shared/config.ts';
import { httpAddress } from '../shared/http-address.ts';
import { createKeys } from '../shared/keys.ts';
import { redactUrl } from '../shared/redis.ts';
import { quote, reportFailure } from './command.ts';
import { findListener, readCommand, tryPort } from './ports.ts';
import { findLeftover, startRedisServer } from './redis-server.ts';
import { lockFolder, readRunState, removeRunState, stateFolder, writeRunState } from './run-state.ts';
import { type Supervised, supervise } from './supervise.ts';

/**
 * `npm start`: Redis, two gateways and an autoscaler with its workers on this machine, each a process of its own
 * that is started again when it dies. Everything written lands in `.rivulet` (setting `RIVULET_DIR`). Order up: ports, lock, Redis,
 * the rest together. Order down: gateways, workers, Redis, lock.
 */

const HELP = `Usage: npm start

Runs Redis, two gateways and workers on this machine until Ctrl-C. Settings come before it, as PORT=9090 npm start:

  PORT          of the first gateway; the second takes the next (8080)
  HOST          address to listen on (127.0.0.1)
  RIVULET_DIR   folder for data and logs; a second copy needs its own, and its own PORT (.rivulet)
  REDIS_URL     a Redis of yours, in place of one of our own
  HANDLER       which model answers: demo, openai, or the path of your handler (demo)

README.md has them all, under "Settings".`;

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));
const LOCAL_LEASE_MS = '5000'; // who kills a worker to see what happens should not wait half a minute
/** Warm workers, so that a first question does not wait for a start and a killed worker has a neighbour. */
const WORKERS_MIN = '2';
/** The autoscaler waits for its workers, which hand back what runs after their own DRAIN_MS. */
const AUTOSCALER_STOP_MS = 10_000;
/** The terminal and npm both pass a Ctrl-C on; what comes within this time is the same one. */
const SAME_SIGNAL_MS = 500;

const schema = z.object({
  HOST: z.string().default('127.0.0.1'),
  PORT: integer('PORT', 0, 65_534).default(8080), // and the next
  REDIS_URL: commonSettings.REDIS_URL.unwrap().optional(), // unset = our own server
  KEY_PREFIX: commonSettings.KEY_PREFIX,
  DRAIN_MS: drainMs,
});
type Config = z.infer<typeof schema>;

/** A reason to stop that a person can act on; printed without a stack. */
class StartError extends Error {}

/** What runs, in the order of opening. */
interface Stack {
  gateways: Supervised[];
  /** Started last, ended first of those that need Redis. */
  autoscaler: Supervised | null;
  closeRedis: () => Promise<void>;
  unlock: () => void;
}

// A reader that left (`| head`) must not take the stack down with it.
process.stdout.on('error', () => {});

function say(line: string) {
  process.stdout.write(`${line}\n`);
}

function readArguments(args: string[]): 'start' | 'help' {
  const { values } = parseArgs({ args, options: { help: { type: 'boolean', short: 'h' } } });
  return values.help ? 'help' : 'start';
}

async function main(args: string[], env: NodeJS.ProcessEnv): Promise<void> {
  try {
    if (readArguments(args) === 'help') return say(HELP);
  } catch (error) {
    process.exitCode = reportFailure(error as Error, HELP);
    return;
  }
  const stack: Stack = { gateways: [], autoscaler: null, closeRedis: async () => {}, unlock: () => {} };
  const stopping = stopOnSignals(stack);
  try {
    const config = parseConfig(schema, { ...env, REDIS_URL: env.REDIS_URL || undefined });
    const folder = stateFolder(env);
    await start(config, env, folder, stack, stopping);
  } catch (error) {
    if (stopping.aborted) return; // the signal's handler closes and leaves
    const known = error instanceof StartError || error instanceof ConfigError;
    process.stderr.write(`${known ? (error as Error).message : (error as Error).stack}\n`);
    await close(stack);
    process.exit(error instanceof ConfigError ? 2 : 1);
  }
}

async function start(
  config: Config,
  env: NodeJS.ProcessEnv,
  folder: string,
  stack: Stack,
  stopping: AbortSignal,
): Promise<void> {
  const logs = join(folder, 'logs');
  prepareFolder(folder, logs);
  const ports = await choosePorts(config, folder);
  stack.unlock = await lock(folder);
  say(`Starting ${config.REDIS_URL ? '' : 'Redis, '}two gateways and workers…`);
  const redis = await openRedis(config, folder, stack, stopping);
  stopping.throwIfAborted();

  const common = { ...env, HOST: config.HOST, REDIS_URL: redis.url, KEY_PREFIX: config.KEY_PREFIX };
  const child = (
    name: string,
    script: string,
    readyMessage: string,
    settings: NodeJS.ProcessEnv,
    stopMs = 5_000, // it ends its own drain; this is for one that hangs
  ) => {
    let starts = 0;
    return supervise({
      name,
      script,
      cwd: ROOT,
      env: { ...common, ...settings },
      logPath: join(logs, `${name}.log`),
      readyMessage,
      stopTimeoutMs: config.DRAIN_MS + stopMs,
      say,
      onReady() {
        if (starts++ > 0) say(`${name} is back`);
      },
    });
  };
  const isSecure = Boolean(env.TLS_CERT_FILE || env.TLS_KEY_FILE); // a gateway refuses one without the other
  const host = ['0.0.0.0', '::'].includes(config.HOST) ? '127.0.0.1' : config.HOST;
  // A page that was loaded from one gateway goes on at the other when its own dies.
  const origins = [...new Set(['127.0.0.1', 'localhost', host])].flatMap((name) =>
    ports.map((port) => httpAddress({ isSecure, host: name, port })),
  );
  ports.forEach((port, index) => {
    const node = `n${index + 1}`;
    stack.gateways.push(
      child(node, 'gateway/main.ts', 'listening', {
        NODE_ID: node,
        PORT: String(port),
        ALLOWED_ORIGINS: env.ALLOWED_ORIGINS || origins.join(','),
      }),
    );
  });
  const workers = {
    WORKERS_MIN: env.WORKERS_MIN || (env.WORKERS_MAX === '1' ? '1' : WORKERS_MIN),
    LEASE_MS: env.LEASE_MS || LOCAL_LEASE_MS,
  };
  stack.autoscaler = child('workers', 'infra/autoscaler.ts', 'scaling', workers, AUTOSCALER_STOP_MS);
  let workerPids: number[];
  try {
    const [scaling] = await Promise.all([
      stack.autoscaler.ready,
      ...stack.gateways.map(({ ready }) => ready),
    ]);
    workerPids = scaling.workers as number[];
  } catch (error) {
    throw new StartError(`${(error as Error).message}\nIts log: ${shorten(logs)}/`);
  }
  stopping.throwIfAborted();

  const gateways = ports.map((port, index) => ({
    node: `n${index + 1}`,
    url: httpAddress({ isSecure, host, port }),
  }));
  writeRunState(folder, {
    pid: process.pid,
    startedAt: new Date().toISOString(),
    redisUrl: redis.url,
    keyPrefix: config.KEY_PREFIX,
    gateways,
  });
  greet(stack, workerPids, gateways, redis, createKeys(config.KEY_PREFIX).requests('n1'), logs);
}

/** What a newcomer needs, and nothing more. */
function greet(
  stack: Stack,
  workerPids: number[],
  gateways: { url: string }[],
  redis: OpenRedis,
  stream: string,
  logs: string,
) {
  const processes = [
    ...stack.gateways.map(({ name, pid }) => `${name} ${pid}`),
    ...workerPids.map((pid) => `worker ${pid}`),
    `autoscaler ${stack.autoscaler!.pid}`,
  ];
  if (redis.pid) processes.push(`redis ${redis.pid}`);
  // The commands find this run by its folder.
  const where = process.env.RIVULET_DIR ? `RIVULET_DIR=${quote(process.env.RIVULET_DIR)} ` : '';
  const rows = [
    ['Page', `${gateways[0]!.url}  (the other gateway: ${gateways[1]!.url})`],
    ['Terminal', `${where}npm run chat -- --user 20001 "hello"`],
    ['Queues', `${where}npm run streams`],
    ['Redis', redis.cli ? `${redis.cli} XINFO STREAM '${stream}'` : redactUrl(redis.url)],
    [
      'Processes',
      `${processes.join(', ')}  (kill -9 one in the middle of an answer: it goes on; within seconds if it was its worker)`,
    ],
    ['Logs', `${shorten(logs)}/`],
    ['Stop', 'Ctrl-C'],
  ];
  say(
    ['', 'Rivulet is running.', '', ...rows.map(([name, text]) => `  ${name!.padEnd(10)} ${text}`), ''].join(
      '\n',
    ),
  );
}

function prepareFolder(folder: string, logs: string) {
  try {
    mkdirSync(logs, { recursive: true });
    const probe = join(folder, `probe-${process.pid}`);
    writeFileSync(probe, '');
    rmSync(probe);
  } catch (error) {
    throw new StartError(
      `${folder} cannot be written (${(error as NodeJS.ErrnoException).code}). Data and logs go there; free it, or choose another folder: RIVULET_DIR=/tmp/rivulet npm start`,
    );
  }
}

const explainSecond = (pid: number) =>
  `Rivulet already runs from this folder (process ${pid}). Stop it with Ctrl-C there, or run a second one beside it: RIVULET_DIR=/tmp/rivulet-2 PORT=9090 npm start`;

/** The ports of the two gateways, looked at before anything is started. */
async function choosePorts(config: Config, folder: string): Promise<[number, number]> {
  const [first, second] = await Promise.all(
    [0, 1].map(async (offset) => {
      const port = config.PORT && config.PORT + offset;
      try {
        return await tryPort(config.HOST, port);
      } catch (error) {
        throw new StartError(await explainPort(config, port, error as NodeJS.ErrnoException, folder));
      }
    }),
  );
  return [first!, second!];
}

async function explainPort(
  config: Config,
  port: number,
  error: NodeJS.ErrnoException,
  folder: string,
): Promise<string> {
  if (error.code === 'EADDRNOTAVAIL' || error.code === 'ENOTFOUND')
    return `HOST=${config.HOST} is not an address of this machine.`;
  if (error.code === 'EACCES')
    return `Port ${port} needs more rights than this user has. Choose one above 1023: PORT=9090 npm start`;
  if (error.code !== 'EADDRINUSE') return `Port ${port} cannot be opened: ${error.message}`;
  const run = readRunState(folder);
  if (run) {
    const isOurs = run.gateways.some(({ url }) => url.endsWith(`:${port}`));
    return `${isOurs ? `Port ${port} is taken: ` : ''}${explainSecond(run.pid)}`;
  }
  const listener = findListener(port);
  const by = listener ? ` by process ${listener.pid} (${listener.command.slice(0, 80)})` : '';
  const why = port === config.PORT ? '' : ` The second gateway uses the port after ${config.PORT}.`;
  return `Port ${port} is taken${by}.${why} Choose another: PORT=${await findPorts(config.HOST, port)} npm start`;
}

/** Where two ports are free, beyond one that is not; the last one looked at where none are. */
async function findPorts(host: string, taken: number): Promise<number> {
  let port = taken < 9090 ? 9090 : taken + 10;
  for (; port + 10 < 65_536; port += 10)
    try {
      await Promise.all([tryPort(host, port), tryPort(host, port + 1)]);
      break;
    } catch {
      // Taken too.
    }
  return port;
}

/** One run per folder: two Redis servers on one append-only file would ruin it. */
async function lock(folder: string): Promise<() => void> {
  const taken = await lockFolder(folder, (pid) => /local\.ts/.test(readCommand(pid) ?? ''));
  if ('owner' in taken) throw new StartError(explainSecond(taken.owner));
  return taken.unlock;
}

interface OpenRedis {
  url: string;
  /** How to call redis-cli, or null: it knows no Sentinel or Cluster by URL, and a password is not for the screen. */
  cli: string | null;
  /** Null where it is not ours. */
  pid: number | null;
}

/** The Redis of REDIS_URL, or our own with its data kept between runs. */
async function openRedis(
  config: Config,
  folder: string,
  stack: Stack,
  stopping: AbortSignal,
): Promise<OpenRedis> {
  const url = config.REDIS_URL;
  if (url) {
    const isPlain = /^rediss?:\/\/[^@?]*$/.test(url);
    return { url, cli: isPlain ? `redis-cli -u ${quote(url)}` : null, pid: null };
  }
  const dir = join(folder, 'redis');
  await endLeftover(dir);
  const comeBack = async (reason: string) => {
    say(`redis ended (${reason.split('\n')[0]}); starting it again`);
    for (let pauseMs = 500; !stopping.aborted; pauseMs = Math.min(pauseMs * 2, 10_000)) {
      await delay(pauseMs, undefined, { signal: stopping }).catch(() => {});
      if (stopping.aborted) return;
      try {
        await server.restart();
        say('redis is back');
        return;
      } catch (error) {
        say(`redis did not start: ${(error as Error).message}`);
      }
    }
  };
  const starting = startRedisServer({ dir, onUnexpectedEnd: comeBack });
  stack.closeRedis = async () => (await starting.catch(() => null))?.stop();
  const server = await starting.catch((error: Error) => {
    throw new StartError(error.message);
  });
  const cli = basename(process.env.REDIS_SERVER ?? '').startsWith('valkey') ? 'valkey-cli' : 'redis-cli';
  return { url: server.url, cli: `${cli} -p ${server.port}`, pid: server.pid };
}

/** A server that outlived a crashed run holds the data: it goes first. */
async function endLeftover(dir: string) {
  const pid = findLeftover(dir);
  if (!pid) return;
  say(`Ending the Redis of an earlier run (process ${pid})…`);
  process.kill(pid, 'SIGTERM');
  for (let waited = 0; findLeftover(dir) && waited < 10_000; waited += 50) await delay(50);
}

async function close(stack: Stack): Promise<void> {
  await Promise.all(stack.gateways.map((gateway) => gateway.stop()));
  await stack.autoscaler?.stop();
  await stack.closeRedis();
  removeState(stack);
}

function removeState(stack: Stack) {
  if (readRunState()?.pid === process.pid) removeRunState(stateFolder());
  stack.unlock();
}

/** The first signal drains in order, the second kills. */
function stopOnSignals(stack: Stack): AbortSignal {
  const stopping = new AbortController();
  let firstMs: number | null = null;
  const onSignal = () => {
    if (firstMs === null) {
      firstMs = performance.now();
      stopping.abort();
      say('\nStopping, running answers first… (Ctrl-C again kills)');
      close(stack).then(
        () => {
          say('Stopped.');
          process.exit(0);
        },
        (error: Error) => {
          process.stderr.write(`${error.stack}\n`);
          process.exit(1);
        },
      );
    } else if (performance.now() - firstMs > SAME_SIGNAL_MS) {
      for (const child of stack.gateways) child.kill();
      stack.autoscaler?.kill(); // its workers had their first signal; their guards send the second now
      // Redis keeps its order even now: it needs milliseconds, and its data outlives us.
      stack.closeRedis().finally(() => {
        removeState(stack);
        say('Killed.');
        process.exit(1);
      });
    }
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, onSignal);
  return stopping.signal;
}

function shorten(path: string): string {
  const near = relative(process.cwd(), path);
  return near.startsWith('..') ? path : near;
}

await main(process.argv.slice(2), process.env);
