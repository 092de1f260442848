import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createWriteStream, existsSync, renameSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as delay } from 'node:timers/promises';
import { within } from '../shared/lifecycle.ts';
import { endWithThisProcess } from './child-guard.ts';

/**
 * One child process of `npm start`, kept alive: its output goes to a file, its warnings to the terminal as one
 * line each. States: starting (until its `ready` line), up, waiting to start again after it died, stopped.
 * It lives in a process group of its own, so that Ctrl-C reaches it only through `stop`, in our order.
 */
export interface Supervised {
  readonly name: string;
  readonly pid: number | undefined;
  /** Settles with the fields of the first ready line; rejects when the first start fails. */
  readonly ready: Promise<Record<string, unknown>>;
  /**
   * SIGTERM, and SIGKILL for one that does not leave in time. Waits so long too for what earlier runs started and left
   * behind, as far as it has their output: workers that drain after their autoscaler was killed still need Redis. Idempotent.
   */
  stop(): Promise<void>;
  /** SIGKILL now, for good. */
  kill(): void;
}

export interface SupervisedOptions {
  name: string;
  script: string;
  cwd: string;
  env: NodeJS.ProcessEnv;
  logPath: string;
  /** The `msg` of the log line that says that it is up. */
  readyMessage: string;
  stopTimeoutMs: number;
  say: (line: string) => void;
  /** Called at every ready line, also after a restart. */
  onReady?: (fields: Record<string, unknown>) => void;
}

const START_TIMEOUT_MS = 30_000; // a cold start through tsx on a loaded laptop takes 5 s
const FIRST_PAUSE_MS = 1_000; // long enough to see that others take over
const LONGEST_PAUSE_MS = 10_000;
const STEADY_MS = 30_000; // up for this long = the next death is a new story
const LAST_WORDS_MS = 500; // for what it wrote before its end to be read
const REPEAT_MS = 10_000; // the same warning again only after this
const LOUD = new Set(['warn', 'error', 'fatal']);

export function supervise(options: SupervisedOptions): Supervised {
  const { name, say } = options;
  if (existsSync(options.logPath)) renameSync(options.logPath, `${options.logPath}.1`); // the run before stays
  const log = createWriteStream(options.logPath);
  log.on('error', (error) => say(`${name}: its log cannot be written: ${error.message}`));
  const stopping = new AbortController();
  const said = new Map<string, number>();
  /** Outputs of runs, as long as somebody holds them. */
  const outputs = new Set<Promise<unknown>>();
  let child: ChildProcess | null = null;
  let settleFirst: { resolve: (fields: Record<string, unknown>) => void; reject: (error: Error) => void };
  const ready = new Promise<Record<string, unknown>>((resolve, reject) => {
    settleFirst = { resolve, reject };
  });
  ready.catch(() => {}); // whoever waits for it handles it; nobody may be waiting yet

  /** Runs it once, to its end. */
  async function runOnce(): Promise<{ wasReady: boolean; reason: string }> {
    const current = spawn(process.execPath, ['--import', './infra/typescript.mjs', options.script], {
      cwd: options.cwd,
      env: options.env,
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
    });
    child = current;
    const letGo = current.pid ? endWithThisProcess(current.pid, options.stopTimeoutMs) : () => {};
    let wasReady = false;
    let lastLine = '';
    const timer = setTimeout(() => {
      lastLine = `no "${options.readyMessage}" line within ${START_TIMEOUT_MS / 1000} s`;
      current.kill('SIGKILL');
    }, START_TIMEOUT_MS);
    createInterface({ input: current.stdout! }).on('line', (line) => {
      keep(line);
      const fields = parseLine(line);
      if (!fields) return;
      if (fields.msg === options.readyMessage && !wasReady) {
        wasReady = true;
        clearTimeout(timer);
        options.onReady?.(fields);
        settleFirst.resolve(fields);
      }
      if (wasReady && LOUD.has(String(fields.level))) warn(fields); // before, its end tells why
    });
    createInterface({ input: current.stderr! }).on('line', (line) => {
      keep(line);
      if (line.trim() && !/^\s+at |^Node\.js v/.test(line)) lastLine = line;
    });
    const closed = once(current, 'close')
      .catch(() => {})
      .finally(() => outputs.delete(closed));
    outputs.add(closed);
    const outcome = await new Promise<string>((resolve) => {
      current.once('error', (error) => resolve(error.message));
      current.once('exit', (code, signal) => resolve(signal ?? `code ${code}`));
    });
    await within(LAST_WORDS_MS, closed); // its own children may hold its output open for long
    clearTimeout(timer);
    letGo();
    return { wasReady, reason: lastLine ? `${outcome}: ${lastLine}` : outcome };
  }

  function keep(line: string) {
    if (!log.writableEnded) log.write(`${line}\n`);
  }

  function warn(fields: Record<string, unknown>) {
    if (stopping.signal.aborted) return; // sockets that break while we stop are no news
    const text = String(fields.msg);
    const now = performance.now();
    if (now - (said.get(text) ?? -REPEAT_MS) < REPEAT_MS) return;
    if (said.size > 100) said.clear();
    said.set(text, now);
    const err = fields.err as { message?: string } | string | undefined;
    const cause = typeof err === 'string' ? err : err?.message;
    say(`${name} ${fields.level}: ${text}${cause && !text.includes(cause) ? `: ${cause}` : ''}`);
  }

  async function keepAlive() {
    let pauseMs = FIRST_PAUSE_MS;
    let first = true;
    while (!stopping.signal.aborted) {
      const startedAt = performance.now();
      const { wasReady, reason } = await runOnce();
      if (stopping.signal.aborted) break;
      if (first && !wasReady) {
        settleFirst.reject(new Error(`${name} did not start: ${reason}`));
        return;
      }
      if (wasReady && performance.now() - startedAt > STEADY_MS) pauseMs = FIRST_PAUSE_MS;
      first = false;
      say(
        `${name} ${wasReady ? 'ended' : 'did not start'} (${reason}); starting it again in ${pauseMs / 1000} s`,
      );
      await delay(pauseMs, undefined, { signal: stopping.signal }).catch(() => {});
      pauseMs = Math.min(pauseMs * 2, LONGEST_PAUSE_MS);
    }
  }
  const ended = keepAlive();
  const closed = ended.finally(() => Promise.all(outputs)).finally(() => log.end());

  return {
    name,
    get pid() {
      return child?.pid;
    },
    ready,
    async stop() {
      stopping.abort();
      child?.kill('SIGTERM');
      const deadlineMs = performance.now() + options.stopTimeoutMs;
      const timer = setTimeout(() => {
        say(`${name} did not leave within ${options.stopTimeoutMs / 1000} s; killing it`);
        child?.kill('SIGKILL');
      }, options.stopTimeoutMs);
      await ended;
      clearTimeout(timer);
      await within(Math.max(0, deadlineMs - performance.now()), closed);
    },
    kill() {
      stopping.abort();
      child?.kill('SIGKILL');
    },
  };
}

function parseLine(line: string): Record<string, unknown> | null {
  if (!line.startsWith('{')) return null;
  try {
    return JSON.parse(line);
  } catch {
    return null;
  }
}
