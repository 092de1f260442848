import { writeFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { GROUP } from '../../shared/request-queue.ts';
import type { StackProcess } from '../helpers/stack.ts';
import { Crowd } from './crowd.ts';
import { createRandom } from './run.ts';
import { demoQuestions, QUICK, residentBytes, startStage } from './stage.ts';
import { createTally, isClean, percentile } from './tally.ts';

/**
 * A long run at moderate load with mixed faults, to see whether memory stays flat. The first gateway and the first
 * worker are never killed (only frozen, dropped and cut off), so that their memory has a history; the second ones are.
 */

const SAMPLE_MS = 10_000;
const FAULT_MS = 20_000;

interface Sample {
  atS: number;
  gatewayMb: number;
  workerMb: number;
  redisMb: number;
  redisKeys: number;
}

export async function soak(options: {
  minutes: number;
  users: number;
  seed: number;
  json: string;
  say: (text: string) => void;
}): Promise<number> {
  const { say } = options;
  const random = createRandom(options.seed);
  const tally = createTally();
  // Short retention: what is finished must leave within the run.
  const stage = await startStage({
    ...QUICK,
    env: { ...QUICK.env!, RETENTION_MS: '60000' },
    workerEnv: { ...QUICK.workerEnv!, COMPACT_AFTER_MS: '10000' },
  });
  const [gateway] = stage.gateways();
  const [worker] = stage.workers();
  const samples: Sample[] = [];
  const crowd = new Crowd(options.users, { urls: stage.urls, tally, random });
  crowd.remember = false;
  const { look, keys } = stage.stack;
  const began = Date.now();
  const end = began + options.minutes * 60_000;

  const second = <T extends StackProcess>(list: T[], first: T | undefined) =>
    list.find((one) => one !== first);
  const faults: [string, () => Promise<unknown>][] = [
    [
      'worker killed',
      async () => {
        await second(stage.workers(), worker)?.kill('SIGKILL');
        await stage.addWorker();
      },
    ],
    [
      'worker frozen',
      async () => {
        await worker!.kill('SIGSTOP');
        await delay(2_500);
        await worker!.kill('SIGCONT');
      },
    ],
    [
      'gateway killed',
      async () => {
        const victim = second(stage.gateways(), gateway);
        await victim?.kill('SIGKILL');
        if (victim) await stage.restartGateway(victim);
      },
    ],
    [
      'clients dropped',
      async () => {
        for (const client of crowd.clients) if (random() < 0.5) client.vanish();
      },
    ],
    [
      'redis killed',
      async () => {
        await stage.stack.redis.kill('SIGKILL');
        await stage.stack.redis.restart();
      },
    ],
    [
      'redis frozen',
      async () => {
        await stage.stack.redis.kill('SIGSTOP');
        await delay(5_000);
        await stage.stack.redis.kill('SIGCONT');
      },
    ],
    ['replies trimmed', () => look.client.xtrim(keys.replies('n1'), 'MAXLEN', 0)],
    ['group destroyed', () => look.client.xgroup('DESTROY', keys.requests('n1'), GROUP)],
  ];

  try {
    const next = await demoQuestions(random, 500, 3_000);
    crowd.stream(() => next());
    await crowd.flowing();
    let faultAt = Date.now() + FAULT_MS;
    let sampleAt = Date.now();
    while (Date.now() < end) {
      if (Date.now() >= sampleAt) {
        sampleAt += SAMPLE_MS;
        const sample = await takeSample();
        if (sample) {
          samples.push(sample);
          if (samples.length % 6 === 1)
            say(
              `${(sample.atS / 60).toFixed(1)} min: gateway ${sample.gatewayMb.toFixed(0)} MB, worker ${sample.workerMb.toFixed(0)} MB, Redis ${sample.redisMb.toFixed(1)} MB in ${sample.redisKeys} keys, ${tally.generations} generations, ${tally.faults} faults`,
            );
        }
      }
      if (Date.now() >= faultAt) {
        faultAt = Date.now() + FAULT_MS * (0.5 + random());
        const [name, inject] = faults[tally.faults++ % faults.length]!;
        await inject().catch((error: Error) => say(`${name} could not be injected: ${error.message}`));
      }
      await delay(200);
    }
    await crowd.settle(60_000);
    // What is finished leaves: after the retention, the keys that remain belong to nodes, not to answers.
    await delay(75_000);
    const last = await takeSample();
    if (last) samples.push(last);
  } finally {
    await crowd.stop();
    await stage.stop();
  }

  async function takeSample(): Promise<Sample | null> {
    try {
      const info = await look.client.info('memory');
      return {
        atS: Math.round((Date.now() - began) / 1000),
        gatewayMb: (await residentBytes(gateway!.pid)) / 1e6,
        workerMb: (await residentBytes(worker!.pid)) / 1e6,
        redisMb: Number(/used_memory:(\d+)/.exec(info)![1]) / 1e6,
        redisKeys: await look.client.dbsize(),
      };
    } catch {
      return null; // Redis is away just now
    }
  }

  // The first fifth is warm-up: heaps and caches grow to their working size.
  const steady = samples.slice(Math.floor(samples.length / 5), -1);
  const summary = Object.fromEntries(
    (['gatewayMb', 'workerMb', 'redisMb', 'redisKeys'] as const).map((field) => [
      field,
      {
        start: round(steady[0]?.[field]),
        end: round(steady.at(-1)?.[field]),
        slopePerHour: round(slope(steady.map((one) => [one.atS / 3600, one[field]]))),
        afterRetention: round(samples.at(-1)?.[field]),
      },
    ]),
  );
  say('');
  for (const [field, facts] of Object.entries(summary))
    say(
      `${field.padEnd(10)} start ${facts.start}, end ${facts.end}, slope ${facts.slopePerHour} an hour; idle after retention ${facts.afterRetention}`,
    );
  const { recoveries, ...rest } = tally;
  say(
    `${tally.generations} generations, ${tally.faults} faults, lost ${tally.lost}, doubled ${tally.doubled}, gaps ${tally.gaps}, wrong ${tally.wrong}, never ended ${tally.neverEnded}, errors ${tally.errors}; recovery p50 ${percentile(recoveries, 0.5)} ms, p99 ${percentile(recoveries, 0.99)} ms`,
  );
  for (const problem of tally.problems) say(`  ! ${problem}`);
  writeFileSync(
    `${options.json.replace(/\.json$/, '')}-soak.json`,
    `${JSON.stringify({ minutes: options.minutes, users: options.users, seed: options.seed, summary, tally: rest, samples }, null, 1)}\n`,
  );
  return isClean(tally) ? 0 : 1;
}

const round = (value: number | undefined) => (value === undefined ? 0 : Math.round(value * 10) / 10);

/** Least squares. */
function slope(points: [x: number, y: number][]): number {
  const mean = (index: 0 | 1) =>
    points.reduce((sum, point) => sum + point[index], 0) / Math.max(1, points.length);
  const [mx, my] = [mean(0), mean(1)];
  const above = points.reduce((sum, [x, y]) => sum + (x - mx) * (y - my), 0);
  const below = points.reduce((sum, [x]) => sum + (x - mx) ** 2, 0);
  return below === 0 ? 0 : above / below;
}
