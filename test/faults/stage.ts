import { setTimeout as delay } from 'node:timers/promises';
import { createGenerationStore } from '../../shared/generation-store.ts';
import { GROUP } from '../../shared/request-queue.ts';
import { freePort } from '../helpers/free-port.ts';
import { type GatewayProcess, type Stack, type StackProcess, startStack } from '../helpers/stack.ts';
import { Crowd, type CrowdOptions, demoText, type Question } from './crowd.ts';
import { record, type Tally } from './tally.ts';

/**
 * What a fault class works with: a running stack, a crowd that streams over it, and an audit of Redis at the end.
 */
export interface FaultClass {
  name: string;
  run(context: FaultContext): Promise<void>;
}

export interface FaultContext {
  tally: Tally;
  random: () => number;
  users: number;
  /** How long faults are injected. */
  seconds: number;
  short: boolean;
  say(text: string): void;
  /** Writes down what the processes said, if something was lost. For stages that the class starts itself. */
  explain(stage: Stage): Promise<void>;
  /** A stack with these settings; one that is still whole is used again. */
  stage(options?: StageOptions): Promise<Stage>;
}

export interface StageOptions {
  gateways?: number;
  workers?: number;
  env?: Record<string, string>;
  gatewayEnv?: Record<string, string>;
  workerEnv?: Record<string, string>;
  redisUrl?: string;
  redisArgs?: string[];
}

/** Quick leases, so that a run is short; enough tries for a storm of kills; short retention of nothing. */
export const QUICK: StageOptions = {
  env: { LOG_LEVEL: 'info', RETENTION_MS: '300000', DRAIN_MS: '5000' },
  gatewayEnv: { QUEUE_LIMIT: '5000' },
  workerEnv: { LEASE_MS: '1500', RETRY_BASE_MS: '100', MAX_ATTEMPTS: '50', WORKER_CONCURRENCY: '300' },
};

export interface Stage {
  readonly stack: Stack;
  readonly options: StageOptions;
  /** Live ones only. */
  gateways(): GatewayProcess[];
  workers(): StackProcess[];
  urls(): string[];
  addWorker(env?: Record<string, string>): Promise<StackProcess>;
  addGateway(node: string, env?: Record<string, string>): Promise<GatewayProcess>;
  /** A gateway under the same id, on the same port. */
  restartGateway(old: GatewayProcess): Promise<GatewayProcess>;
  /** Starts a worker for each that ended, until called again. */
  supervise(): () => Promise<void>;
  /** Whether every process still runs and `/readyz` is true. */
  whole(): Promise<boolean>;
  stop(): Promise<void>;
}

export async function startStage(options: StageOptions): Promise<Stage> {
  const stack = await startStack(null, { ...options, gateways: 0, workers: 0 });
  const isAlive = ({ child }: StackProcess) => child.exitCode === null && child.signalCode === null;
  const stage: Stage = {
    stack,
    options,
    gateways: () => stack.gateways.filter(isAlive),
    workers: () => stack.workers.filter(isAlive),
    urls: () =>
      stage
        .gateways()
        .map((one) => one.url)
        .filter((url) => url !== ''),
    addWorker: (env) => stack.addWorker(env),
    addGateway: async (node, env = {}) => stack.addGateway({ node, port: await freePort(), env }),
    restartGateway: (old) => stack.addGateway({ node: old.node, port: old.port }),
    supervise() {
      let on = true;
      const loop = (async () => {
        while (on) {
          const wanted = options.workers ?? 2;
          if (stage.workers().length < wanted) await stage.addWorker().catch(() => {});
          else await delay(50);
        }
      })();
      return async () => {
        on = false;
        await loop;
      };
    },
    async whole() {
      if (stage.gateways().length < (options.gateways ?? 2)) return false;
      if (stage.workers().length < (options.workers ?? 2)) return false;
      return (await Promise.all(stage.gateways().map(isReady))).every(Boolean);
    },
    stop: () => stack.stop(),
  };
  try {
    await Promise.all([
      ...Array.from({ length: options.gateways ?? 2 }, (_, index) => stage.addGateway(`n${index + 1}`)),
      ...Array.from({ length: options.workers ?? 2 }, () => stage.addWorker()),
    ]);
  } catch (error) {
    await stack.stop();
    throw error;
  }
  return stage;
}

export async function isReady(gateway: GatewayProcess): Promise<boolean> {
  try {
    return (await fetch(`${gateway.http}/readyz`, { signal: AbortSignal.timeout(2_000) })).status === 200;
  } catch {
    return false;
  }
}

export async function until(
  what: string,
  timeoutMs: number,
  test: () => boolean | Promise<boolean>,
): Promise<number> {
  const began = Date.now();
  while (!(await test())) {
    if (Date.now() - began > timeoutMs) throw new Error(`not within ${timeoutMs} ms: ${what}`);
    await delay(50);
  }
  return Date.now() - began;
}

/** The resident memory of a process, bytes. */
export async function residentBytes(pid: number): Promise<number> {
  const { readFile } = await import('node:fs/promises');
  const pages = Number((await readFile(`/proc/${pid}/statm`, 'utf8')).split(' ')[1]);
  return pages * 4096;
}

/** A question to the demo model whose answer streams for `ms` or so. */
export async function demoQuestion(random: () => number, ms: number, intervalMs = 40): Promise<Question> {
  const parameters = {
    tokens: Math.max(5, Math.round((ms / intervalMs) * (0.5 + random()))),
    intervalMs,
    seed: Math.floor(random() * 1e9),
  };
  const contents = `question ${Math.floor(random() * 1e9)}`;
  return { contents, parameters, expected: await demoText(contents, parameters) };
}

