import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import { endWithThisProcess } from '../../infra/child-guard.ts';
import { type RedisServer, startRedisServer } from '../../infra/redis-server.ts';
import { freePort } from '../helpers/free-port.ts';
import { until } from './stage.ts';

/** A master, a replica and three sentinels that hear each other, real ones, on loopback. */
export interface SentinelSet {
  /** redis+sentinel://… */
  readonly url: string;
  readonly servers: [RedisServer, RedisServer];
  /** Index of the server that the sentinels call the master now. */
  master(): Promise<0 | 1>;
  /** How many bytes the replica is behind, or null when it is not connected. */
  lag(): Promise<number | null>;
  waitForReplica(): Promise<void>;
  /**
   * Starts a dead master again, as a replica of the other. Left alone it says that it is the master until the sentinels
   * have demoted it, eight seconds later. Until it is in step no sentinel may promote it: should the new master not answer
   * one of them for `down-after`, all since the failover would be lost.
   */
  restartAsReplica(index: 0 | 1): Promise<void>;
  /** What the sentinels have decided, from their logs. */
  decisions(): string[];
  /** Freezes the sentinels, or wakes them. */
  signalSentinels(signal: 'SIGSTOP' | 'SIGCONT'): void;
  stop(): Promise<void>;
}

const NAME = 'chatmaster';
const DECISIONS =
  /[+-][so]down|elected|selected-slave|promoted|switch-master|convert-to-slave|role-change|tilt|reboot/;

/** Of this user a sentinel learns whether servers live, and nothing from other sentinels. */
const DEAF = '--user deaf on nopass ~* resetchannels +@all'.split(' ');

export interface SentinelSetOptions {
  downAfterMs?: number;
  /** Four sentinels; the first, also in the URL, never hears of a failover. */
  deaf?: boolean;
  /** What the sentinels ask of whoever speaks to them. */
  password?: string;
}

export async function startSentinelSet({
  downAfterMs = 1_000,
  deaf = false,
  password = '',
}: SentinelSetOptions = {}): Promise<SentinelSet> {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-sentinel-'));
  const common = ['--repl-diskless-sync-delay', '0', '--min-replicas-to-write', '0', ...(deaf ? DEAF : [])];
  const first = await startRedisServer({ dir: join(dir, 'a'), args: common });
  const second = await startRedisServer({
    dir: join(dir, 'b'),
    args: [...common, '--replicaof', `127.0.0.1 ${first.port}`],
  });
  const servers: [RedisServer, RedisServer] = [first, second];
  const children: { child: ChildProcess; release: () => void; port: number; logFile: string }[] = [];
  for (let index = deaf ? -1 : 0; index < 3; index++) {
    const port = await freePort();
    const own = join(dir, `s${index}`);
    mkdirSync(own);
    const file = join(own, 'sentinel.conf');
    const logFile = join(own, 'sentinel.log');
    writeFileSync(
      file,
      [
        `port ${port}`,
        'bind 127.0.0.1',
        `dir ${own}`,
        `logfile ${logFile}`,
        `sentinel monitor ${NAME} 127.0.0.1 ${first.port} 2`,
        `sentinel down-after-milliseconds ${NAME} ${downAfterMs}`,
        `sentinel failover-timeout ${NAME} 6000`,
        `sentinel parallel-syncs ${NAME} 1`,
        index < 0 ? `sentinel auth-user ${NAME} deaf\nsentinel auth-pass ${NAME} any` : '',
        password ? `requirepass "${password}"\nsentinel sentinel-pass "${password}"` : '',
        '',
      ].join('\n'),
    );
    const child = spawn(process.env.REDIS_SERVER ?? 'redis-server', [file, '--sentinel'], {
      stdio: 'ignore',
      detached: true,
    });
    children.push({ child, release: endWithThisProcess(child.pid!), port, logFile });
  }
  const asks = children.slice(deaf ? 1 : 0).map(
    ({ port }) =>
      new Redis({
        port,
        host: '127.0.0.1',
        ...(password ? { password } : {}),
        maxRetriesPerRequest: 2,
        retryStrategy: () => 100,
      }),
  );
  for (const ask of asks) ask.on('error', () => {});

  /** Speaks to one of the servers, over a connection of its own. */
  async function tell<T>(index: number, say: (client: Redis) => Promise<T>, retries = 3): Promise<T> {
    const client = new Redis(servers[index]!.port, { maxRetriesPerRequest: retries });
    client.on('error', () => {});
    try {
      return await say(client);
    } finally {
      client.disconnect();
    }
  }

  const set: SentinelSet = {
    url: `redis+sentinel://${children.map(({ port }) => `127.0.0.1:${port}`).join(',')}/${NAME}${
      password ? `?sentinel-password=${encodeURIComponent(password)}` : ''
    }`,
    servers,
    async master() {
      const [, port] = (await asks[0]!.call('sentinel', 'get-master-addr-by-name', NAME)) as [string, string];
      return Number(port) === servers[0].port ? 0 : 1;
    },
    async lag() {
      const info = await tell(await set.master(), (client) => client.info('replication'), 1);
      const offset = Number(/master_repl_offset:(\d+)/.exec(info)?.[1]);
      const replica = /slave0:.*state=online,offset=(\d+)/.exec(info)?.[1];
      return replica === undefined ? null : offset - Number(replica);
    },
    async waitForReplica() {
      await until('the replica is in step', 20_000, async () => {
        const lag = await set.lag().catch(() => null);
        return lag !== null && lag < 1_000_000;
      });
      await tell(1 - (await set.master()), (replica) => replica.config('SET', 'replica-priority', 100));
      // The sentinels must know each other, and that the replica may be promoted, before a failover can work.
      for (const ask of asks)
        await until('the sentinels know each other', 20_000, async () => {
          const master = (await ask.call('sentinel', 'master', NAME)) as string[];
          const replicas = (await ask.call('sentinel', 'replicas', NAME)) as string[][];
          const read = (facts: string[], field: string) => facts[facts.indexOf(field) + 1];
          return (
            read(master, 'num-other-sentinels') === '2' &&
            read(master, 'flags') === 'master' &&
            replicas.some((facts) => read(facts, 'slave-priority') === '100')
          );
        });
    },
    async restartAsReplica(index) {
      await servers[index].restart();
      await tell(index, async (client) => {
        await client.config('SET', 'replica-priority', 0);
        await client.replicaof('127.0.0.1', servers[1 - index]!.port);
      });
    },
    decisions() {
      return children.flatMap(({ logFile }, index) =>
        readFileSync(logFile, 'utf8')
          .split('\n')
          .filter((line) => DECISIONS.test(line))
          .map((line) => `sentinel ${index + 1}: ${line.replace(/^\S+ \d+ \w+ \d+ /, '')}`),
      );
    },
    signalSentinels(signal) {
      for (const { child } of children) child.kill(signal);
    },
    async stop() {
      for (const ask of asks) ask.disconnect();
      for (const { child, release } of children) {
        const ended = new Promise((resolve) => child.once('exit', resolve));
        if (child.exitCode === null && child.signalCode === null) {
          child.kill('SIGKILL');
          await ended;
        }
        release();
      }
      for (const server of servers) {
        await server.kill('SIGCONT').catch(() => {});
        await server.kill('SIGKILL').catch(() => {});
      }
      rmSync(dir, { recursive: true, force: true });
    },
  };
  try {
    await set.waitForReplica();
  } catch (error) {
    await set.stop();
    throw error;
  }
  return set;
}
