import { mkdirSync, writeFileSync } from 'node:fs';
import { GROUP } from '../../shared/request-queue.ts';
import { cancelStorm, clientsDropped, reconnectStorm, resubmitted, slowReaders } from './clients.ts';
import { failoverBehind, sentinelFailover } from './failover.ts';
import {
  flushed,
  groupDestroyed,
  logsDeleted,
  recordsDeleted,
  repliesLost,
  requestsDeleted,
} from './loss.ts';
import { modelFaults, poison } from './model.ts';
import { peopleGatewayFrozen, peopleGatewayKilled, peopleRedisKilled, peopleRepliesLost } from './people.ts';
import {
  gatewayFrozen,
  gatewayKilled,
  gatewayRestarted,
  rollingRestart,
  workerFrozen,
  workerKilled,
} from './processes.ts';
import { redisFrozen, redisFull, redisKilled, redisSilent } from './redis.ts';
import { type FaultClass, type FaultContext, type Stage, startStage } from './stage.ts';
import { createTally, isClean, type Row, record, type Tally } from './tally.ts';

export const PROCESSES: FaultClass[] = [
  workerKilled,
  workerFrozen,
  gatewayKilled,
  gatewayFrozen,
  rollingRestart,
  gatewayRestarted,
];
export const REDIS: FaultClass[] = [
  redisKilled,
  redisFrozen,
  redisFull,
  redisSilent,
  sentinelFailover,
  failoverBehind,
];
export const LOSS: FaultClass[] = [
  groupDestroyed,
  requestsDeleted,
  repliesLost,
  logsDeleted,
  recordsDeleted,
  flushed,
];
export const CLIENTS: FaultClass[] = [clientsDropped, resubmitted, cancelStorm, slowReaders, reconnectStorm];
export const MODELS: FaultClass[] = [modelFaults, poison];
export const PEOPLE: FaultClass[] = [
  peopleGatewayKilled,
  peopleGatewayFrozen,
  peopleRepliesLost,
  peopleRedisKilled,
];
export const CLASSES: FaultClass[] = [...PROCESSES, ...REDIS, ...LOSS, ...CLIENTS, ...MODELS, ...PEOPLE];

export interface RunOptions {
  names: string[];
  users: number;
  seconds: number;
  seed: number;
  short: boolean;
  /** How many classes run at the same time, each on a stack of its own. Results that are published have 1. */
  lanes?: number;
  say: (text: string) => void;
}

/** Runs the classes; one that throws counts as an error of its own. */
export async function runClasses(options: RunOptions): Promise<Row[]> {
  const { say } = options;
  const waiting = CLASSES.filter(({ name }) => options.names.includes(name));
  const rows: Row[] = [];
  const stages = new Set<Stage>();
  const interrupted = () => {
    void Promise.all([...stages].map((stage) => stage.stop())).finally(() => process.exit(130));
  };
  process.once('SIGINT', interrupted);
  process.once('SIGTERM', interrupted);

  async function lane(): Promise<void> {
    let kept: { key: string; stage: Stage } | null = null;
    const drop = async () => {
      if (!kept) return;
      stages.delete(kept.stage);
      await kept.stage.stop();
      kept = null;
    };
    try {
      for (let next = waiting.shift(); next; next = waiting.shift()) {
        const row = await runClass(next, options, async (wanted = {}) => {
          const key = JSON.stringify(wanted);
          if (kept && (kept.key !== key || !(await kept.stage.whole()))) await drop();
          kept ??= { key, stage: await startStage(wanted) };
          stages.add(kept.stage);
          return kept.stage;
        });
        rows.push(row);
        if (!isClean(row.tally)) {
          if (kept && !explained.has(row.tally))
            await explain(next.name, (kept as { stage: Stage }).stage, say);
          await drop();
        }
      }
    } finally {
      await drop();
    }
  }

  try {
    await Promise.all(Array.from({ length: options.lanes ?? 1 }, lane));
  } finally {
    process.off('SIGINT', interrupted);
    process.off('SIGTERM', interrupted);
  }
  return rows;
}

/** Tallies of classes that explained themselves, with a stage of their own. */
const explained = new WeakSet<Tally>();

/** What the processes said last and what Redis holds, for whoever looks into a loss. */
async function explain(name: string, { stack }: Stage, say: (text: string) => void): Promise<void> {
  const lines: string[] = [];
  for (const process of [...stack.gateways, ...stack.workers]) {
    const end = process.child.signalCode ?? process.child.exitCode ?? 'running';
    lines.push(`--- ${'node' in process ? `gateway ${process.node}` : 'worker'} ${process.pid}: ${end}`);
    lines.push(...process.logs.slice(-300).map((line) => JSON.stringify(line)));
  }
  const { client } = stack.look;
  for (const gateway of stack.gateways) {
    const answer = await fetch(`${gateway.http}/readyz`, { signal: AbortSignal.timeout(3_000) }).then(
      (response) => response.text(),
      (error: Error) => error.message,
    );
    lines.push(`--- ${gateway.node} /readyz: ${answer}`);
  }
  for (const node of new Set(stack.gateways.map((one) => one.node))) {
    const key = stack.keys.requests(node);
    for (const [title, look] of [
      ['requests', () => client.xrange(key, '-', '+', 'COUNT', 20)],
      ['pending', () => client.xpending(key, GROUP, '-', '+', 20)],
      ['consumers', () => client.xinfo('CONSUMERS', key, GROUP)],
      ['replies', () => client.xinfo('STREAM', stack.keys.replies(node))],
    ] as const)
      lines.push(
        `--- ${node} ${title}: ${await look().then(JSON.stringify, (error: Error) => error.message)}`,
      );
  }
  const path = `.rivulet/faults-${name}.log`;
  mkdirSync('.rivulet', { recursive: true });
  writeFileSync(path, `${lines.join('\n')}\n`);
  say(`  logs are in ${path}`);
}

async function runClass(one: FaultClass, options: RunOptions, stage: FaultContext['stage']): Promise<Row> {
  const { say } = options;
  const tally = createTally();
  const began = Date.now();
  try {
    await one.run({
      tally,
      random: createRandom(options.seed),
      users: options.users,
      seconds: options.seconds,
      short: options.short,
      say: (text) => say(`  ${text}`),
      explain: async (own) => {
        if (isClean(tally)) return;
        explained.add(tally);
        await explain(one.name, own, say);
      },
      stage,
    });
  } catch (error) {
    record(tally, 'errors', `the class itself failed: ${(error as Error).stack ?? error}`);
  }
  const row = { class: one.name, seconds: (Date.now() - began) / 1000, tally };
  say(
    `${one.name} ${isClean(tally) ? 'ok' : 'LOST'}: ${tally.faults} faults, ${tally.generations} generations, ${tally.reconnects} reconnects, ${row.seconds.toFixed(1)} s`,
  );
  for (const note of tally.notes.slice(-6)) say(`  · ${note}`);
  for (const problem of tally.problems) say(`  ! ${problem}`);
  return row;
}

/** A small seeded generator (mulberry32), so that a run can be repeated. */
export function createRandom(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296;
  };
}
