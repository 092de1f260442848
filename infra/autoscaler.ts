import { parseArgs } from 'node:util';
import { runProcess } from '../shared/lifecycle.ts';
import { createLogger } from '../shared/logger.ts';
import { readAutoscalerConfig, startAutoscaler } from './autoscaling.ts';

/** `npm run autoscaler`: as many workers on this machine as the queues ask for. Workers take their own settings. */

const HELP = `Usage: npm run autoscaler -- [options]

Starts and ends worker processes on this machine, from WORKERS_MIN to WORKERS_MAX, by the length of the queues.

  --plot FILE.svg   keep a plot of load, queue and workers over time in this file`;

const { values } = parseArgs({
  options: { plot: { type: 'string' }, help: { type: 'boolean', short: 'h' } },
});
if (values.help) console.log(HELP);
else {
  const log = createLogger(process.env.LOG_LEVEL || 'info', { process: 'autoscaler', pid: process.pid });
  await runProcess(
    async () =>
      startAutoscaler(readAutoscalerConfig(process.env), {
        workerEnv: process.env,
        plotFile: values.plot ?? null,
        log,
      }),
    log,
  );
}
