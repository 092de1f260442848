/** Tells the bench that this process is ready and on which port, and ends it in order, so that profiles are written. */
export function announce(port: number): void {
  process.on('SIGTERM', () => process.exit(0));
  process.stdout.write(`${JSON.stringify({ ready: true, port })}\n`);
}
