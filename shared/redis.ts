import { createHash } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { Cluster, Command as IoredisCommand, type Pipeline, Redis, type RedisOptions } from 'ioredis';
import type { Logger } from 'pino';
import { ConfigError } from './config.ts';
import { AgreedMaster } from './sentinel.ts';
import { createTurnPipeline, type Outcome } from './turn-pipeline.ts';

/**
 * The only place that opens Redis connections. What it adds to ioredis:
 *
 * - Nothing hangs for ever. A watchdog pings; a connection that stays silent for `SILENCE_MS` is destroyed and
 *   rebuilt, also while it is still shaking hands. Blocked reads have their own deadline (`blocked`).
 * - A command whose connection dies is rejected, never resent behind our back: whoever sent it knows whether it
 *   may be repeated (`retrying` repeats idempotent steps; appends compare with the log first).
 * - A connection whose database cannot be selected is not used.
 * - Scripts are read from `scripts/`, sent by hash, and loaded again after a restart or a failover.
 * - `batch` is one round trip on a single server and one per node in a Cluster.
 *
 * REDIS_URL chooses the engine: `redis://` or `rediss://` one server, `redis+sentinel://host:port,host:port/name`
 * Sentinel (`?sentinel-user=` and `sentinel-password=` when the sentinels want credentials of their own),
 * `redis+cluster://host:port,host:port` Cluster. With `rediss` the query may name files: `?ca=` for an
 * authority of your own, `cert=` and `key=` for a client certificate (settings REDIS_TLS_CA and so on add them).
 */

const SILENCE_MS = 3_000; // a healthy loopback or LAN answers in under 10 ms; below this a slow fsync is no fault
const WATCH_MS = 500; // so that a silent server is noticed within 3.5 s
const RECONNECT_MS = 200; // at the most, when ioredis has given up
const MISTRUST_MS = 500; // while a Cluster loses a node, its map changes several times
export const BLOCK_MS = 1_000; // upper bound for learning of a new node or a stop

export type RedisClient = Redis | Cluster;
export type Command = [name: string, ...args: (string | number)[]];
export type Reply = [error: Error | null, value: unknown];

export interface RedisConnection {
  readonly client: RedisClient;
  readonly isCluster: boolean;
  /** Runs a script of `scripts/` by its file name. */
  script(name: ScriptName, keys: string[], args: (string | number)[]): Promise<unknown>;
  /** The command that `batch` needs to run a script. */
  scriptCommand(name: ScriptName, keys: string[], args: (string | number)[]): Command;
  /** Sends the commands in order, in one round trip where they share a server. Never rejects as a whole. */
  batch(commands: Command[]): Promise<Reply[]>;
  /** The same for commands of which only the outcome matters, not for scripts. */
  outcomes(commands: Command[]): Promise<Outcome[]>;
  /** One command, in the same line as scripts and batches. */
  send(command: Command): Promise<unknown>;
  /** Sends now what waits for the end of this event-loop turn. */
  flush(): void;
  /** A blocked read with a deadline: rejects, and rebuilds the connection, when Redis stays silent after `blockMs`. */
  blocked(blockMs: number, read: Command): Promise<unknown>;
  /** Calls back after every reconnect (not after the first connect). Returns the unsubscriber. */
  onReconnect(listener: () => void): () => void;
  /** Rejects when the first connection is not there in time, with a ConfigError when its database cannot be selected. */
  connected(timeoutMs?: number): Promise<void>;
  /** True when the connection can take commands now. */
  isReady(): boolean;
  close(): Promise<void>;
}

export interface RedisConnectionOptions {
  url: string;
  /** Shown by `CLIENT LIST`. */
  name: string;
  /**
   * Where the time goes: scripts, batches, `send` and `blocked` use a second connection with a lean codec and one
   * write an event-loop turn (`turn-pipeline.ts`). Without effect in a Cluster.
   */
  hot?: boolean;
  /** Told how long each of the watchdog's pings took, twice a second. */
  onPing?: (seconds: number) => void;
  log?: Logger | undefined;
}

