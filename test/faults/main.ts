import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { parseArgs } from 'node:util';
import { CLASSES, runClasses } from './run.ts';
import { formatTable, isClean, percentile } from './tally.ts';

const HELP = `Usage: npm run faults [-- options]

Runs a real stack (Redis with AOF, gateways, workers) under a crowd that streams and checks every frame, through
each fault class, and prints what was lost. Exits 1 on any loss.

  --class a,b       only these: ${CLASSES.map((one) => one.name).join(' ')}
  --users N         users who stream at once (100; 24 with --short)
  --seconds N       how long faults are injected, each class (20; 4 with --short)
  --seed N          of everything that is random here (1)
  --short           small numbers
  --json PATH       writes the table as JSON (.rivulet/faults.json)
  --soak            one long run with mixed faults that samples memory
  --minutes N       of the soak (30)`;

const { values } = parseArgs({
  options: {
    class: { type: 'string' },
    users: { type: 'string' },
    seconds: { type: 'string' },
    seed: { type: 'string', default: '1' },
    short: { type: 'boolean', default: false },
    json: { type: 'string', default: '.rivulet/faults.json' },
    soak: { type: 'boolean', default: false },
    minutes: { type: 'string', default: '30' },
    help: { type: 'boolean', short: 'h', default: false },
  },
});

function number(name: string, text: string): number {
  const value = Number(text);
  if (!Number.isFinite(value) || value <= 0) {
    process.stderr.write(`--${name} must be a number above 0\n`);
    process.exit(2);
  }
  return value;
}

if (values.help) {
  process.stdout.write(`${HELP}\n`);
} else {
  const say = (text: string) => process.stdout.write(`${text}\n`);
  const seed = number('seed', values.seed);
  const users = number('users', values.users ?? (values.short ? '24' : '100'));
  if (values.soak) {
    const { soak } = await import('./soak.ts');
    process.exitCode = await soak({
      minutes: number('minutes', values.minutes),
      users,
      seed,
      json: values.json,
      say,
    });
  } else {
    const names = values.class?.split(',') ?? CLASSES.map((one) => one.name);
    const unknown = names.filter((name) => !CLASSES.some((one) => one.name === name));
    if (unknown.length > 0) {
      process.stderr.write(`--class: there is no ${unknown.join(', ')}\n\n${HELP}\n`);
      process.exit(2);
    }
    const seconds = number('seconds', values.seconds ?? (values.short ? '4' : '20'));
    const rows = await runClasses({ names, users, seconds, seed, short: values.short, say });
    say('');
    say(formatTable(rows));
    mkdirSync(dirname(values.json), { recursive: true });
    writeFileSync(
      values.json,
      `${JSON.stringify(
        {
          when: new Date().toISOString(),
          users,
          seconds,
          seed,
          classes: rows.map(({ class: name, seconds: took, tally }) => {
            const { recoveries, ...rest } = tally;
            return {
              class: name,
              tookSeconds: Math.round(took),
              ...rest,
              disturbed: recoveries.length,
              recoveryMs: { p50: percentile(recoveries, 0.5), p99: percentile(recoveries, 0.99) },
            };
          }),
        },
        null,
        2,
      )}\n`,
    );
    say(`\nWritten to ${values.json}.`);
    process.exitCode = rows.every(({ tally }) => isClean(tally)) ? 0 : 1;
  }
}
