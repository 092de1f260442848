import { createRedis } from '../../shared/redis.ts';
import { CONTENTS, type LoadPlan } from './load-plan.ts';
import { type LoadHandle, type Measured, measure, startLoad } from './measure.ts';
import { expectedText } from './model.ts';
import { readRssBytes } from './processes.ts';
import { type RunningSystem, type StartOptions, type SystemName, startSystem } from './systems.ts';

/**
 * The workloads. Each runs one system once, from a fresh start, and returns numbers; the bench repeats them in
 * turns and takes medians. `scale` shrinks times for tests of the bench itself.
 */

export interface Metric {
  key: string;
  title: string;
  /** Which way is better; absent = neither. */
  better?: 'more' | 'less';
  digits?: number;
}

export interface Context {
  /** 1 = the real thing; smaller = shorter. */
  scale: number;
  profileDir?: string | undefined;
  /** Answers/s that each system held, from the `held` workload of this run. */
  held: Map<SystemName, number[]>;
  say(text: string): void;
}

export type Numbers = Record<string, number>;

export interface Workload {
  id: string;
  letter: string;
  title: string;
  metrics: Metric[];
  /** Only these systems; absent = all. */
  systems?: SystemName[];
  run(system: SystemName, context: Context): Promise<Numbers>;
}

/** A run whose answers were wrong or lost is no measurement. */
export class WrongAnswers extends Error {}

const START: StartOptions = { gateways: 1, workers: 1, concurrency: 2_000, merge: true };

type Plan = Omit<LoadPlan, 'protocol' | 'targets' | 'tag'>;

const PLAN: Plan = {
  sockets: 200,
  connecting: 200,
  tokens: 100,
  intervalMs: 0,
  drive: { kind: 'closed' },
  warmUpMs: 6_000,
  measureMs: 5_000,
  drainMs: 15_000,
  verifyEvery: 50,
};

async function withSystem<T>(
  name: SystemName,
  options: Partial<StartOptions>,
  context: Context,
  body: (system: RunningSystem) => Promise<T>,
): Promise<T> {
  const system = await startSystem(name, { ...START, profileDir: context.profileDir, ...options });
  try {
    // One answer first: it shows that everything is up, and that the text is right.
    const probe = await measure(system, {
      ...PLAN,
      sockets: system.targets.length,
      drive: { kind: 'once', rampMs: 0, recovery: false },
      warmUpMs: 0,
      measureMs: 100,
      verifyEvery: 1,
    });
    check(name, probe, false);
    return await body(system);
  } finally {
    await system.stop();
  }
}

function check(name: SystemName, result: Measured, overload: boolean): Measured {
  const problems = [
    result.wrongCount && `${result.wrongCount} answers with a wrong number of tokens`,
    result.wrongText && `${result.wrongText} of ${result.compared} texts wrong`,
    result.failed && `${result.failed} failed or rejected`,
    !overload && result.unfinished && `${result.unfinished} unfinished`,
    result.closed && `${result.closed} sockets closed`,
  ].filter(Boolean);
  if (problems.length)
    throw new WrongAnswers(`${name}: ${problems.join(', ')}; ${result.refused.slice(0, 2).join(' | ')}`);
  return result;
}

async function load(
  name: SystemName,
  options: Partial<StartOptions>,
  plan: Partial<Plan>,
  context: Context,
): Promise<Measured> {
  return withSystem(name, options, context, async (system) =>
    check(name, await measure(system, shorten({ ...PLAN, ...plan }, context.scale)), false),
  );
}

/** Several processes share the same load: until each has done enough of it to be compiled, that is what is measured. */
const eachWarm = (processes: number): number => Math.max(PLAN.warmUpMs, 2_000 * processes);

/** Paced answers need their warm-up: before it is over, fewer run than in the long term. */
const shorten = (plan: Plan, scale: number): Plan => ({
  ...plan,
  warmUpMs: plan.intervalMs > 0 ? plan.warmUpMs : plan.warmUpMs * Math.max(scale, 0.25),
  measureMs: plan.measureMs * scale,
});