const scripts = loadScripts();
export type ScriptName =
  | 'ack'
  | 'ack_inbox'
  | 'admit'
  | 'admit_and_enqueue'
  | 'append_and_publish'
  | 'attach'
  | 'beat'
  | 'beat_worker'
  | 'begin'
  | 'bind'
  | 'cancel'
  | 'dead_letter'
  | 'deliver'
  | 'enqueue'
  | 'drop_requests'
  | 'extend'
  | 'find_queued'
  | 'finish'
  | 'finish_and_ack'
  | 'forget'
  | 'hold_claim'
  | 'join_group'
  | 'keep_connection'
  | 'leave_node'
  | 'move_home'
  | 'open_first'
  | 'promote'
  | 'prove_writes'
  | 'read_inbox'
  | 'register_node'
  | 'release'
  | 'replay'
  | 'remove_consumer'
  | 'remove_node'
  | 'remove_queued'
  | 'restore'
  | 'retry_later'
  | 'settle_chat';

function loadScripts(): Map<string, { source: string; sha: string }> {
  const folder = new URL('./scripts/', import.meta.url);
  // `-- @include name` makes another script a function of that name: two steps become one without a copy.
  const read = (name: string): string =>
    readFileSync(new URL(`${name}.lua`, folder), 'utf8').replace(
      /^-- @include (\w+)$/gm,
      (_, included: string) => `local function ${included}(KEYS, ARGV)\n${read(included)}\nend`,
    );
  return new Map(
    readdirSync(folder)
      .filter((file) => file.endsWith('.lua'))
      .map((file) => {
        const source = read(file.slice(0, -4));
        return [file.slice(0, -4), { source, sha: createHash('sha1').update(source).digest('hex') }];
      }),
  );
}

/** The server's clock, which leases in Redis are measured with, ms. */
export async function readServerTime(client: RedisClient): Promise<number> {
  const [seconds, micros] = await client.time();
  return Number(seconds) * 1_000 + Math.floor(Number(micros) / 1_000);
}

/** True for errors after which the same idempotent step may be tried again: the connection or the server, not us. */
export function isConnectionError(error: unknown): boolean {
  if (!(error instanceof Error)) return false;
  const code = (error as NodeJS.ErrnoException).code;
  if (code && /^(ECONN|EPIPE|ETIMEDOUT|EAI_|ENOTFOUND|EHOSTUNREACH|ENETUNREACH)/.test(code)) return true;
  return (
    error.name === 'MaxRetriesPerRequestError' ||
    error.name === 'AbortError' ||
    error.name === 'ClusterAllFailedError' ||
    /^(READONLY|LOADING|BUSY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|UNBLOCKED|MISCONF|OOM)\b/.test(
      error.message,
    ) ||
    // Too many redirections: a Cluster that was down, or moved what was asked for, through all tries of ioredis.
    /Connection is closed|isn't writeable|Failed to refresh slots|None of startup nodes|Too many Cluster redirections|Command timed out|silent|All sentinels are unreachable/i.test(
      error.message,
    )
  );
}

/** An error in words for people: ioredis speaks of its own settings when a server is away. */
export function describeError(error: unknown): string {
  if (error instanceof Error && error.name === 'MaxRetriesPerRequestError') return 'Redis does not answer';
  return error instanceof Error ? error.message : String(error);
}

/** For `retrying`, where giving up costs a request its worker until the lease is over: longer than a failover. */
export const PATIENT = { deadlineMs: 120_000 };

/**
 * Repeats an idempotent step while the connection is the trouble, with a growing pause.
 * @throws the last error after `deadlineMs`, or at once for any other error or when `signal` aborts
 */
export async function retrying<T>(
  step: () => Promise<T>,
  options: { deadlineMs?: number; signal?: AbortSignal | undefined } = {},
): Promise<T> {
  const deadline = performance.now() + (options.deadlineMs ?? 10_000);
  for (let pauseMs = 20; ; pauseMs = Math.min(pauseMs * 2, 500)) {
    try {
      return await step();
    } catch (error) {
      if (!isConnectionError(error) || performance.now() + pauseMs > deadline || options.signal?.aborted)
        throw error;
      await delay(pauseMs);
    }
  }
}

