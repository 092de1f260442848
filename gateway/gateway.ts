import { readFile } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { createSecureContext } from 'node:tls';
import type { Logger } from 'pino';
import { ConfigError } from '../shared/config.ts';
import { RivuletError } from '../shared/errors.ts';
import { createGenerationStore } from '../shared/generation-store.ts';
import { httpAddress } from '../shared/http-address.ts';
import { createKeys } from '../shared/keys.ts';
import { type Running, within } from '../shared/lifecycle.ts';
import { createNodeRegistry } from '../shared/node-registry.ts';
import { type PipelineSnapshot, readPipeline } from '../shared/pipeline.ts';
import { CLOSE } from '../shared/protocol.ts';
import { createRedis, readServerTime } from '../shared/redis.ts';
import { isPeopleAddress } from '../shared/reply-stream.ts';
import { createRequestQueue } from '../shared/request-queue.ts';
import { createTracing } from '../shared/tracing.ts';
import { createAdmission } from './admission.ts';
import { createAiDesk } from './ai/ai-desk.ts';
import { createAiDoor } from './ai/ai-door.ts';
import { AiSession, type AiSessionParts } from './ai/ai-session.ts';
import { createAuthenticate, readBearer } from './authenticate.ts';
import { createClientAddress } from './client-address.ts';
import type { GatewayConfig } from './config.ts';
import { createDelivery } from './delivery.ts';
import { createAiChat } from './http/ai-chat.ts';
import { createMessageRoutes, refuseApiBody } from './http/messages.ts';
import { openApiFile } from './http/openapi.ts';
import { createRoutes, text } from './http/routes.ts';
import { loadStaticFiles } from './http/static-files.ts';
import { createGatewayMetrics } from './metrics.ts';
import { holdNodeLease, NODE_LEASE_MS } from './node-lease.ts';
import { createOrigins, type Origins } from './origins.ts';
import { createPeople } from './people.ts';
import { createPolicies } from './policy/create-policies.ts';
import { createQueuePlaces } from './queue-places.ts';
import { tellPositions } from './queue-positions.ts';
import { createAddressLimit, createFrameRates } from './rate-limits.ts';
import { tailReplies } from './reply-tail.ts';
import { Session, type SessionParts } from './session.ts';
import {
  type Connection,
  type HttpAnswer,
  listen,
  type Peer,
  type SocketServer,
  type UpgradeRequest,
} from './socket-server.ts';

/** Builds a gateway's parts, in order, and takes them down in reverse. */

const HEARTBEAT_MS = 25_000; // below the 30 s and 60 s idle timeouts of common proxies
const INIT_MS = 60_000; // a socket that never says who it is holds a place no longer
const TAIL_STILL_MS = 4_500; // a blocked read of 1 s and the watchdog's 3 s; more means that nothing moves
const HEAL_MS = 1_000;
const TRIM_ENTRIES = 2_000; // of the reply stream at a time: about a millisecond of Redis' time
const SNAPSHOT_MS = 1_000;
const CLOSE_BATCH = 500; // sockets closed at a time, so that a node's clients do not come back at once
const CLOSE_MS = 3_000; // for each step of leaving once the sockets are closed

export interface Gateway extends Running {
  readonly port: number;
}

