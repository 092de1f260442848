import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { endWithThisProcess } from '../../infra/child-guard.ts';
import { WORKER_FLAGS } from '../../infra/worker-pool.ts';

/** Processes of the bench: start, wait for the port, read their CPU time and memory from /proc, end. */

export const ROOT = fileURLToPath(new URL('../../', import.meta.url));

export interface BenchProcess {
  readonly pid: number;
  /** From its first line `{"ready":true,"port":N}`; 0 for a process that does not speak. */
  readonly port: number;
  /** Settles with how it ended and its last words, whoever ended it. */
  readonly ended: Promise<string>;
  kill(): Promise<void>;
  stop(): Promise<void>;
}

export interface StartOptions {
  env: Record<string, string>;
  /** Wait for the ready line. */
  speaks: boolean;
  /** Writes a CPU profile there when it ends. */
  profileDir?: string | undefined;
  name: string;
}

const READY_MS = 20_000;
const STOP_MS = 8_000;

export async function startProcess(script: string, options: StartOptions): Promise<BenchProcess> {
  const profile = options.profileDir
    ? ['--cpu-prof', '--cpu-prof-dir', `${options.profileDir}/${options.name}`] // one file a thread; the largest is ours
    : [];
  const flags = options.name.includes('worker') ? WORKER_FLAGS : []; // of every system
  const child = spawn(
    process.execPath,
    [...profile, ...flags, '--import', './infra/typescript.mjs', script],
    {
      cwd: ROOT,
      env: { PATH: process.env.PATH, HOME: process.env.HOME, NODE_ENV: 'production', ...options.env },
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true, // Ctrl-C is ours to pass on
    },
  );
  const letGo = child.pid ? endWithThisProcess(child.pid) : () => {};
  let words = '';
  const ended = new Promise<string>((resolve) => {
    child.once('close', (code, signal) => {
      letGo();
      resolve(`${script} ended with ${signal ?? `code ${code}`}:\n${words}`);
    });
    child.once('error', (error) => resolve(`${script}: ${error.message}`));
  });
  const keep = (text: string) => {
    words = `${words}${text}\n`.slice(-4_000);
  };
  createInterface({ input: child.stderr! }).on('line', keep);
  const port = await new Promise<number>((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`${script} did not start:\n${words}`)), READY_MS);
    createInterface({ input: child.stdout! }).on('line', (line) => {
      keep(line);
      if (!line.startsWith('{"ready"')) return;
      clearTimeout(timer);
      resolve((JSON.parse(line) as { port: number }).port);
    });
    if (!options.speaks) {
      clearTimeout(timer);
      resolve(0);
    }
    void ended.then((how) => {
      clearTimeout(timer);
      reject(new Error(how));
    });
  }).catch(async (error) => {
    await end(child, ended, 'SIGKILL');
    throw error;
  });
  return {
    pid: child.pid!,
    port,
    ended,
    kill: () => end(child, ended, 'SIGKILL'),
    async stop() {
      const timer = setTimeout(() => child.kill('SIGKILL'), STOP_MS);
      await end(child, ended, 'SIGTERM');
      clearTimeout(timer);
    },
  };
}

async function end(child: ChildProcess, ended: Promise<unknown>, signal: NodeJS.Signals): Promise<void> {
  child.kill(signal);
  await ended;
}

/** Seconds of CPU that a process has used (all its threads), or 0 when it is gone. */
export function readCpuSeconds(pid: number): number {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
    return (Number(fields[11]) + Number(fields[12])) / 100; // USER_HZ is 100 on Linux
  } catch {
    return 0;
  }
}

export function readRssBytes(pid: number): number {
  try {
    return Number(/VmRSS:\s+(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))![1]) * 1024;
  } catch {
    return 0;
  }
}

/** CPU seconds that the whole machine has used, all cores together. */
export function readMachineCpuSeconds(): number {
  try {
    const [user, nice, system, , , irq, softirq] = readFileSync('/proc/stat', 'utf8')
      .split('\n')[0]!
      .trim()
      .split(/\s+/)
      .slice(1)
      .map(Number) as number[];
    return (user! + nice! + system! + irq! + softirq!) / 100;
  } catch {
    return 0;
  }
}