const perSecond = (count: number, result: Measured) => count / result.seconds;

function throughput(result: Measured): Numbers {
  const { costs, tokens } = result;
  const perMillion = (seconds: number) => (seconds / tokens) * 1e6;
  return {
    tokensPerSecond: perSecond(tokens, result),
    answersPerSecond: perSecond(result.answers, result),
    tokensPerFrame: tokens / result.frames,
    firstTokenP50: result.firstToken.p50,
    firstTokenP99: result.firstToken.p99,
    gatewayCpu: perMillion(costs.gatewayCpu),
    workerCpu: perMillion(costs.workerCpu),
    redisCpu: perMillion(costs.redisCpu),
    commandsPerAnswer: costs.redisCommands / result.answers,
    clientCores: result.clientCores,
    otherCores: result.otherCores,
  };
}

/** Every Redis command that a request costs, also those inside scripts, as `redis:name` → calls. */
function commandsPerRequest(result: Measured): Numbers {
  return Object.fromEntries(
    Object.entries(result.costs.commands)
      .map(([command, calls]): [string, number] => [
        `redis:${command}`,
        Math.round((calls / result.answers) * 100) / 100,
      ])
      .filter(([, calls]) => calls >= 0.05)
      .sort((a, b) => b[1] - a[1]),
  );
}

function paced(result: Measured): Numbers {
  return {
    ...throughput(result),
    interTokenP50: result.interToken.p50,
    interTokenP99: result.interToken.p99,
    late: result.late,
    unserved: result.unserved,
    cores: (result.costs.gatewayCpu + result.costs.workerCpu + result.costs.redisCpu) / result.seconds,
    commandsPerToken: result.costs.redisCommands / result.tokens,
    bytesPerToken: (result.costs.redisBytesIn + result.costs.redisBytesOut) / result.tokens,
  };
}

const TOKENS: Metric[] = [
  { key: 'tokensPerSecond', title: 'tokens/s', better: 'more' },
  { key: 'tokensPerFrame', title: 'tokens/frame', digits: 1 },
  { key: 'gatewayCpu', title: 'gateway CPU s/M', better: 'less', digits: 2 },
  { key: 'workerCpu', title: 'worker CPU s/M', better: 'less', digits: 2 },
  { key: 'redisCpu', title: 'Redis CPU s/M', better: 'less', digits: 2 },
  { key: 'clientCores', title: 'client cores', digits: 2 },
];
const ANSWERS: Metric[] = [
  { key: 'answersPerSecond', title: 'requests/s', better: 'more' },
  { key: 'firstTokenP50', title: 'latency p50 ms', better: 'less', digits: 1 },
  { key: 'firstTokenP99', title: 'p99 ms', better: 'less', digits: 1 },
  { key: 'commandsPerAnswer', title: 'Redis commands/request', better: 'less', digits: 1 },
  { key: 'clientCores', title: 'client cores', digits: 2 },
];
const LATENCY: Metric[] = [
  { key: 'firstTokenP50', title: 'first token p50 ms', better: 'less', digits: 2 },
  { key: 'firstTokenP99', title: 'p99 ms', better: 'less', digits: 2 },
  { key: 'interTokenP50', title: 'inter-token added p50 ms', better: 'less', digits: 2 },
  { key: 'interTokenP99', title: 'p99 ms', better: 'less', digits: 2 },
  { key: 'cores', title: 'CPU cores', better: 'less', digits: 2 },
  { key: 'unserved', title: 'asks unserved', better: 'less' },
];

const openLoop = (answersPerSecond: number, measureMs: number): Partial<Plan> => ({
  sockets: Math.max(200, Math.ceil(answersPerSecond * 4)), // an answer takes a little over 2 s
  intervalMs: 20,
  drive: { kind: 'open', perSecond: answersPerSecond },
  warmUpMs: 6_000,
  measureMs,
});

const HELD_P99_MS = 100;

