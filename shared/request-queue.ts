import type { Keys } from './keys.ts';
import { PATIENT, type RedisConnection, retrying } from './redis.ts';

/**
 * The request streams: one per node, read by all workers through one group. Entries are small carriers (`user`,
 * `message`, `trace`, and a small `payload`, with which a worker can begin without asking); the record of the generation
 * is the truth. At-least-once: an entry may come twice, the scripts that begin sort that out. An entry leaves only by
 * acknowledge+delete in one step, so `XLEN` counts exactly what waits and runs.
 */

export const GROUP = 'workers';
/** Of a payload that goes with its request: whoever looks for a place in the queue reads these too. */
export const REQUEST_PAYLOAD_BYTES = 4_096;
const DEAD_LETTERS_KEPT = 10_000; // a node; payloads are bounded by MAX_FRAME_BYTES
const DEAD_LETTERS_MS = 30 * 24 * 3_600_000; // after the last one
const POSITIONS_PAGE = 1_000;
const PENDING_PAGE = 100;

export interface QueuedRequest {
  node: string;
  entry: string;
  user: string;
  messageId: string;
  trace: string;
  /** The payload (JSON), or '' where only the record has it. */
  payload: string;
  /** How often it was given to a worker, this time included; more than once when workers died with it. */
  deliveries: number;
}

export interface RequestQueue {
  /** Appends below the bound: the number of requests ahead, or -1 with how many there are. */
  enqueue(
    node: string,
    user: string,
    messageId: string,
    limit: number,
    trace?: string,
    payload?: string,
  ): Promise<{ position: number; full: boolean }>;
  /** The number of requests ahead of it, or -1 when neither stream nor retry set holds it. */
  find(node: string, user: string, messageId: string): Promise<number>;
  removeQueued(node: string, user: string, messageId: string): Promise<boolean>;
  /** Position of every request on a node, in order: `user messageId` → requests ahead. */
  positions(node: string, most: number): Promise<Map<string, number>>;
  ensureGroup(node: string): Promise<void>;
  /** What this worker was given and does not hold: the answer that told it so was lost. */
  takeBack(node: string, worker: string, holds: (entry: string) => boolean): Promise<QueuedRequest[]>;
  ack(request: QueuedRequest, worker: string): Promise<boolean>;
  /** Makes a request this worker's, whoever holds it. */
  takeOver(request: QueuedRequest, worker: string): Promise<void>;
  retryLater(request: QueuedRequest, worker: string, delayMs: number): Promise<boolean>;
  deadLetter(
    request: QueuedRequest,
    worker: string,
    letter: { attempts: number; lastAttempt: number; code: string; reason: string; payload: string },
  ): Promise<boolean>;
  /** Moves due retries back into the stream; returns how many. */
  promoteDue(node: string, most: number): Promise<number>;
  /** Extends the leases on one node; returns the entries that are not ours any more. */
  extend(node: string, worker: string, entries: string[]): Promise<string[]>;
  /** Requests waiting, running and backing off, over these nodes. */
  countOpen(nodes: string[]): Promise<number>;
  /** Removes a consumer that holds nothing. */
  removeConsumer(node: string, worker: string): Promise<boolean>;
  /** Removes consumers that hold nothing and were silent for so long. */
  removeIdleConsumers(node: string, idleMs: number): Promise<void>;
  /** Deletes the stream of a node that is gone, if it is empty. */
  dropEmpty(node: string): Promise<boolean>;
  /**
   * Takes requests over whose worker was silent for `leaseMs`; of those that `suspectAfter` workers died with, no more
   * than `suspects`.
   */
  claimStalled(
    node: string,
    worker: string,
    options: { leaseMs: number; most: number; suspectAfter: number; suspects: number },
  ): Promise<QueuedRequest[]>;
}

