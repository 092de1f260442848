import { spawn } from 'node:child_process';

const SCRIPT = `
  read _
  kill -TERM "$0"
  for _ in $(seq "$1"); do sleep 1; kill -0 "$0" 2>/dev/null || exit; done
  kill -KILL "$0"`;

/**
 * Ends a child process when this process is gone, even by SIGKILL: a shell waits on a pipe that the kernel closes for us,
 * then sends SIGTERM, and SIGKILL after `graceMs`. Children in process groups of their own, so that Ctrl-C reaches them
 * only in our order, would otherwise outlive us. Returns how to let go once the child has ended.
 */
export function endWithThisProcess(pid: number, graceMs = 35_000): () => void {
  const seconds = Math.ceil(graceMs / 1000);
  const guard = spawn('/bin/sh', ['-c', SCRIPT, String(pid), String(seconds)], {
    stdio: ['pipe', 'ignore', 'ignore'],
    detached: true,
  });
  guard.on('error', () => {}); // without a shell the child is merely not guarded
  if (!guard.pid) return () => {};
  guard.stdin.on('error', () => {});
  guard.unref();
  (guard.stdin as unknown as { unref?: () => void }).unref?.();
  return () => {
    guard.kill('SIGKILL'); // before the pipe closes, or it would signal a process id that may be reused
    guard.stdin.destroy();
  };
}