/** Whether a rate is held: first tokens in time, and as many tokens as were asked for. */
async function holds(name: SystemName, rate: number, context: Context): Promise<Numbers | null> {
  return withSystem(name, { concurrency: 10_000 }, context, async (system) => {
    const result = await measure(system, shorten({ ...PLAN, ...openLoop(rate, 4_000) }, context.scale));
    check(name, result, true);
    const numbers = paced(result);
    const enough = numbers.tokensPerSecond! >= rate * 100 * 0.9;
    const held = result.firstToken.p99 < HELD_P99_MS && enough && result.unfinished + result.unserved === 0;
    context.say(
      `    ${rate}/s: p99 ${result.firstToken.p99.toFixed(1)} ms, ${Math.round(numbers.tokensPerSecond!)} tokens/s, client ${result.clientCores.toFixed(2)} cores, ${held ? 'held' : 'not held'}`,
    );
    return held ? numbers : null;
  });
}

async function searchHeld(name: SystemName, context: Context): Promise<Numbers> {
  let low = 0;
  let numbers: Numbers = { tokensPerSecond: 0 };
  let high = Number.POSITIVE_INFINITY;
  // A later round begins with what the one before found: that takes few steps to confirm or to correct.
  const rates = context.held.get(name) ?? [];
  const guess = rates.at(-1);
  const stride = guess ? 1.1 : 1.6;
  let rate = guess ?? (name === 'locked-list' ? 5 : 100);
  for (let step = 0; step < 9; step++) {
    // A rate counts as too much only when it failed twice: one hiccup of the machine is not the system's.
    const found = (await holds(name, rate, context)) ?? (await holds(name, rate, context));
    if (found) {
      low = rate;
      numbers = found;
    } else high = rate;
    if (high === Number.POSITIVE_INFINITY) rate = Math.ceil(rate * stride);
    else {
      if (low === 0 && high <= 10) break;
      if (low > 0 && high / low <= 1.11) break;
      rate = low > 0 ? Math.round(Math.sqrt(low * high)) : Math.floor(guess ? high / stride : high / 3);
      if (rate === low || rate === high) break;
    }
  }
  rates.push(low);
  context.held.set(name, rates);
  return { heldAnswers: low, heldTokens: low * 100, ...numbers };
}

/** Sockets a process may hold here, less what it needs itself. */
const MOST_SOCKETS = 15_000;

async function idle(name: SystemName, sockets: number, context: Context): Promise<Numbers> {
  const parts = Math.ceil(sockets / MOST_SOCKETS); // gateways and clients: the limit of open files here is 20,000
  const size = Math.floor(sockets / parts);
  const system = await startSystem(name, { ...START, gateways: parts, profileDir: context.profileDir });
  const loads: ReturnType<typeof startLoad>[] = [];
  try {
    const rss = () => system.gateways.reduce((sum, { pid }) => sum + readRssBytes(pid), 0);
    const connect = (target: number, count: number, tag: string) => {
      const handle = startLoad({
        ...PLAN,
        protocol: system.protocol,
        targets: [system.targets[target]!],
        tag,
        sockets: count,
        drive: { kind: 'idle' },
      });
      loads.push(handle);
      return handle;
    };
    // A few first, so that code is loaded and compiled; they stay.
    await Promise.all(system.targets.map((_, index) => connect(index, 500, `w${index}-`).connected));
    await pause(2_000);
    const before = rss();
    const started = performance.now();
    await Promise.all(system.targets.map((_, index) => connect(index, size, `u${index}-`).connected));
    const seconds = (performance.now() - started) / 1_000;
    await pause(3_000);
    const after = rss();
    return {
      acceptSeconds: seconds,
      acceptsPerSecond: (size * parts) / seconds,
      bytesPerSocket: (after - before) / (size * parts),
      gateways: parts,
      gatewayMb: after / parts / 1e6,
    };
  } finally {
    for (const handle of loads) handle.kill();
    await system.stop();
  }
}

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

