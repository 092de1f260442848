import { parseArgs } from 'node:util';
import { runProcess } from '../shared/lifecycle.ts';
import { createLogger } from '../shared/logger.ts';
import { readAutoscalerConfig, startAutoscaler } from './autoscaling.ts';
import { reportFailure } from './command.ts';

/** `npm run autoscaler`: as many workers on this machine as the queues ask for. Workers take their own settings. */

const HELP = `Usage: npm run autoscaler -- [options]

Starts and ends worker processes on this machine, from WORKERS_MIN to WORKERS_MAX, by the length of the queues.

  --plot FILE.svg   keep a plot of load, queue and workers over time in this file`;

function readOptions(): { plot?: string | undefined; help?: boolean | undefined } {
  try {
    return parseArgs({ options: { plot: { type: 'string' }, help: { type: 'boolean', short: 'h' } } }).values;
  } catch (error) {
    process.exit(reportFailure(error as Error, HELP));
  }
}

const options = readOptions();
if (options.help) console.log(HELP);
else {
  const log = createLogger(process.env.LOG_LEVEL || 'info', { process: 'autoscaler', pid: process.pid });
  await runProcess(
    async () =>
      startAutoscaler(readAutoscalerConfig(process.env), {
        workerEnv: process.env,
        plotFile: options.plot ?? null,
        log,
      }),
    log,
  );
}