export async function startGateway(config: GatewayConfig, log: Logger): Promise<Gateway> {
  const node = config.NODE_ID;
  const keys = createKeys(config.KEY_PREFIX);
  const closers: (() => unknown)[] = [];
  const stopping = new AbortController();
  const tls = await readTls(config);
  let draining = false;
  try {
    let server = null as SocketServer | null;
    const metrics = createGatewayMetrics({
      connections: () => server?.connections.size ?? 0,
      followed: () => delivery.size,
      /** Told by one gateway at a time, or every number would come once from each. */
      async pipeline() {
        if (!redis.isReady()) return null;
        const [nodes, now] = await Promise.all([registry.nodes(), readServerTime(redis.client)]);
        const first = nodes.find(({ until }) => until > now);
        return first?.node === node ? lookAtPipeline() : null;
      },
    });
    const redis = createRedis({
      url: config.REDIS_URL,
      name: `gateway:${node}:commands`,
      log,
      hot: true,
      onPing: (seconds) => metrics.redis.observe(seconds),
    });
    closers.push(() => redis.close());
    const tracing = await createTracing(config.OTEL_EXPORTER_OTLP_ENDPOINT, 'rivulet-gateway', {
      'service.instance.id': node,
    });
    if (tracing) closers.push(() => tracing.stop());
    const tailRedis = createRedis({ url: config.REDIS_URL, name: `gateway:${node}:tail`, log, hot: true });
    closers.push(() => tailRedis.close());
    await Promise.all([redis.connected(), tailRedis.connected()]);

    const store = createGenerationStore({
      redis,
      keys,
      retentionMs: config.RETENTION_MS,
      compactAfterMs: config.COMPACT_AFTER_MS,
    });
    const queue = createRequestQueue({ redis, keys });
    const registry = createNodeRegistry({ redis, keys });
    const delivery = createDelivery({
      store,
      node,
      log,
      counters: {
        healed: () => metrics.healed.inc(),
        slow: () => metrics.slow.inc(),
        doubled: () => metrics.doubled.inc(),
      },
    });
    closers.push(() => delivery.stop());

    const startedAt = Date.now();
    let countUsers = () => 0; // nobody is let in before the rest is made
    const lease = await holdNodeLease({
      node,
      registry,
      facts: () => ({
        startedAt,
        url:
          config.PUBLIC_URL ??
          (server && httpAddress({ isSecure: tls !== undefined, host: config.HOST, port: server.port })),
        connections: server?.connections.size ?? 0,
        users: countUsers(),
      }),
      onBeat: async () => {
        await redis.client.pexpire(keys.replies(node), 600_000);
      },
      log,
    });
    closers.push(() => lease.leave());
    await queue.ensureGroup(node);

    const { policies, stop: stopPolicies } = await createPolicies(config, log);
    closers.push(stopPolicies);
    const aiDoor = createAiDoor({ redis, keys, log });
    closers.push(() => aiDoor.stop());
    const people = await createPeople({
      config,
      instance: lease.instance,
      redis,
      keys,
      registry,
      policies,
      closeOthers: aiDoor.closeUser,
      metrics,
      log,
      signal: stopping.signal,
    });
    closers.push(() => people.stop());
    countUsers = () => people.mailboxes.users;

    let frames = 0;
    const tail = tailReplies({
      node,
      keys,
      redis: tailRedis,
      onFrame(address, frame) {
        frames++;
        if (isPeopleAddress(address)) people.mailboxes.onEntry(address, frame);
        else delivery.onFrame(address, frame);
      },
      onBroken(reason) {
        metrics.tailBroken.inc();
        log.warn({ reason }, 'comparing every stream with its log');
        void delivery
          .heal((batch) => store.progress(batch), true)
          .catch((error: Error) => log.warn({ err: error.message }, 'heal'));
        void people.mailboxes.lookAtAll();
      },
      log,
      signal: stopping.signal,
    });
    await tail.opened;
    closers.push(() => tail.ended);

    const places = createQueuePlaces({ queue });
    const desk = createAdmission({
      node,
      store,
      queue,
      places,
      policies,
      queueLimit: config.QUEUE_LIMIT,
      userActiveLimit: config.USER_ACTIVE_LIMIT,
      quotaPerDay: config.QUOTA_PER_DAY,
      isDraining: () => draining,
      log,
    });
    const positions = tellPositions({ delivery, places, store, desk, log, signal: stopping.signal });
    const healing = (async () => {
      while (!stopping.signal.aborted) {
        await delay(HEAL_MS, undefined, { signal: stopping.signal }).catch(() => {});
        metrics.frames.inc(frames);
        frames = 0;
        closeSilent(server?.connections ?? []);
        if (!redis.isReady()) continue;
        // What was read is of no use to anybody, and entries for many recipients are not small.
        await redis.client
          .xtrim(keys.replies(node), 'MINID', '~', tail.cursor, 'LIMIT', TRIM_ENTRIES)
          .catch(() => {}); // the streams are bounded without it
        await delivery
          .heal((batch) => store.progress(batch))
          .catch((error: Error) =>
            log.warn({ err: error.message }, 'silent streams not compared; again soon'),
          );
      }
    })();
    closers.push(() => Promise.all([positions, healing]));

    const clientAddress = createClientAddress(config.TRUSTED_PROXIES);
    const addressLimit = createAddressLimit(config.CONNECTIONS_PER_ADDRESS);
    let hasWarnedOfAddress = false;

    /** Adds the connection to its address, or closes it and gives null. */
    function enter(connection: Connection, request: UpgradeRequest): string | null {
      const address = clientAddress(request.address, request.forwardedFor);
      if (addressLimit.enter(address)) return address;
      metrics.addressLimited.inc();
      if (!hasWarnedOfAddress)
        log.warn(
          { address, limit: config.CONNECTIONS_PER_ADDRESS },
          'an address has too many connections; if it is your load balancer, name it in TRUSTED_PROXIES',
        );
      hasWarnedOfAddress = true;
      connection.close(CLOSE.tooManyConnections, 'too many connections from this address right now');
      return null;
    }

    let snapshot: Promise<PipelineSnapshot> | null = null;
    /** One look a second, however many watch. */
    async function lookAtPipeline(): Promise<PipelineSnapshot> {
      if (!snapshot) {
        snapshot = readServerTime(redis.client).then((now) => readPipeline(redis.client, keys, now));
        const forget = () => {
          snapshot = null;
        };
        snapshot.then(() => setTimeout(forget, SNAPSHOT_MS).unref(), forget);
      }
      return snapshot;
    }
    const sessionParts: SessionParts = {
      node,
      tracing,
      keys,
      redis,
      store,
      queue,
      desk,
      places,
      delivery,
      mailboxes: people.mailboxes,
      people: people.desk,
      authenticate: createAuthenticate(config),
      metrics,
      addressLimit,
      rates: createFrameRates({
        connectionFramesPerSecond: config.CONNECTION_FRAMES_PER_SECOND,
        userFramesPerSecond: config.USER_FRAMES_PER_SECOND,
      }),
      heartbeatMs: HEARTBEAT_MS,
      limits: {
        maxFrameBytes: config.MAX_FRAME_BYTES,
        userActive: config.USER_ACTIVE_LIMIT,
        queue: config.QUEUE_LIMIT,
        messageBytes: config.MESSAGE_BYTES,
      },
      log,
    };

    const { authenticate, rates } = sessionParts;
    const { MAX_FRAME_BYTES: maxFrameBytes } = config;
    const aiDesk = createAiDesk({ ...sessionParts, door: aiDoor });
    const aiParts: AiSessionParts = {
      aiDesk,
      door: aiDoor,
      authenticate,
      metrics,
      rates,
      addressLimit,
      maxFrameBytes,
      log,
    };
    const origins = createOrigins(config);
    const aiChat = createAiChat({
      aiDesk,
      door: aiDoor,
      authenticate,
      needsToken: config.AUTH === 'jwt',
      rates,
      addressLimit,
      addressOf: (call) => clientAddress(call.address, call.headers.get('x-forwarded-for') ?? ''),
      origins,
      maxFrameBytes,
      log,
    });

    closers.push(() => aiChat.stop());
    const limits = { messageBytes: config.MESSAGE_BYTES, mostUsers: config.MESSAGE_USERS };
    const files = await loadStaticFiles();
    files.set('/openapi.json', openApiFile(limits));
    const api = createMessageRoutes({
      ...limits,
      apiKeys: config.API_KEYS,
      office: people.office,
      groups: people.groups,
      isDraining: () => draining,
      onSent: () => metrics.messagesSent.inc(),
    });
    const routes = createRoutes({
      files,
      metrics,
      async notReady() {
        if (draining) return 'draining';
        if (!redis.isReady()) return 'no connection to Redis';
        if (performance.now() - tail.lastMs > TAIL_STILL_MS) return 'the reply tail does not move';
        const answered = await Promise.race([
          redis.client.ping().then(
            () => true,
            () => false,
          ),
          delay(1_000, false),
        ]);
        if (!answered) return 'Redis does not answer';
        // It may answer and refuse writes: a master without enough replicas, a full disk, no memory left.
        return performance.now() - lease.renewedMs > NODE_LEASE_MS ? 'Redis takes no writes' : null;
      },
      pipeline: lookAtPipeline,
      pipelineIsOpen: config.AUTH === 'none',
      origins,
      apiKeys: config.API_KEYS,
      async isUser(call) {
        const token = readBearer(call.headers.get('authorization') ?? '');
        const identity = await authenticate(null, token).catch(() => null);
        return identity !== null && rates.takeUser(identity.userId, performance.now()) === 0;
      },
      async nodeUrls() {
        const [nodes, now] = await Promise.all([registry.nodes(), readServerTime(redis.client)]);
        return nodes.flatMap(({ url, until }) => (url && until > now ? url : []));
      },
      api,
    });

    server = await listen(
      config.HOST,
      config.PORT,
      {
        maxFrameBytes: config.MAX_FRAME_BYTES,
        heartbeatMs: HEARTBEAT_MS,
        refuseUpgrade: (request) => refuseUpgrade(request, origins, draining),
        connect: (connection, request) => {
          const address = enter(connection, request);
          if (address === null) return IGNORED;
          const token = request.query.get('token') ?? readBearer(request.authorization);
          if (request.url === '/ai') {
            const userId = request.query.get('userId');
            return new AiSession(connection, { userId, token, address }, aiParts);
          }
          return new Session(connection, token, address, sessionParts);
        },
        answer: (call) => aiChat.answer(call) ?? routes(call),
        refuseBody(call, status, message) {
          const error =
            status === 413
              ? new RivuletError('payload_too_large', message)
              : new RivuletError('invalid_frame', message, { temporary: true });
          return aiChat.refuse(call, status, error) ?? refuseApiBody(call, status, error);
        },
        close: CLOSE,
        onError: (error, where) => log.error({ err: error, where }, 'unexpected error'),
      },
      tls,
    );
    const listening = server;
    closers.push(() => listening.stop());
    await lease.renew(); // with the address
    log.info({ host: config.HOST, port: server.port }, 'listening');

    let stopped: Promise<void> | undefined;
    async function stop(): Promise<void> {
      draining = true; // /readyz says so, new chats are refused
      const deadline = performance.now() + config.DRAIN_MS;
      let closed = 0;
      listening.cutStreams();
      while (listening.connections.size > 0 && performance.now() < deadline) {
        for (const connection of [...listening.connections].slice(0, CLOSE_BATCH)) {
          connection.close(CLOSE.shuttingDown, 'shutting down');
          closed++;
        }
        await delay(20);
      }
      log.info({ closed }, 'sockets closed');
      stopping.abort();
      for (const close of closers.reverse()) await within(CLOSE_MS, close());
    }
    return {
      port: server.port,
      ended: lease.lost,
      stop: () => {
        stopped ??= stop();
        return stopped;
      },
    };
  } catch (error) {
    stopping.abort();
    for (const close of closers.reverse()) await Promise.resolve(close()).catch(() => {});
    throw error;
  }
}