async function recover(name: SystemName, sockets: number, context: Context): Promise<Numbers> {
  const system = await startSystem(name, {
    ...START,
    gateways: 2,
    concurrency: 10_000,
    recovery: true,
    profileDir: context.profileDir,
  });
  const handle = startLoad({
    ...PLAN,
    protocol: system.protocol,
    targets: system.targets,
    tag: 'u',
    sockets,
    tokens: 200,
    intervalMs: 100,
    drive: { kind: 'once', rampMs: 2_000, recovery: true },
    warmUpMs: 5_000,
    measureMs: 5_000,
    drainMs: 30_000,
    verifyEvery: 10,
  });
  try {
    await handle.windowStart;
    await system.gateways[0]!.kill();
    const result = await handle.result;
    return {
      lostSockets: result.closed,
      recovered: result.recovery!.sockets,
      lastMs: result.recovery!.lastMs,
      p50Ms: result.recovery!.p50Ms,
      wrong: result.wrongCount + result.wrongText + result.failed,
      unfinished: result.unfinished,
    };
  } finally {
    handle.kill();
    await system.stop();
  }
}

/** Redis memory of live and finished generations, and what one keeps beyond its text. */
async function redisMemory(name: SystemName, context: Context): Promise<Numbers> {
  const count = 500;
  return withSystem(name, { concurrency: 1_000 }, context, async (system) => {
    const look = createRedis({ url: system.redisUrl, name: 'bench' });
    const used = async () => {
      const memory = /used_memory:(\d+)/.exec(await look.client.info('memory'));
      return Number(memory![1]);
    };
    /** Everything but the streams that serve all: their entries are trimmed, not kept. */
    const perKind = async () => {
      const sums: Record<string, number> = {};
      const stream = look.client as unknown as {
        scan(cursor: string, ...args: (string | number)[]): Promise<[string, string[]]>;
      };
      let cursor = '0';
      do {
        const [next, keys] = await stream.scan(cursor, 'COUNT', 1_000);
        cursor = next;
        for (const key of keys) {
          const kind = key.split(':').slice(0, 2).join(':');
          const bytes = (await look.client.call('memory', 'usage', key, 'samples', '0')) as number;
          sums[kind] = (sums[kind] ?? 0) + bytes;
        }
      } while (cursor !== '0');
      return sums;
    };
    let handle: LoadHandle | undefined;
    try {
      await look.connected();
      await pause(3_000); // the probe's answer is compacted by then
      const before = await perKind();
      handle = startLoad({
        ...PLAN,
        protocol: system.protocol,
        targets: system.targets,
        tag: 'u',
        sockets: count,
        intervalMs: 60,
        drive: { kind: 'once', rampMs: 500, recovery: false },
        warmUpMs: 4_000,
        measureMs: 3_000,
        drainMs: 20_000,
        verifyEvery: 50,
      });
      await handle.windowStart; // about 60 of 100 tokens are out
      const live = await perKind();
      const result = await handle.result;
      await pause(4_000); // COMPACT_AFTER_MS is 1 s here
      const after = await perKind();
      const rivuletKinds = ['chat:gen', 'chat:log', 'chat:active'];
      const sum = (sums: Record<string, number>) =>
        Object.entries(sums)
          .filter(([kind]) => name !== 'rivulet' || rivuletKinds.includes(kind))
          .reduce((total, [, bytes]) => total + bytes, 0);
      const textBytes = (await expectedText(CONTENTS, PLAN.tokens, 0)).length;
      context.say(`    live ${JSON.stringify(live)}, finished ${JSON.stringify(after)}`);
      return {
        liveBytes: (sum(live) - sum(before)) / count - textBytes * 0.6,
        finishedBytes: (sum(after) - sum(before)) / count - textBytes,
        usedMemoryMb: (await used()) / 1e6,
        finished: result.finished,
      };
    } finally {
      handle?.kill();
      await look.close();
    }
  });
}

