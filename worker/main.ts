import { runProcess } from '../shared/lifecycle.ts';
import { createLogger } from '../shared/logger.ts';
import { readWorkerConfig } from './config.ts';
import { loadHandler } from './models/load-handler.ts';
import { startWorker } from './worker.ts';

const log = createLogger(process.env.LOG_LEVEL || 'info', { process: 'worker', pid: process.pid });

await runProcess(async () => {
  const config = readWorkerConfig(process.env);
  return startWorker(config, await loadHandler(config), log);
}, log);
