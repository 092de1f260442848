import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { reportFailure, UsageError } from '../../infra/command.ts';
import { describeMachine, installPeers } from './environment.ts';
import { drawSvg, formatTable, summarize, type WorkloadResult } from './report.ts';
import { RIVULET_SETTINGS, SYSTEMS, type SystemName } from './systems.ts';
import { formatTargets } from './targets.ts';
import { type Context, WORKLOADS, type Workload } from './workloads.ts';

/**
 * `npm run bench`: Rivulet, the bare parts, and what people would use instead, on one machine, in turns. Prints a
 * table for each workload; writes JSON and a plot where it is told to.
 */

const HELP = `Usage: npm run bench [-- options]

  --short              about a minute: Rivulet and the control only, short runs of a, b and c
  --workload a,b,…     letters (a–g) or names; all by default
  --systems a,b,…      ${Object.keys(SYSTEMS).join(', ')}
  --rounds N           rounds of each workload (5; all of it takes about 40 minutes a round)
  --json PATH          writes every number there (.rivulet/bench.json)
  --svg PATH           writes the plot there (.rivulet/bench.svg)
  --profile DIR        writes CPU profiles of gateways and workers there
  --scale X            shrinks measured windows, for tests of the bench itself (1)
  --list               names the workloads`;

const SHORT_WORKLOADS = ['a', 'b', 'c'];

async function main(args: string[]): Promise<number> {
  const { values } = parseArgs({
    args,
    options: {
      short: { type: 'boolean', default: false },
      workload: { type: 'string' },
      systems: { type: 'string' },
      rounds: { type: 'string' },
      json: { type: 'string' },
      svg: { type: 'string' },
      profile: { type: 'string' },
      scale: { type: 'string' },
      list: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  if (values.help) {
    console.log(HELP);
    return 0;
  }
  if (values.list) {
    for (const { letter, id, title } of WORKLOADS) console.log(`(${letter}) ${id.padEnd(12)} ${title}`);
    return 0;
  }
  const rounds = positive('--rounds', values.rounds ?? (values.short ? '1' : '5'));
  const scale = positive('--scale', values.scale ?? (values.short ? '0.4' : '1'));
  const workloads = chooseWorkloads(values.workload?.split(',') ?? (values.short ? SHORT_WORKLOADS : null));
  const systems = chooseSystems(values.systems?.split(',') ?? (values.short ? ['rivulet', 'control'] : null));
  const say = (text: string) => process.stderr.write(`${text}\n`);
  if (systems.some((name) => SYSTEMS[name].peer)) installPeers(say);
  const profileDir = values.profile ? resolve(values.profile) : undefined;

  const startedAt = new Date().toISOString();
  const context: Context = { scale, profileDir, held: new Map(), say };
  const results: WorkloadResult[] = [];
  const machine = describeMachine();
  const save = () => {
    writeFile(
      values.json ?? '.rivulet/bench.json',
      `${JSON.stringify(toJson(results, { startedAt, machine, rounds, scale }), null, 1)}\n`,
    );
    writeFile(
      values.svg ?? '.rivulet/bench.svg',
      drawSvg(
        results,
        `${startedAt.slice(0, 10)}, commit ${machine.commit}, ${machine.cores} × ${machine.cpu}, Node ${machine.node}, everything on one machine, Redis AOF everysec; medians, lines from least to most`,
      ),
    );
  };
  for (const workload of workloads) {
    const result = await runWorkload(workload, systems, rounds, context);
    results.push(result);
    console.log(`\n${formatTable(result)}`);
    save(); // after each, so that a broken-off run keeps what it has
  }
  const targets = formatTargets(results);
  if (targets && !values.short) console.log(`\n${targets}`);
  const broken = results.some(({ failures }) => failures.has('rivulet') || failures.has('control'));
  return broken ? 1 : 0;
}

/** All systems once, then all again: what drifts on the machine hits every one alike. */
async function runWorkload(
  workload: Workload,
  systems: SystemName[],
  rounds: number,
  context: Context,
): Promise<WorkloadResult> {
  const names = systems.filter((name) => !workload.systems || workload.systems.includes(name));
  const result: WorkloadResult = {
    workload,
    rounds: new Map(names.map((name) => [name, []])),
    failures: new Map(),
  };
  for (let round = 1; round <= rounds; round++) {
    for (const name of names) {
      context.say(`${workload.id} ${round}/${rounds} ${name}`);
      try {
        result.rounds.get(name)!.push(await workload.run(name, context));
      } catch (error) {
        const { message } = error as Error;
        context.say(`  ! ${message}`);
        result.failures.set(name, [...(result.failures.get(name) ?? []), `round ${round}: ${message}`]);
      }
    }
  }
  return result;
}

function toJson(
  results: WorkloadResult[],
  run: { startedAt: string; machine: object; rounds: number; scale: number },
) {
  return {
    ...run,
    settings: {
      redis: 'appendonly yes, appendfsync everysec, no snapshots, a fresh server for each run',
      rivulet: RIVULET_SETTINGS,
      merging:
        'tokens of one answer in one event-loop turn, or while its last frame is on its way (at most 20 ms)',
    },
    workloads: results.map(({ workload, rounds, failures }) => ({
      id: workload.id,
      title: workload.title,
      systems: Object.fromEntries(
        [...rounds].map(([name, list]) => [
          name,
          {
            summary: Object.fromEntries(
              [...new Set(list.flatMap((numbers) => Object.keys(numbers)))].map((key) => [
                key,
                summarize(list, key),
              ]),
            ),
            rounds: list,
            failures: failures.get(name) ?? [],
          },
        ]),
      ),
    })),
  };
}

function chooseWorkloads(wanted: string[] | null): Workload[] {
  if (!wanted) return WORKLOADS;
  const unknown = wanted.find((name) => !WORKLOADS.some(({ id, letter }) => id === name || letter === name));
  if (unknown) throw new UsageError(`there is no workload ${unknown}; see --list`);
  return WORKLOADS.filter(
    ({ id, letter }) =>
      wanted.includes(id) ||
      // A letter means all of them, unless a workload has just that name and the run is a short choice.
      (wanted.includes(letter) && !WORKLOADS.some((other) => other.id === letter)),
  );
}

function chooseSystems(wanted: string[] | null): SystemName[] {
  const all = Object.keys(SYSTEMS) as SystemName[];
  if (!wanted) return all;
  const unknown = wanted.find((name) => !all.includes(name as SystemName));
  if (unknown) throw new UsageError(`there is no system ${unknown}; they are ${all.join(', ')}`);
  return all.filter((name) => wanted.includes(name));
}

function positive(name: string, text: string): number {
  const value = Number(text);
  if (value > 0) return value;
  throw new UsageError(`${name} must be a number above 0`);
}

function writeFile(path: string, text: string): void {
  mkdirSync(dirname(resolve(path)), { recursive: true });
  writeFileSync(path, text);
}

main(process.argv.slice(2)).then(
  (code) => process.exit(code),
  (error: Error) => process.exit(reportFailure(error, HELP)),
);