/** So many paced answers at the same time; every one measured from its first to its last token. */
async function concurrent(
  name: SystemName,
  answers: number,
  intervalMs: number,
  context: Context,
): Promise<Numbers> {
  const rampMs = answers > 1_000 ? 8_000 : 1_000;
  const measureMs = 8_000;
  const tokens = Math.ceil((rampMs + 3_000 + measureMs) / intervalMs) + 5;
  const result = await load(
    name,
    { concurrency: 10_000 },
    {
      sockets: answers,
      tokens,
      intervalMs,
      drive: { kind: 'once', rampMs, recovery: false },
      warmUpMs: rampMs + 2_000,
      measureMs,
      drainMs: 40_000,
      verifyEvery: 100,
    },
    { ...context, scale: 1 },
  );
  const numbers = paced(result);
  return { ...numbers, cpu: numbers.gatewayCpu! + numbers.workerCpu! + numbers.redisCpu! };
}

const SCALE: Metric[] = [
  { key: 'tokensPerSecond', title: 'tokens/s', better: 'more' },
  { key: 'cpu', title: 'CPU s/M tokens', better: 'less', digits: 1 },
  { key: 'interTokenP99', title: 'inter-token added p99 ms', better: 'less', digits: 1 },
  { key: 'late', title: 'tokens late > 1 s', better: 'less' },
  { key: 'clientCores', title: 'client cores', digits: 2 },
];
const SCALED: SystemName[] = ['rivulet', 'control'];

