import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isProcessAlive, takeLock } from './process-lock.mjs';

export { isProcessAlive };

/** What `npm start` leaves in `.rivulet/run.json` while it runs, for the terminal tools to find it. */
export interface RunState {
  /** The process of `npm start` itself. */
  pid: number;
  startedAt: string;
  redisUrl: string;
  keyPrefix: string;
  gateways: { node: string; url: string }[];
}

/** The folder that holds everything a local run writes; `RIVULET_DIR` moves it. */
export function stateFolder(env: Record<string, string | undefined> = process.env): string {
  const root = dirname(dirname(fileURLToPath(import.meta.url)));
  return env.RIVULET_DIR ? resolve(env.RIVULET_DIR) : join(root, '.rivulet');
}

/** The running stack, or null when none runs from this folder. */
export function readRunState(folder = stateFolder()): RunState | null {
  let state: RunState;
  try {
    state = JSON.parse(readFileSync(join(folder, 'run.json'), 'utf8'));
  } catch {
    return null;
  }
  return isProcessAlive(state.pid) ? state : null;
}

export function writeRunState(folder: string, state: RunState): void {
  mkdirSync(folder, { recursive: true });
  removeRunState(folder); // one that a crash left keeps its mode
  // The address of Redis may hold a password.
  writeFileSync(join(folder, 'run.json'), `${JSON.stringify(state, null, 2)}\n`, { mode: 0o600 });
}

export function removeRunState(folder: string): void {
  rmSync(join(folder, 'run.json'), { force: true });
}

/** Takes the folder for this process, or tells whose it is: see `takeLock`. */
export function lockFolder(folder: string, isOurs: (pid: number) => boolean) {
  return takeLock(join(folder, 'start.pid'), isOurs);
}