export function createRequestQueue({ redis, keys }: { redis: RedisConnection; keys: Keys }): RequestQueue {
  type Pending = [entry: string, holder: string, idleMs: number, deliveries: number];

  /**
   * Makes pending requests this worker's, unless somebody has touched them since: XCLAIM asks for the idle time again. Of
   * several workers that saw the same list, one gets each entry.
   */
  async function claim(
    node: string,
    worker: string,
    idleMs: number,
    wanted: Pending[],
  ): Promise<QueuedRequest[]> {
    if (wanted.length === 0) return [];
    const deliveries = new Map(wanted.map(([entry, , , count]) => [entry, count + 1]));
    const entries = (await redis.client.call(
      ...(['xclaim', keys.requests(node), GROUP, worker, idleMs] as const),
      ...deliveries.keys(),
    )) as [string, string[] | null][];
    return entries.flatMap(([entry, fields]) =>
      fields ? [{ ...readRequest(node, entry, fields), deliveries: deliveries.get(entry)! }] : [],
    );
  }

  return {
    async enqueue(node, user, messageId, limit, trace = '', payload = '') {
      // Not repeated on a lost connection: whether it was appended is not known. Admission finds out.
      const [position, length] = (await redis.script(
        'enqueue',
        [keys.requests(node), keys.retries(node)],
        [limit, user, messageId, trace, Buffer.byteLength(payload) <= REQUEST_PAYLOAD_BYTES ? payload : ''],
      )) as [number, number?];
      return position < 0 ? { position: length!, full: true } : { position, full: false };
    },
    async find(node, user, messageId) {
      return (await retrying(() =>
        redis.script('find_queued', [keys.requests(node), keys.retries(node)], [user, messageId]),
      )) as number;
    },
    async removeQueued(node, user, messageId) {
      const removed = await retrying(() =>
        redis.script('remove_queued', [keys.requests(node), keys.retries(node)], [GROUP, user, messageId]),
      );
      return removed === 1;
    },
    async positions(node, most) {
      const positions = new Map<string, number>();
      let from = '-';
      while (positions.size < most) {
        const page = await redis.client.xrange(keys.requests(node), from, '+', 'COUNT', POSITIONS_PAGE);
        for (const [id, fields] of page) {
          const address = `${fields[1]} ${fields[3]}`;
          if (!positions.has(address)) positions.set(address, positions.size);
          from = `(${id}`;
        }
        if (page.length < POSITIONS_PAGE) break;
      }
      return positions;
    },
    async ensureGroup(node) {
      try {
        await redis.client.xgroup('CREATE', keys.requests(node), GROUP, '0', 'MKSTREAM');
      } catch (error) {
        if (!(error instanceof Error && error.message.startsWith('BUSYGROUP'))) throw error;
      }
    },
    async ack(request, worker) {
      const acked = await retrying(() =>
        redis.script('ack', [keys.requests(request.node)], [GROUP, worker, request.entry]),
      );
      return acked === 1;
    },
    async takeOver({ node, entry }, worker) {
      const claim = ['xclaim', keys.requests(node), GROUP, worker, 0, entry, 'JUSTID'] as const;
      await retrying(() => redis.client.call(...claim));
    },
    async retryLater(request, worker, delayMs) {
      const moved = await retrying(
        () =>
          redis.script(
            'retry_later',
            [keys.requests(request.node), keys.retries(request.node)],
            [GROUP, worker, request.entry, request.user, request.messageId, Math.round(delayMs)],
          ),
        PATIENT,
      );
      return moved === 1;
    },
    async deadLetter(request, worker, letter) {
      const written = await retrying(() =>
        redis.script(
          'dead_letter',
          [keys.requests(request.node), keys.dead(request.node)],
          [
            GROUP,
            worker,
            request.entry,
            request.user,
            request.messageId,
            letter.attempts,
            letter.code,
            letter.reason,
            letter.payload,
            DEAD_LETTERS_KEPT,
            DEAD_LETTERS_MS,
            letter.lastAttempt,
          ],
        ),
      );
      return written === 1;
    },
    async promoteDue(node, most) {
      return (await redis.script('promote', [keys.requests(node), keys.retries(node)], [most])) as number;
    },
    async extend(node, worker, entries) {
      // Not repeated: whoever holds a lease asks again soon.
      return (await redis.script('extend', [keys.requests(node)], [GROUP, worker, ...entries])) as string[];
    },
    async countOpen(nodes) {
      const counts = await Promise.all(
        nodes.flatMap((node) => [
          redis.client.xlen(keys.requests(node)),
          redis.client.zcard(keys.retries(node)),
        ]),
      );
      return counts.reduce((sum, count) => sum + count, 0);
    },
    async removeConsumer(node, worker) {
      return (await redis.script('remove_consumer', [keys.requests(node)], [GROUP, worker, 0])) === 1;
    },
    async removeIdleConsumers(node, idleMs) {
      await redis.script('remove_consumer', [keys.requests(node)], [GROUP, '', idleMs]);
    },
    async dropEmpty(node) {
      return (await redis.script('drop_requests', [keys.requests(node), keys.retries(node)], [])) === 1;
    },
    async takeBack(node, worker, holds) {
      const taken: QueuedRequest[] = [];
      for (let from = '-'; ; ) {
        const page = (await redis.client.call(
          ...(['xpending', keys.requests(node), GROUP, from, '+', PENDING_PAGE, worker] as const),
        )) as Pending[];
        const lacking = page.filter(([entry]) => !holds(entry));
        const idleMs = Math.min(...lacking.map(([, , idle]) => idle));
        taken.push(...(await claim(node, worker, idleMs, lacking)));
        if (page.length < PENDING_PAGE) return taken;
        from = `(${page.at(-1)![0]}`;
      }
    },
    async claimStalled(node, worker, { leaseMs, most, suspectAfter, suspects }) {
      const key = keys.requests(node);
      const claimed: QueuedRequest[] = [];
      for (let from = '-', left = suspects; claimed.length < most; ) {
        const page = (await redis.client.call(
          ...(['xpending', key, GROUP, 'IDLE', leaseMs, from, '+', PENDING_PAGE] as const),
        )) as Pending[];
        const wanted = page
          .filter(([, , , deliveries]) => deliveries < suspectAfter || left-- > 0)
          .slice(0, most - claimed.length);
        claimed.push(...(await claim(node, worker, leaseMs, wanted)));
        if (page.length < PENDING_PAGE) break;
        from = `(${page.at(-1)![0]}`;
      }
      return claimed;
    },
  };
}

/** An entry of a request stream as an object. */
export function readRequest(node: string, entry: string, fields: string[]): QueuedRequest {
  const request: QueuedRequest = {
    node,
    entry,
    user: '',
    messageId: '',
    trace: '',
    payload: '',
    deliveries: 1,
  };
  for (let index = 0; index < fields.length; index += 2) {
    if (fields[index] === 'user') request.user = fields[index + 1]!;
    else if (fields[index] === 'message') request.messageId = fields[index + 1]!;
    else if (fields[index] === 'trace') request.trace = fields[index + 1]!;
    else if (fields[index] === 'payload') request.payload = fields[index + 1]!;
  }
  return request;
}
