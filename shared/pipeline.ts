import { z } from 'zod';
import type { Keys } from './keys.ts';
import type { RedisClient } from './redis.ts';
import { GROUP } from './request-queue.ts';

/**
 * One look at the queues and the workers, for the page, `npm run streams` and metrics. It only reads: two round
 * trips, whatever the number of nodes. What is missing counts as zero, since streams come and go.
 */
export interface PipelineSnapshot {
  /** Redis time of the look, ms. */
  time: number;
  nodes: NodeView[];
  workers: WorkerView[];
}

export interface NodeView {
  node: string;
  alive: boolean;
  url: string | null;
  /** Requests that no worker has taken yet. */
  waiting: number;
  /** Requests that a worker holds. */
  running: number;
  /** Requests that wait out a backoff. */
  retries: number;
  dead: number;
  /** Frames ever appended to the node's reply stream; its rise is the reply rate. */
  replied: number;
  replyLength: number;
  connections: number;
}

export interface WorkerView {
  worker: string;
  alive: boolean;
  concurrency: number;
  /** At most 32 of them; `runningCount` has the number. */
  running: { user: string; messageId: string; attempt: number; sinceMs: number }[];
  runningCount: number;
  /** Tokens written since the worker started. */
  tokens: number;
  done: number;
  failed: number;
  host: string;
  pid: number;
}

const count = z.number().catch(0);

const nodeEntry = z.object({ until: count, url: z.string().nullable().catch(null), connections: count });

const workerEntry = z.object({
  until: count,
  concurrency: count,
  running: z
    .array(z.object({ user: z.string(), messageId: z.string(), attempt: z.number(), since: z.number() }))
    .catch([]),
  runningCount: count,
  tokens: count,
  done: count,
  failed: count,
  host: z.string().catch(''),
  pid: count,
});

/** `now` is Redis time in ms: leases and ages are counted against it. */
export async function readPipeline(redis: RedisClient, keys: Keys, now: number): Promise<PipelineSnapshot> {
  const [nodes, workers] = await Promise.all([redis.hgetall(keys.nodes()), redis.hgetall(keys.workers())]);
  return {
    time: now,
    nodes: await Promise.all(
      Object.entries(nodes)
        .sort(byName)
        .map(([node, json]) => readNode(redis, keys, node, json, now)),
    ),
    workers: Object.entries(workers)
      .sort(byName)
      .map(([worker, json]) => viewWorker(worker, json, now)),
  };
}

/** All commands in one tick: ioredis sends them as one write, in a Cluster one per server. */
async function readNode(
  redis: RedisClient,
  keys: Keys,
  node: string,
  json: string,
  now: number,
): Promise<NodeView> {
  const { until, url, connections } = nodeEntry.parse(parseJson(json));
  const [length, groups, retries, dead, replies] = await Promise.all([
    redis.xlen(keys.requests(node)),
    orMissing(redis.xinfo('GROUPS', keys.requests(node)) as Promise<unknown[][]>, []),
    redis.zcard(keys.retries(node)),
    redis.xlen(keys.dead(node)),
    orMissing(redis.xinfo('STREAM', keys.replies(node)) as Promise<unknown[]>, []),
  ]);
  const group = groups.map(toFields).find((fields) => fields.get('name') === GROUP);
  const running = Number(group?.get('pending') ?? 0);
  const reply = toFields(replies);
  return {
    node,
    alive: until > now,
    url,
    // A worker can take a request between the two reads of one node.
    waiting: Math.max(0, length - running),
    running,
    retries,
    dead,
    replied: Number(reply.get('entries-added') ?? 0),
    replyLength: Number(reply.get('length') ?? 0),
    connections,
  };
}

function viewWorker(worker: string, json: string, now: number): WorkerView {
  const { until, running, ...facts } = workerEntry.parse(parseJson(json));
  return {
    worker,
    alive: until > now,
    ...facts,
    running: running.map(({ since, ...request }) => ({ ...request, sinceMs: Math.max(0, now - since) })),
  };
}

/** An entry that cannot be read counts as one whose lease ran out: it shows, and harms nothing. */
function parseJson(json: string): unknown {
  try {
    const value: unknown = JSON.parse(json);
    return typeof value === 'object' && value !== null ? value : {};
  } catch {
    return {};
  }
}

async function orMissing<T>(reply: Promise<T>, missing: T): Promise<T> {
  try {
    return await reply;
  } catch (error) {
    if (error instanceof Error && /no such key/i.test(error.message)) return missing;
    throw error;
  }
}

/** XINFO answers in RESP2 as a flat list: name, value, name, value. */
function toFields(list: unknown[]): Map<string, unknown> {
  const fields = new Map<string, unknown>();
  for (let index = 0; index + 1 < list.length; index += 2) fields.set(String(list[index]), list[index + 1]);
  return fields;
}

function byName([a]: [string, string], [b]: [string, string]): number {
  return a < b ? -1 : 1;
}
