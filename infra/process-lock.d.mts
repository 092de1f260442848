/**
 * Takes the lock for this process, or tells whose it is. The lock of an owner that is gone is taken over.
 * @param isOurs whether a process of this id is one that takes such locks
 */
export function takeLock(
  path: string,
  isOurs: (pid: number) => boolean,
): Promise<{ unlock: () => void } | { owner: number }>;
export function isProcessAlive(pid: number): boolean;
/** The command line of a process, or null when it is gone or hidden. */
export function readCommand(pid: number): string | null;