/** Questions made beforehand, so that the crowd itself never waits. */
export async function demoQuestions(
  random: () => number,
  count: number,
  ms: number,
  intervalMs?: number,
): Promise<() => Question> {
  const list = await Promise.all(Array.from({ length: count }, () => demoQuestion(random, ms, intervalMs)));
  let at = 0;
  return () => ({ ...list[at++ % list.length]! });
}

export interface LoadOptions {
  /** How long an answer streams, ms, about. */
  answerMs?: number;
  intervalMs?: number;
  users?: number;
  crowd?: Partial<CrowdOptions>;
  /** One fault; called again and again for `seconds`. */
  inject: (round: number, crowd: Crowd) => Promise<void>;
  /** Pause between the end of one fault and the next, ms. */
  pauseMs?: number;
  /** At the most. */
  rounds?: number;
  /** However long that takes; one. */
  leastRounds?: number;
  settleMs?: number;
  /** Left out for classes that destroy the records. */
  audit?: boolean;
}

/** Has a crowd stream, injects faults meanwhile, waits for every end, and audits Redis. */
export async function underLoad(context: FaultContext, stage: Stage, options: LoadOptions): Promise<Crowd> {
  const { tally, random } = context;
  const crowd = new Crowd(options.users ?? context.users, {
    urls: stage.urls,
    tally,
    random,
    ...options.crowd,
  });
  try {
    const next = await demoQuestions(random, 200, options.answerMs ?? 2_500, options.intervalMs);
    crowd.stream(() => next());
    await crowd.flowing();
    const end = Date.now() + context.seconds * 1_000;
    let round = 0;
    do {
      await options.inject(++round, crowd);
      tally.faults++;
      await delay((options.pauseMs ?? 800) * (0.5 + random()));
    } while (
      round < (options.leastRounds ?? 1) ||
      (Date.now() < end && round < (options.rounds ?? Number.POSITIVE_INFINITY))
    );
    await crowd.settle(options.settleMs ?? 45_000);
    if (options.audit !== false) await audit(context, stage, crowd);
    await auditExpiry(context, stage);
  } finally {
    await crowd.stop();
  }
  return crowd;
}

/** What Redis holds after the storm must be what the clients saw, and nothing may be left behind. */
export async function audit(context: FaultContext, stage: Stage, crowd: Crowd): Promise<void> {
  const { tally } = context;
  const { look, keys } = stage.stack;
  const store = createGenerationStore({ redis: look, keys, retentionMs: 60_000 });
  // Requests, retries and claims drain. Only then: an end that a failover took is written again after the lease.
  const nodes = stage.stack.gateways.map((one) => one.node);
  const left = async () => {
    let count = 0;
    for (const node of new Set(nodes)) {
      count += await look.client.xlen(keys.requests(node));
      count += await look.client.zcard(keys.retries(node));
      const pending = (await look.client.xpending(keys.requests(node), GROUP).catch(() => [0])) as unknown[];
      count += Number(pending[0]);
    }
    return count;
  };
  try {
    await until('the request streams are empty', 20_000, async () => (await left()) === 0);
  } catch {
    record(tally, 'errors', `${await left()} requests are left in the streams`);
  }
  for (const answer of crowd.answers) {
    if (answer.end !== 'done' && answer.end !== 'cancelled' && answer.end !== 'failed') continue;
    const attached = await store.attach(answer.user, answer.messageId, 'audit', '');
    const name = `${answer.user}/${answer.messageId}`;
    if (attached.state === 'unknown') {
      record(tally, 'lost', `${name}: its record is gone`);
      continue;
    }
    let { entries } = attached;
    for (let more = attached.more; more; ) {
      const page = await store.readLog(answer.user, answer.messageId, entries.at(-1)!.id);
      entries = [...entries, ...page.entries];
      more = page.more;
    }
    const terminals = entries.filter((entry) => entry.terminal).length;
    if (terminals !== 1)
      record(tally, terminals > 1 ? 'doubled' : 'lost', `${name}: ${terminals} terminal frames in its log`);
    let text = '';
    for (const entry of entries) {
      const frame = JSON.parse(entry.frame) as { type: string; text?: string };
      if (frame.type === 'start') text = '';
      if (frame.type === 'token') text += frame.text;
    }
    if (text !== answer.text) record(tally, 'wrong', `${name}: the log has another text than the client saw`);
  }
  // Nobody's open place is left.
  const open: string[] = [];
  for (const client of crowd.clients)
    for (const messageId of await look.client.hkeys(keys.active(client.user)))
      open.push(`${client.user}/${messageId}`);
  if (open.length > 0) record(tally, 'errors', `open places left: ${open.slice(0, 5).join(', ')}`);
}

/** Every key but those of live nodes goes away by itself. */
async function auditExpiry({ tally }: FaultContext, { stack }: Stage): Promise<void> {
  const { look, keys } = stack;
  const lasting = [
    keys.nodes(),
    keys.workers(),
    keys.requests('').slice(0, -2),
    keys.retries('').slice(0, -2),
  ];
  for (let cursor = '0'; ; ) {
    const [next, names] = (await look.client.call('scan', cursor, 'COUNT', 1_000)) as [string, string[]];
    const lives = await look.batch(names.map((name) => ['pttl', name]));
    names.forEach((name, index) => {
      if (lives[index]![1] === -1 && !lasting.some((start) => name.startsWith(start)))
        record(tally, 'errors', `${name} never expires`);
    });
    cursor = next;
    if (cursor === '0') return;
  }
}
