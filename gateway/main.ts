import { runProcess } from '../shared/lifecycle.ts';
import { createLogger } from '../shared/logger.ts';
import { readGatewayConfig } from './config.ts';
import { startGateway } from './gateway.ts';

const log = createLogger(process.env.LOG_LEVEL || 'info', {
  process: 'gateway',
  node: process.env.NODE_ID,
  pid: process.pid,
});

await runProcess(async () => startGateway(readGatewayConfig(process.env), log), log);