/**
 * Takes those answers of a round that came: in a Cluster a server may be away, which is no matter of the others. Returns
 * the first error that came instead of one, so that a round is reported once.
 */
export function takeAnswers<T>(
  answers: readonly (T | Error)[],
  take: (answer: T, index: number) => void,
): Error | null {
  let failure: Error | null = null;
  for (const [index, answer] of answers.entries())
    if (answer instanceof Error) failure ??= answer;
    else take(answer, index);
  return failure;
}

export function createRedis(options: RedisConnectionOptions): RedisConnection {
  const { log } = options;
  const target = parseRedisUrl(options.url);
  const common: RedisOptions = {
    ...target.options,
    connectionName: options.name,
    maxRetriesPerRequest: 0, // reject what was unanswered when a connection dies
    autoResendUnfulfilledCommands: false,
    enableOfflineQueue: true, // holds commands for one reconnect at the most
    connectTimeout: SILENCE_MS,
    retryStrategy: (times) => Math.min(20 * 2 ** Math.min(times, 6), 1_000) * (0.5 + Math.random() / 2),
    reconnectOnError: (error) => (/^READONLY/.test(error.message) ? 1 : false), // a demoted master
    disableClientInfo: true,
  };
  const isCluster = target.kind === 'cluster';
  const client: RedisClient = isCluster
    ? new Cluster(target.nodes, {
        redisOptions: common,
        // One by one: only then does ioredis follow a MOVED or ASK for each. In a pipeline that touches several
        // slots, one that moves would fail the commands of that slot.
        enableAutoPipelining: false,
        clusterRetryStrategy: (times) => Math.min(50 * times, 1_000),
        maxRedirections: 16,
        retryDelayOnFailover: 0, // 0 = rejected as on a single server, not sent again by ioredis
        slotsRefreshTimeout: SILENCE_MS,
        slotsRefreshInterval: 5_000,
      })
    : new Redis(common);
  // `client` answers single questions; `hot` has a line of its own. One order holds within each, none between them.
  const hot =
    options.hot && !isCluster
      ? new Redis({ ...common, connectionName: `${options.name}:hot`, enableOfflineQueue: false })
      : null;
  const pipeline = hot ? createTurnPipeline(hot) : null;

  let closed = false;
  let everReady = false;
  const listeners = new Set<() => void>();
  (hot ?? client).on('ready', () => {
    if (everReady) {
      const { remoteAddress, remotePort } = hot?.stream ?? (client instanceof Redis ? client.stream : {});
      const server = remoteAddress ? `${remoteAddress}:${remotePort}` : undefined; // not in a Cluster
      log?.info({ connection: options.name, server }, 'redis connection is back');
      for (const listener of listeners) listener();
    }
    everReady = true;
  });
  // ioredis gives up for good when a connection is told to close while it is being made: the failover detector of
  // Sentinel does that. Nobody but `close` may end one.
  for (const redis of [client, hot])
    if (redis instanceof Redis)
      redis.on('end', () => {
        setTimeout(() => {
          if (!closed) redis.connect().catch(() => {});
        }, RECONNECT_MS * Math.random()).unref();
      });
  let refused = ''; // why the database of REDIS_URL cannot be selected
  for (const redis of [client, hot])
    if (redis instanceof Redis)
      redis.on('error', (error: Error & { command?: { name: string } }) => {
        if (error.name !== 'ReplyError' || error.command?.name !== 'select') return;
        if (/^(ERR|NOPERM)/.test(error.message)) refused = error.message; // all else may pass
        redis.stream.destroy(); // ioredis would go on with database 0, whose keys are others'
      });
  let lastError = '';
  hot?.on('error', () => {}); // `client` has the same trouble, and says so
  client.on('error', (error: Error) => {
    if (error.name === 'MaxRetriesPerRequestError' && lastError !== '') return; // it follows from what was said
    // ioredis repeats the same error at every attempt; say it once per outage.
    if (error.message !== lastError)
      log?.warn({ connection: options.name, err: error.message }, 'redis connection trouble');
    lastError = error.message;
  });
  client.on('ready', () => {
    lastError = '';
  });

  const unwatch = new Set<() => void>();
  let mistrusted: NodeJS.Timeout | null = null;
  /** Tells the listeners of a Cluster now, and once more when its nodes have been quiet for a moment. */
  function mistrust(): void {
    if (closed) return;
    if (mistrusted) clearTimeout(mistrusted);
    else for (const listener of listeners) listener();
    mistrusted = setTimeout(() => {
      mistrusted = null;
      if (!closed) for (const listener of listeners) listener();
    }, MISTRUST_MS);
    mistrusted.unref();
  }

  if (client instanceof Cluster) {
    client.on('+node', (node: Redis) => {
      const stop = watch(node);
      unwatch.add(stop);
      node.once('end', () => {
        stop();
        unwatch.delete(stop);
      });
    });
    // A node that was lost, or another master: a failover may have taken what the old one had acknowledged.
    client.on('-node', () => {
      client.refreshSlotsCache();
      mistrust();
    });
    let masters = '';
    client.on('refresh', () => {
      const now = [...new Set(client.slots.map((owners) => owners?.[0]))].sort().join();
      if (masters !== '' && now !== masters) mistrust();
      masters = now;
    });
  } else unwatch.add(watch(client));
  if (hot) unwatch.add(watch(hot, () => pipeline!.send(['ping'])));

  /** Destroys a connection that is silent while it should speak. */
  function watch(redis: Redis, ping: () => Promise<unknown> = () => redis.ping()): () => void {
    const isBusy = () => blocking && (redis === hot || !hot);
    let status = redis.status;
    let silentMs = 0; // in looks, not by a clock: while this process stood still, it heard nobody
    let pinging = false;
    const timer = setInterval(() => {
      silentMs += WATCH_MS;
      if (redis.status !== status) {
        status = redis.status;
        silentMs = 0;
      }
      if (status === 'ready') {
        if (!pinging && !isBusy()) {
          pinging = true;
          silentMs = 0;
          const sent = performance.now();
          ping().then(
            (reply) => {
              pinging = false;
              // What one user is told must not reach another: better no connection than one whose order is lost.
              if (reply !== 'PONG') rebuild(redis, 'a ping had the answer to something else');
              options.onPing?.((performance.now() - sent) / 1000);
            },
            () => {
              pinging = false;
            },
          );
        } else if (pinging && silentMs >= SILENCE_MS) rebuild(redis, 'no answer to a ping');
      } else if ((status === 'connect' || status === 'connecting') && silentMs >= SILENCE_MS) {
        rebuild(redis, 'no answer while connecting');
        silentMs = 0;
      }
    }, WATCH_MS);
    timer.unref();
    return () => clearInterval(timer);
  }

  function rebuild(redis: Redis, reason: string) {
    if (!redis.stream || redis.stream.destroyed) return; // the sentinels are being asked
    log?.warn({ connection: options.name, reason }, 'redis is silent; rebuilding the connection');
    // `disconnect()` would end politely and wait for a peer that does not speak.
    redis.stream?.destroy(new Error(`redis is silent: ${reason}`));
  }

  let blocking = false; // a blocked read is under way: its own deadline watches

  /** One line for all commands of this connection: the lean one, or what ioredis has. */
  const send: (command: Command) => Promise<unknown> = pipeline
    ? (command) => pipeline.send(command)
    : async (command) => client.sendCommand(toIoredis(command));

  async function sendAll(commands: Command[]): Promise<Reply[]> {
    if (pipeline) return pipeline.batch(commands);
    if (client instanceof Cluster)
      return Promise.all(
        commands.map((command) =>
          send(command).then(
            (value): Reply => [null, value],
            (error: Error): Reply => [error, null],
          ),
        ),
      );
    const several = client.pipeline() as unknown as Pipeline;
    for (const command of commands) several.sendCommand(toIoredis(command));
    return several.exec().then(
      (replies) => replies as Reply[],
      (error: Error) => commands.map((): Reply => [error, null]),
    );
  }

  /** Sends the text of scripts that the server does not know (any more). */
  async function resend(replies: Reply[], scripted: Map<number, Command>): Promise<Reply[]> {
    for (const [index, [, sha, ...rest]] of scripted) {
      const [error] = replies[index]!;
      if (error === null || !isNoScript(error)) continue;
      const { source } = [...scripts.values()].find((script) => script.sha === sha)!;
      replies[index] = (await sendAll([['eval', source, ...rest]]))[0]!;
    }
    return replies;
  }

  const connection: RedisConnection = {
    client,
    isCluster,
    async script(name, keys, args) {
      const { sha, source } = scripts.get(name)!;
      try {
        return await send(['evalsha', sha, keys.length, ...keys, ...args]);
      } catch (error) {
        if (!isNoScript(error)) throw error;
        return send(['eval', source, keys.length, ...keys, ...args]);
      }
    },
    scriptCommand: (name, keys, args) => ['evalsha', scripts.get(name)!.sha, keys.length, ...keys, ...args],
    send,
    flush: () => pipeline?.flush(),
    batch(commands) {
      if (commands.length === 0) return Promise.resolve([]);
      const scripted = new Map<number, Command>(); // the others are let go: they would survive a scavenge
      commands.forEach((command, index) => {
        if (command[0] === 'evalsha') scripted.set(index, command);
      });
      const sent = sendAll(commands);
      return scripted.size > 0 ? sent.then((replies) => resend(replies, scripted)) : sent;
    },
    outcomes(commands) {
      if (pipeline) return pipeline.outcomes(commands);
      return sendAll(commands).then((replies) => replies.map(([error, value]) => error ?? value !== null));
    },
    async blocked(blockMs, read) {
      blocking = true;
      const giveUp = () => {
        const reason = 'a blocked read did not return';
        if (client instanceof Cluster) for (const node of client.nodes('all')) rebuild(node, reason);
        else rebuild(hot ?? client, reason);
      };
      // After a stall of this process the timer comes first and the reply, which lies in the socket, next: it is let by,
      // for the requests in it would be lost to us and wait for their lease.
      let lookAgain: NodeJS.Immediate | undefined;
      const timer = setTimeout(() => {
        lookAgain = setImmediate(giveUp);
      }, blockMs + SILENCE_MS);
      try {
        const reply = send(read);
        pipeline?.flush();
        return await reply;
      } finally {
        blocking = false;
        clearTimeout(timer);
        clearImmediate(lookAgain);
      }
    },
    onReconnect(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    async connected(timeoutMs = 10_000) {
      const deadline = performance.now() + timeoutMs;
      for (;;) {
        if (connection.isReady()) return;
        if (refused && !everReady)
          throw wrongUrl(`the database ${target.options.db} cannot be selected: ${refused}`);
        if (performance.now() > deadline || closed)
          throw new Error(
            lastError.startsWith('Protocol error')
              ? `What answers at ${redactUrl(options.url)} is not Redis: ${lastError.split('. ', 1)[0]}`
              : `Redis at ${redactUrl(options.url)} does not answer${lastError ? `: ${lastError}` : ''}`,
          );
        await delay(20);
      }
    },
    isReady: () => client.status === 'ready' && (!hot || hot.status === 'ready'),
    async close() {
      if (closed) return;
      closed = true;
      for (const stop of unwatch) stop();
      pipeline?.close();
      hot?.disconnect();
      client.disconnect();
    },
  };
  return connection;
}

/** As `call` would make it; but a call cannot take the hundred thousand arguments that restore a long log. */
function toIoredis([name, ...args]: Command): IoredisCommand {
  return new IoredisCommand(name, args, { replyEncoding: 'utf8' });
}

function isNoScript(error: unknown): boolean {
  return error instanceof Error && error.message.startsWith('NOSCRIPT');
}

/** The URL without its passwords, for messages. */
export function redactUrl(url: string): string {
  return url.replace(/\/\/([^@/]*)@/, '//***@').replace(/(sentinel-password=)[^&]*/, '$1***');
}

type Target =
  | { kind: 'server' | 'sentinel'; options: RedisOptions; nodes: [] }
  | { kind: 'cluster'; options: RedisOptions; nodes: { host: string; port: number }[] };

/** @throws ConfigError that names a file that cannot be read */
function readTlsOptions(query: string): NonNullable<RedisOptions['tls']> {
  const files = new URLSearchParams(query);
  const read = (name: string) => {
    const path = files.get(name);
    if (!path) return {};
    try {
      return { [name]: readFileSync(path) };
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      throw new ConfigError(
        `Wrong settings: REDIS_TLS_${name.toUpperCase()} (or ${name}= in REDIS_URL) ${path} cannot be read (${code})`,
      );
    }
  };
  return { ...read('ca'), ...read('cert'), ...read('key') };
}

const wrongUrl = (reason: string) => new ConfigError(`Wrong settings: REDIS_URL: ${reason}`);

/** Reads REDIS_URL: see the top of the file. @throws ConfigError that names what is wrong */
export function parseRedisUrl(text: string): Target {
  const match =
    /^(rediss?)(?:\+(sentinel|cluster))?:\/\/(?:([^@/]*)@)?([^/?]+)(?:\/([^?]*))?(?:\?(.*))?$/.exec(text);
  if (!match) throw wrongUrl(`${redactUrl(text)} cannot be read`);
  const unescaped = 'in user and password, write what is not a letter or digit percent-encoded';
  const ats = text.split('?', 1)[0]!.split('@').length - 1;
  if (ats > (match[3] === undefined ? 0 : 1)) throw wrongUrl(unescaped);
  const [, scheme, engine, credentials, hostList, path, query] = match;
  const [username, password] = credentials?.includes(':') ? credentials.split(/:(.*)/s) : ['', credentials];
  const hosts = hostList!.split(',').map((entry) => {
    const [, host, port] = /^(\[[^\]]+\]|[^:]+)(?::(\d+))?$/.exec(entry) ?? [];
    if (!host) throw wrongUrl(`${entry} is not host:port`);
    if (port && (Number(port) < 1 || Number(port) > 65_535))
      throw wrongUrl(`the port of ${entry} must be from 1 to 65535`);
    return {
      host: host.replace(/^\[|\]$/g, ''),
      port: port ? Number(port) : engine === 'sentinel' ? 26379 : 6379,
    };
  });
  const decode = (part: string) => {
    try {
      return decodeURIComponent(part);
    } catch {
      throw wrongUrl(unescaped);
    }
  };
  const options: RedisOptions = {
    ...(username ? { username: decode(username) } : {}),
    ...(password ? { password: decode(password) } : {}),
    ...(scheme === 'rediss' ? { tls: readTlsOptions(query ?? '') } : {}),
  };
  if (engine === 'cluster') {
    if (path && path !== '0') throw wrongUrl('a Cluster has no database but 0');
    return { kind: 'cluster', options, nodes: hosts };
  }
  if (engine === 'sentinel') {
    if (!path)
      throw wrongUrl('Sentinel needs the name of the master, as in redis+sentinel://host:26379/mymaster');
    const asked = new URLSearchParams(query);
    const [sentinelUsername, sentinelPassword] = [asked.get('sentinel-user'), asked.get('sentinel-password')];
    return {
      kind: 'sentinel',
      options: {
        ...options,
        sentinels: hosts,
        name: path,
        failoverDetector: true,
        sentinelCommandTimeout: SILENCE_MS,
        sentinelRetryStrategy: () => null, // or it would go on by itself, one by one, and commands would wait for ever
        Connector: AgreedMaster as unknown as NonNullable<RedisOptions['Connector']>,
        ...(sentinelUsername ? { sentinelUsername } : {}),
        ...(sentinelPassword ? { sentinelPassword } : {}),
        ...(options.tls ? { enableTLSForSentinelMode: true, sentinelTLS: options.tls } : {}),
      },
      nodes: [],
    };
  }
  if (hosts.length !== 1) throw wrongUrl('several hosts need redis+sentinel:// or redis+cluster://');
  if (path && !/^\d+$/.test(path)) throw wrongUrl('the database must be a number, as in redis://host:6379/0');
  return {
    kind: 'server',
    options: {
      ...options,
      host: hosts[0]!.host,
      port: hosts[0]!.port,
      ...(path ? { db: Number(path) } : {}),
    },
    nodes: [],
  };
}
