import { setTimeout as delay } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { createKeys } from '../shared/keys.ts';
import { type PipelineSnapshot, readPipeline } from '../shared/pipeline.ts';
import { createRedis, type RedisConnection, readServerTime, redactUrl } from '../shared/redis.ts';
import { chooseRedis, reportFailure } from './command.ts';
import { renderPipeline } from './streams-table.ts';

/** `npm run streams`: the queues and the workers, live on a terminal, as one plain table anywhere else. */

const HELP = `Usage: npm run streams -- [options]

Shows the queues and the workers, once a second on a terminal (q or Ctrl-C quits), once elsewhere.

  --once           print one table and leave
  --json           print one snapshot as JSON and leave
  --redis URL      which Redis; otherwise REDIS_URL, the running npm start, redis://127.0.0.1:6379
  --prefix TEXT    prefix of the keys; otherwise KEY_PREFIX, the running npm start, chat:`;

const REACH_MS = 2_500; // a person waits for the answer
const REDRAW_MS = 1_000;
const CLEAR = '\x1b[H\x1b[J';

async function main(args: string[], env: NodeJS.ProcessEnv): Promise<number> {
  const { values } = parseArgs({
    args,
    options: {
      once: { type: 'boolean' },
      json: { type: 'boolean' },
      redis: { type: 'string' },
      prefix: { type: 'string' },
      help: { type: 'boolean', short: 'h' },
    },
  });
  if (values.help) {
    console.log(HELP);
    return 0;
  }
  const config = chooseRedis(values, env);
  const redis = createRedis({ url: config.REDIS_URL, name: 'streams' });
  try {
    await redis.connected(REACH_MS).catch((error: Error) => {
      if (!config.isNamed)
        error.message += '\nNo npm start runs from this folder; start it, or name a Redis with --redis.';
      throw error;
    });
    const look = () => readSnapshot(redis, config.KEY_PREFIX);
    if (values.json) console.log(JSON.stringify(await look(), null, 2));
    else if (values.once || !process.stdout.isTTY)
      console.log(renderPipeline(await look(), null, { color: false }));
    else await showLive(look, redactUrl(config.REDIS_URL));
    return 0;
  } finally {
    await redis.close();
  }
}

async function readSnapshot(redis: RedisConnection, prefix: string): Promise<PipelineSnapshot> {
  return readPipeline(redis.client, createKeys(prefix), await readServerTime(redis.client));
}

/** Redraws until q or Ctrl-C; a Redis that is away for a while shows as a line, and comes back. */
async function showLive(look: () => Promise<PipelineSnapshot>, url: string): Promise<void> {
  const { stdin, stdout } = process;
  const stop = new AbortController();
  const quit = () => stop.abort();
  process.once('SIGTERM', quit);
  process.once('SIGINT', quit);
  process.once('SIGHUP', quit);
  if (stdin.isTTY) stdin.setRawMode(true);
  stdin.on('data', (keys) => {
    if (['q', 'Q', '\x03', '\x04'].some((key) => keys.includes(key))) quit(); // the last two: Ctrl-C, Ctrl-D
  });
  stdout.write('\x1b[?1049h\x1b[?25l'); // the other screen, no cursor
  let last: PipelineSnapshot | null = null;
  try {
    while (!stop.signal.aborted) {
      let text: string;
      try {
        const snapshot = await Promise.race([
          look(),
          delay(REACH_MS).then(() => Promise.reject(new Error('no answer'))),
        ]);
        text = renderPipeline(snapshot, last, { color: true });
        last = snapshot;
      } catch (error) {
        text = `Redis does not answer: ${(error as Error).message}`;
      }
      const rows = `Rivulet at ${url}   ${new Date().toLocaleTimeString()}   q quits\n\n${text}`.split('\n');
      stdout.write(CLEAR + rows.slice(0, (stdout.rows ?? 50) - 1).join('\n'));
      await delay(REDRAW_MS, undefined, { signal: stop.signal }).catch(() => {});
    }
  } finally {
    stdout.write('\x1b[?25h\x1b[?1049l');
    if (stdin.isTTY) stdin.setRawMode(false);
    stdin.pause();
  }
}

process.stdout.on('error', () => process.exit(0)); // `npm run streams | head -3` closed the pipe
main(process.argv.slice(2), process.env).then(
  (code) => process.exit(code),
  (error: Error) => process.exit(reportFailure(error, HELP)),
);