/** For a connection that is being closed. */
const IGNORED: Peer = { onText() {}, onDrain() {}, onClose() {} };

/** Closes the sockets whose time to say who they are is up. */
function closeSilent(connections: Iterable<Connection>): void {
  const now = performance.now();
  for (const connection of connections) {
    const session = connection.peer;
    if (!(session instanceof Session || session instanceof AiSession) || !session.silent) continue;
    if (now - session.openedMs > INIT_MS) connection.close(CLOSE.protocolViolation, 'no init frame');
  }
}

/** The files of TLS, if it is wanted. Read here only to say early and by name what is wrong with them. */
async function readTls(config: GatewayConfig): Promise<{ certFile: string; keyFile: string } | undefined> {
  const { TLS_CERT_FILE: certFile, TLS_KEY_FILE: keyFile } = config;
  if (!certFile || !keyFile) return undefined;
  const read = (name: string, path: string) =>
    readFile(path).catch((error: NodeJS.ErrnoException) => {
      throw new ConfigError(`Wrong settings: ${name} ${path} cannot be read (${error.code})`);
    });
  const [cert, key] = await Promise.all([read('TLS_CERT_FILE', certFile), read('TLS_KEY_FILE', keyFile)]);
  try {
    createSecureContext({ cert, key });
  } catch (error) {
    throw new ConfigError(
      `Wrong settings: TLS_CERT_FILE and TLS_KEY_FILE do not fit: ${(error as Error).message}`,
    );
  }
  return { certFile, keyFile };
}

/** Why a handshake is refused, or null. */
function refuseUpgrade(request: UpgradeRequest, origins: Origins, draining: boolean): HttpAnswer | null {
  if (request.url !== '/ws' && request.url !== '/ai')
    return text(404, `No WebSocket is at ${request.url.slice(0, 200)}; they are at /ws and /ai.\n`);
  if (draining) return text(503, 'This node is shutting down; reconnect.\n', { 'retry-after': '1' });
  if (!origins.allows(request.origin, request.host))
    return text(403, `${origins.explain(request.origin)}.\n`);
  return null;
}
