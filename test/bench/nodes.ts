import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createKeys } from '../../shared/keys.ts';
import { createNodeRegistry } from '../../shared/node-registry.ts';
import { createRedis } from '../../shared/redis.ts';
import { createRequestQueue } from '../../shared/request-queue.ts';
import { spawnProcess } from '../helpers/stack.ts';

/**
 * What a worker and Redis pay as gateways grow: 1, 10 and 100 node streams, simulated by their keys, read by two real
 * workers. Idle cost, then a steady 50 requests a second spread over the nodes (short answers, so that reading is what
 * is measured). `node --import ./infra/typescript.mjs test/bench/nodes.ts`
 */

const SECONDS = 8;
const REQUESTS_A_SECOND = 50;
const WORKERS = 2;
const TICKS_A_SECOND = 100; // USER_HZ of Linux

async function measure(count: number): Promise<Record<string, string | number>> {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-nodes-'));
  const server = await startRedisServer({ dir });
  const redis = createRedis({ url: server.url, name: 'bench' });
  await redis.connected();
  const keys = createKeys('chat:');
  const registry = createNodeRegistry({ redis, keys });
  const queue = createRequestQueue({ redis, keys });
  const nodes = Array.from({ length: count }, (_, index) => `n${index}`);
  for (const node of nodes) {
    await registry.register(node, 'bench', 3_600_000, { startedAt: Date.now(), url: null, connections: 0 });
    await queue.ensureGroup(node);
    await redis.client.xadd(keys.replies(node), '*', '-', 'opened');
  }
  const workers = Array.from({ length: WORKERS }, () =>
    spawnProcess('worker/main.ts', { REDIS_URL: server.url, LOG_LEVEL: 'info', WORKER_CONCURRENCY: '128' }),
  );
  try {
    await Promise.all(workers.map((worker) => worker.logged((line) => line.msg === 'nodes')));
    await delay(1_000);

    const cpuMs = (pid: number) => {
      const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]!.split(' ');
      return ((Number(fields[11]) + Number(fields[12])) * 1000) / TICKS_A_SECOND;
    };
    const facts = async () => {
      const info = await redis.client.info('stats');
      return {
        redis: cpuMs(server.pid),
        worker: workers.reduce((sum, worker) => sum + cpuMs(worker.pid), 0),
        commands: Number(/total_commands_processed:(\d+)/.exec(info)![1]),
      };
    };
    const share = (ms: number) => `${((100 * ms) / (SECONDS * 1000)).toFixed(1)} %`;

    const idleFrom = await facts();
    await delay(SECONDS * 1000);
    const idleTo = await facts();

    const delays: number[] = [];
    const busyFrom = await facts();
    const started = performance.now();
    for (let index = 0; index < SECONDS * REQUESTS_A_SECOND; index++) {
      const due = started + (index * 1000) / REQUESTS_A_SECOND;
      if (due > performance.now()) await delay(due - performance.now());
      const user = `u${index}`;
      const node = nodes[index % count]!;
      await redis.client.hset(keys.generation(user, 'm'), {
        status: 'queued',
        attempt: 0,
        tries: 0,
        node,
        routes: node,
        payload: JSON.stringify({ contents: 'x', parameters: { tokens: 1, intervalMs: 0, seed: 1 } }),
        admitted: Date.now(),
      });
      const sent = Date.now();
      await queue.enqueue(node, user, 'm', 1_000_000);
      // Every tenth is watched until its first frame is in the log: the worker's own way from stream to begin.
      if (index % 10 === 0)
        void (async () => {
          while ((await redis.client.exists(keys.log(user, 'm'))) === 0 && Date.now() - sent < 5_000)
            await delay(1);
          delays.push(Date.now() - sent);
        })();
    }
    await delay(500);
    const busyTo = await facts();
    delays.sort((a, b) => a - b);
    return {
      nodes: count,
      'idle: commands/s': Math.round((idleTo.commands - idleFrom.commands) / SECONDS),
      'idle: Redis CPU': share(idleTo.redis - idleFrom.redis),
      'idle: CPU a worker': share((idleTo.worker - idleFrom.worker) / WORKERS),
      'busy: Redis CPU': share(busyTo.redis - busyFrom.redis),
      'busy: CPU a worker': share((busyTo.worker - busyFrom.worker) / WORKERS),
      'to begin p50 ms': delays[Math.floor(delays.length * 0.5)] ?? '-',
      'to begin p95 ms': delays[Math.floor(delays.length * 0.95)] ?? '-',
    };
  } finally {
    await Promise.all(workers.map((worker) => worker.kill('SIGKILL')));
    await redis.close();
    await server.kill('SIGKILL');
    rmSync(dir, { recursive: true, force: true });
  }
}

const counts = process.argv.slice(2).map(Number);
const rows = [];
for (const count of counts.length > 0 ? counts : [1, 10, 100]) rows.push(await measure(count));
const columns = Object.keys(rows[0]!);
const line = (cells: (string | number)[]) => `| ${cells.join(' | ')} |`;
console.log(
  [
    line(columns),
    line(columns.map(() => '---')),
    ...rows.map((row) => line(columns.map((column) => row[column]!))),
  ].join('\n'),
);
