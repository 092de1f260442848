import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

const WRITING_MS = 500; // what an owner needs, at the very most, to write itself into the lock that it made

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
  writeFileSync(join(folder, 'run.json'), `${JSON.stringify(state, null, 2)}\n`);
}

export function removeRunState(folder: string): void {
  rmSync(join(folder, 'run.json'), { force: true });
}

/**
 * Takes the folder for this process, or tells whose it is. The lock of an owner that is gone is taken over.
 * @param isOurs whether a process of this id is one that locks folders
 */
export async function lockFolder(
  folder: string,
  isOurs: (pid: number) => boolean,
): Promise<{ unlock: () => void } | { owner: number }> {
  const path = join(folder, 'start.pid');
  for (let attempt = 1; ; attempt++) {
    try {
      writeFileSync(path, String(process.pid), { flag: 'wx' });
      return { unlock: () => removeLock(path, process.pid) };
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST' || attempt === 5) throw error;
    }
    let owner = readNumber(path);
    for (let waited = 0; owner === 0 && waited < WRITING_MS; waited += 20) {
      await delay(20); // it was made this moment
      owner = readNumber(path);
    }
    if (owner && owner !== process.pid && isProcessAlive(owner) && isOurs(owner)) return { owner };
    removeLock(path, owner); // its owner crashed
  }
}

/** Removes the lock of this owner only: another start may have found the same and have made its own meanwhile. */
function removeLock(path: string, owner: number): void {
  const aside = `${path}.${process.pid}`;
  try {
    renameSync(path, aside);
    if (!Object.is(readNumber(aside), owner)) writeFileSync(path, readFileSync(aside), { flag: 'wx' });
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ENOENT' && code !== 'EEXIST') throw error; // gone already, or taken again
  }
  rmSync(aside, { force: true });
}

function readNumber(path: string): number {
  try {
    return Number(readFileSync(path, 'utf8'));
  } catch {
    return 0;
  }
}

export function isProcessAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
