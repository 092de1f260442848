/**
 * A file that says which process has a folder. For `npm start` and for the set-up before it, which is why it is plain
 * JavaScript: Node built-ins only, no syntax above Node 14.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';

const WRITING_MS = 500; // what an owner needs, at the very most, to write itself into the lock that it made

/** See the types. */
export async function takeLock(path, isOurs) {
  for (let attempt = 1; ; attempt++) {
    try {
      writeFileSync(path, String(process.pid), { flag: 'wx' });
      return { unlock: () => removeLock(path, process.pid) };
    } catch (error) {
      if (error.code !== 'EEXIST' || attempt === 5) throw error;
    }
    let owner = readNumber(path);
    for (let waited = 0; owner === 0 && waited < WRITING_MS; waited += 20) {
      await new Promise((resolve) => setTimeout(resolve, 20)); // it was made this moment
      owner = readNumber(path);
    }
    // In a container the same few ids come again: a lock of the run before may name us, or what is none of ours.
    if (owner && owner !== process.pid && isProcessAlive(owner) && isOurs(owner)) return { owner };
    removeLock(path, owner); // its owner crashed
  }
}

/** Removes the lock of this owner only: another process may have found the same and have made its own meanwhile. */
function removeLock(path, owner) {
  const aside = `${path}.${process.pid}`;
  try {
    renameSync(path, aside);
    if (!Object.is(readNumber(aside), owner)) writeFileSync(path, readFileSync(aside), { flag: 'wx' });
  } catch (error) {
    if (error.code !== 'ENOENT' && error.code !== 'EEXIST') throw error; // gone already, or taken again
  }
  rmSync(aside, { force: true });
}

function readNumber(path) {
  try {
    return Number(readFileSync(path, 'utf8'));
  } catch {
    return 0;
  }
}

export function isProcessAlive(pid) {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error.code === 'EPERM';
  }
}

export function readCommand(pid) {
  try {
    const text =
      process.platform === 'linux'
        ? readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0').join(' ')
        : execFileSync('ps', ['-p', String(pid), '-o', 'command='], { encoding: 'utf8' });
    return text.trim() || null;
  } catch {
    return null;
  }
}