export const WORKLOADS: Workload[] = [
  {
    id: 'a',
    letter: 'a',
    title: '200 sockets, answers of 100 tokens, unpaced (all merge by the same rule)',
    metrics: TOKENS,
    run: async (name, context) => throughput(await load(name, {}, {}, context)),
  },
  {
    id: 'a-turn',
    letter: 'a',
    title: 'the same, from a model that says one token an event-loop turn (all merge by the same rule)',
    metrics: TOKENS,
    run: async (name, context) => throughput(await load(name, {}, { tokenPerTurn: true }, context)),
  },
  {
    id: 'a-plain',
    letter: 'a',
    title: 'the same as a, peers and control sending a frame a token',
    metrics: TOKENS,
    run: async (name, context) => throughput(await load(name, { merge: false }, {}, context)),
  },
  {
    id: 'b',
    letter: 'b',
    title: '1,000 sockets, answers of one token',
    metrics: ANSWERS,
    run: async (name, context) => {
      const result = await load(name, {}, { sockets: 1_000, tokens: 1 }, context);
      const commands = commandsPerRequest(result);
      context.say(
        `    ${Object.entries(commands)
          .map(([command, calls]) => `${command} ${calls}`)
          .join(', ')}`,
      );
      return { ...throughput(result), ...commands };
    },
  },
  {
    id: 'c',
    letter: 'c',
    title: 'open loop, 50 answers/s of 100 tokens paced at 20 ms',
    metrics: LATENCY,
    run: async (name, context) => paced(await load(name, {}, openLoop(50, 20_000), context)),
  },
  {
    id: 'held',
    letter: 'c',
    title: `most answers/s of 100 tokens paced at 20 ms with first-token p99 under ${HELD_P99_MS} ms`,
    metrics: [
      { key: 'heldAnswers', title: 'answers/s held', better: 'more' },
      { key: 'heldTokens', title: 'tokens/s held', better: 'more' },
      { key: 'firstTokenP99', title: 'first token p99 ms', better: 'less', digits: 1 },
      { key: 'clientCores', title: 'client cores', digits: 2 },
    ],
    run: searchHeld,
  },
  {
    id: 'c-70',
    letter: 'c',
    title: "the same at 70 % of each system's own maximum (run `held` first)",
    metrics: [{ key: 'rate', title: 'answers/s' }, ...LATENCY],
    run: async (name, context) => {
      const held = [...(context.held.get(name) ?? [])].sort((a, b) => a - b);
      const rate = Math.max(1, Math.round(0.7 * (held[held.length >> 1] ?? 50)));
      return { rate, ...paced(await load(name, { concurrency: 10_000 }, openLoop(rate, 8_000), context)) };
    },
  },
  ...[10_000, 50_000].map(
    (sockets): Workload => ({
      id: `d-${sockets / 1_000}k`,
      letter: 'd',
      title: `${sockets.toLocaleString('en')} idle sockets, a user bound to each`,
      metrics: [
        { key: 'bytesPerSocket', title: 'gateway bytes/socket', better: 'less' },
        { key: 'acceptSeconds', title: 'accept s', better: 'less', digits: 1 },
        { key: 'acceptsPerSecond', title: 'accepts/s', better: 'more' },
        { key: 'gateways', title: 'gateways' },
      ],
      systems: ['rivulet', 'control', 'bullmq-socketio', 'bullmq-pubsub'],
      run: (name, context) => idle(name, sockets, context),
    }),
  ),
  {
    id: 'e',
    letter: 'e',
    title: '1,000 streaming sockets on 2 gateways, one is killed; clients resume on the other',
    metrics: [
      { key: 'lostSockets', title: 'sockets lost' },
      { key: 'lastMs', title: 'last caught up ms', better: 'less' },
      { key: 'p50Ms', title: 'p50 ms', better: 'less' },
      { key: 'wrong', title: 'wrong answers', better: 'less' },
      { key: 'unfinished', title: 'answers never finished', better: 'less' },
    ],
    systems: ['rivulet', 'bullmq-pubsub'],
    run: (name, context) => recover(name, 2_000, context),
  },
  {
    id: 'f',
    letter: 'f',
    title: 'cost and latency at 250 answers/s of 100 tokens paced at 20 ms (the list: 10 answers/s)',
    metrics: [
      { key: 'gatewayCpu', title: 'gateway CPU s/M tokens', better: 'less', digits: 2 },
      { key: 'workerCpu', title: 'worker', better: 'less', digits: 2 },
      { key: 'redisCpu', title: 'Redis', better: 'less', digits: 2 },
      { key: 'commandsPerToken', title: 'Redis commands/token', better: 'less', digits: 2 },
      { key: 'bytesPerToken', title: 'Redis bytes/token', better: 'less' },
      { key: 'firstTokenP50', title: 'first token p50 ms', better: 'less', digits: 2 },
      { key: 'firstTokenP99', title: 'p99 ms', better: 'less', digits: 2 },
      { key: 'interTokenP99', title: 'inter-token added p99 ms', better: 'less', digits: 2 },
    ],
    run: async (name, context) =>
      paced(await load(name, {}, openLoop(name === 'locked-list' ? 10 : 250, 8_000), context)),
  },
  {
    id: 'f-memory',
    letter: 'f',
    title: 'Redis memory of one generation beyond its text (100 tokens)',
    metrics: [
      { key: 'liveBytes', title: 'live bytes', better: 'less' },
      { key: 'finishedBytes', title: 'finished bytes', better: 'less' },
    ],
    systems: ['rivulet'],
    run: redisMemory,
  },
  ...[1, 2, 4, 16].flatMap((gateways): Workload[] => [
    {
      id: `g-a-${gateways}`,
      letter: 'g',
      title: `as a, over ${gateways} gateways with a stream each`,
      metrics: TOKENS,
      systems: SCALED,
      run: async (name, context) =>
        throughput(await load(name, { gateways }, { warmUpMs: eachWarm(gateways) }, context)),
    },
    {
      id: `g-b-${gateways}`,
      letter: 'g',
      title: `as b, over ${gateways} gateways with a stream each`,
      metrics: ANSWERS,
      systems: SCALED,
      run: async (name, context) =>
        throughput(
          await load(
            name,
            { gateways },
            { sockets: 1_000, tokens: 1, warmUpMs: eachWarm(gateways) },
            context,
          ),
        ),
    },
  ]),
  ...(
    [
      [10, 20],
      [1_000, 20],
      [1_000, 40],
      [1_000, 500],
      [10_000, 500],
    ] as const
  ).map(
    ([answers, intervalMs]): Workload => ({
      id: `g-${answers}-${intervalMs}`,
      letter: 'g',
      title: `${answers.toLocaleString('en')} concurrent answers paced at ${intervalMs} ms`,
      metrics: SCALE,
      systems: SCALED,
      run: (name, context) => concurrent(name, answers, intervalMs, context),
    }),
  ),
];
