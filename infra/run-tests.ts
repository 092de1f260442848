import { type ChildProcess, spawn } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { Readable } from 'node:stream';
import { run } from 'node:test';
import { spec } from 'node:test/reporters';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

/**
 * What `npm test` runs: type-check and lint, then every `test/**\/*.test.ts` through node:test, each file in a
 * process of its own. `npm test -- unit` runs a folder, `npm test -- test/unit/keys.test.ts` or any part of a path
 * runs what matches, `types` and `lint` are parts too. The last lines are the runner's own counts.
 */

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));
const FILE_TIMEOUT_S = '240'; // the slowest file, on two busy cores, with room
const FOLDERS = ['unit', 'contract', 'scenarios', 'browser']; // quick ones first; others follow by name

const HELP = `Usage: npm test [-- [part…] [options]]

Without a part: type-check, lint and all tests. A part is types, lint, a folder of test/ (unit, contract,
scenarios, browser), a file, or any piece of a path.

  --name REGEXP     only tests whose name matches
  --concurrency N   test files at the same time (2)
  --timeout S       seconds that one file may take (${FILE_TIMEOUT_S})`;

interface Outcome {
  name: string;
  ok: boolean;
  text: string;
}

function listTests(): string[] {
  const order = (path: string) => {
    const index = FOLDERS.indexOf(path.split('/')[1]!);
    return index < 0 ? FOLDERS.length : index;
  };
  return readdirSync(join(ROOT, 'test'), { recursive: true, encoding: 'utf8' })
    .map((path) => `test/${path.replaceAll('\\', '/')}`)
    .filter((path) => path.endsWith('.test.ts') && !path.includes('node_modules'))
    .sort((a, b) => order(a) - order(b) || (a < b ? -1 : 1));
}

/** The files that a part names: a folder of test/, a path, or a piece of one. */
function matchTests(all: string[], part: string): string[] {
  const path = relative(ROOT, join(process.cwd(), part));
  for (const folder of [`test/${part}/`, `${path}/`]) {
    const inside = all.filter((file) => file.startsWith(folder));
    if (inside.length) return inside;
  }
  return all.includes(path) ? [path] : all.filter((file) => file.includes(part));
}

const children = new Set<ChildProcess>();

/** Runs a checker with its output kept back: it is only of interest when it fails. */
function check(name: string, program: string, args: string[]): Promise<Outcome> {
  const startedAt = Date.now();
  return new Promise((resolve) => {
    const child = spawn(join(ROOT, 'node_modules', '.bin', program), args, { cwd: ROOT });
    children.add(child);
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.on('data', (chunk) => {
        output += chunk;
      });
    }
    const end = (ok: boolean) => {
      children.delete(child);
      const text = `${name} ${ok ? 'ok' : 'FAILED'} (${((Date.now() - startedAt) / 1000).toFixed(1)} s)`;
      process.stdout.write(ok ? `${text}\n` : `${output.trimEnd()}\n${text}\n`);
      resolve({ name, ok, text });
    };
    child.on('error', (error) => {
      output += error.message;
      end(false);
    });
    child.on('close', (code) => end(code === 0));
  });
}

const COUNTS = ['tests', 'suites', 'pass', 'fail', 'cancelled', 'skipped', 'todo', 'duration_ms'];

/** Runs the files with the spec reporter; the counts are kept back, so that they can come last. */
async function runFiles(
  files: string[],
  options: { concurrency: number; timeoutMs: number; name: string | undefined; signal: AbortSignal },
): Promise<Map<string, string>> {
  const counts = new Map<string, string>();
  const events = run({
    files: files.map((file) => join(ROOT, file)),
    concurrency: options.concurrency,
    timeout: options.timeoutMs,
    signal: options.signal,
    ...(options.name ? { testNamePatterns: [new RegExp(options.name)] } : {}),
  });
  async function* withoutCounts() {
    for await (const event of events) {
      const [, key, value] = /^(\w+) ([\d.]+)$/.exec(
        event.type === 'test:diagnostic' && event.data.nesting === 0 ? event.data.message : '',
      ) ?? [undefined, '', ''];
      if (COUNTS.includes(key!)) counts.set(key!, value!);
      else yield event;
    }
  }
  for await (const text of Readable.from(withoutCounts()).compose(new spec())) process.stdout.write(text);
  return counts;
}

async function main(args: string[]): Promise<number> {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      name: { type: 'string' },
      concurrency: { type: 'string', default: '2' },
      timeout: { type: 'string', default: FILE_TIMEOUT_S },
      help: { type: 'boolean', short: 'h' },
    },
  });
  if (values.help) {
    console.log(HELP);
    return 0;
  }
  const concurrency = wholeNumber('--concurrency', values.concurrency);
  const timeoutMs = wholeNumber('--timeout', values.timeout) * 1000;

  const all = listTests();
  const whole = positionals.length === 0;
  const wanted = new Set<string>(whole ? all : []);
  for (const part of positionals.filter((part) => part !== 'types' && part !== 'lint')) {
    const matched = matchTests(all, part);
    if (matched.length === 0)
      throw new Error(
        `No test file matches "${part}". Folders: ${[...new Set(all.map((file) => file.split('/')[1]))].join(', ')}.`,
      );
    for (const file of matched) wanted.add(file);
  }
  const files = all.filter((file) => wanted.has(file));

  const interrupted = new AbortController();
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(signal, () => {
      interrupted.abort();
      for (const child of children) child.kill(signal);
    });
  }

  const checks: Promise<Outcome>[] = [];
  if (whole || positionals.includes('types')) checks.push(check('type-check', 'tsc', ['--noEmit']));
  if (whole || positionals.includes('lint'))
    checks.push(check('lint', 'biome', ['check', '--error-on-warnings', '--colors=off', '.']));
  const outcomes = await Promise.all(checks);
  if (interrupted.signal.aborted) return 130;

  const counts = files.length
    ? await runFiles(files, { concurrency, timeoutMs, name: values.name, signal: interrupted.signal })
    : new Map<string, string>();
  const bad = Number(counts.get('fail') ?? 0) + Number(counts.get('cancelled') ?? 0);
  if (files.length)
    outcomes.push({
      name: 'tests',
      ok: counts.has('pass') && bad === 0,
      text: `${counts.get('pass') ?? 0} of ${counts.get('tests') ?? 0} tests passed in ${files.length} files`,
    });
  const ok = outcomes.every((outcome) => outcome.ok) && !interrupted.signal.aborted;
  const summary = [
    '',
    `${ok ? 'PASSED' : interrupted.signal.aborted ? 'INTERRUPTED' : 'FAILED'}: ${outcomes.map(({ text }) => text).join(', ')}`,
    ...(whole ? [] : ['(a part only; npm test runs everything)']),
    ...COUNTS.filter((key) => counts.has(key)).map((key) => `# ${key} ${counts.get(key)}`),
  ];
  process.stdout.write(`${summary.join('\n')}\n`);
  return ok ? 0 : interrupted.signal.aborted ? 130 : 1;
}

function wholeNumber(name: string, text: string): number {
  const value = Number(text);
  if (Number.isInteger(value) && value > 0) return value;
  throw new Error(`${name} must be a whole number above 0`);
}

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code;
  },
  (error: Error) => {
    process.stderr.write(`${error.message}\n`);
    process.exitCode = 1;
  },
);
