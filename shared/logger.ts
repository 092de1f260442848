import { writeSync } from 'node:fs';
import { pino } from 'pino';

export type { Logger } from 'pino';

const RETRIES = 50; // of 2 ms each: a reader that is this slow loses lines, never the process its time
const pause = new Int32Array(new SharedArrayBuffer(4));

/**
 * Standard output, written at once. pino's own destination keeps trying for ever when its reader is gone, also at
 * exit; a process must be able to end without its log.
 */
const standardOutput = {
  write(line: string): void {
    for (let attempt = 0; attempt < RETRIES; attempt++) {
      try {
        writeSync(1, line);
        return;
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') return;
        Atomics.wait(pause, 0, 0, 2);
      }
    }
  },
};

/**
 * The process's root logger: JSON lines on stdout, ISO times. Facts go in as fields; contents never do.
 * @param level one that is not known counts as info: the settings, which are read next, say what is wrong with it
 */
export function createLogger(level: string, fields: Record<string, unknown>) {
  return pino(
    {
      level: level === 'silent' || level in pino.levels.values ? level : 'info',
      base: fields,
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
    },
    standardOutput,
  );
}
