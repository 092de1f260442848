import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createRedis } from '../../shared/redis.ts';
import { openChat } from '../helpers/chat-client.ts';
import { eventually } from '../helpers/eventually.ts';
import { type Stack, startStack } from '../helpers/stack.ts';

/**
 * What more durability costs: `node --import tsx test/bench/durability.ts [rounds]`. The same load (32 clients, each
 * asking for one-token answers, one after the other) against Redis with `appendfsync everysec`, with `always`, and
 * with a replica that must be connected (`min-replicas-to-write 1`); and what a WAIT for that replica adds to one
 * write. Rounds alternate; medians are printed.
 */

const CLIENTS = 32;
const SECONDS = 4;

interface Result {
  answersPerSecond: number;
  acceptedP50: number;
  acceptedP99: number;
}

async function load(stack: Stack): Promise<Result> {
  const latencies: number[] = [];
  const end = performance.now() + SECONDS * 1_000;
  let answers = 0;
  await Promise.all(
    Array.from({ length: CLIENTS }, async (_, index) => {
      const client = await openChat(stack.gateways[0]!.url, `u${index}`);
      for (let count = 0; performance.now() < end; count++) {
        const messageId = `m${count}`;
        const asked = performance.now();
        client.send({ type: 'chat', messageId, contents: 'x', parameters: { tokens: 1, intervalMs: 0 } });
        await client.next('accepted', messageId);
        latencies.push(performance.now() - asked);
        await client.next('done', messageId);
        answers++;
      }
      client.close();
    }),
  );
  latencies.sort((a, b) => a - b);
  const at = (share: number) => latencies[Math.floor((latencies.length - 1) * share)]!;
  return { answersPerSecond: answers / SECONDS, acceptedP50: at(0.5), acceptedP99: at(0.99) };
}

const median = (values: number[]) => [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)]!;

const rounds = Number(process.argv[2] ?? 3);
const dir = mkdtempSync(join(tmpdir(), 'rivulet-durability-'));
const options = {
  gateways: 1,
  workers: 1,
  acl: false,
  gatewayEnv: { QUEUE_LIMIT: '10000' },
  env: { LOG_LEVEL: 'info' },
};
const everysec = await startStack(null, options);
const always = await startStack(null, { ...options, redisArgs: ['--appendfsync', 'always'] });
const replicated = await startStack(null, { ...options, redisArgs: ['--min-replicas-to-write', '0'] });
const { port } = replicated.redis;
const replica = await startRedisServer({
  dir: join(dir, 'replica'),
  args: ['--replicaof', `127.0.0.1 ${port}`],
});
try {
  await eventually('a connected replica', async () =>
    /connected_slaves:1/.test(await replicated.look.client.info('replication')),
  );
  await replicated.look.client.config('SET', 'min-replicas-to-write', '1');
  const systems = { everysec, always, 'min-replicas-to-write 1': replicated };
  const results = new Map<string, Result[]>();
  for (let round = 0; round < rounds; round++)
    for (const [name, stack] of Object.entries(systems)) {
      const result = await load(stack);
      results.set(name, [...(results.get(name) ?? []), result]);
    }
  for (const [name, list] of results)
    console.log(
      name.padEnd(26),
      `${median(list.map((one) => one.answersPerSecond)).toFixed(0)} answers/s`,
      `accepted p50 ${median(list.map((one) => one.acceptedP50)).toFixed(1)} ms`,
      `p99 ${median(list.map((one) => one.acceptedP99)).toFixed(1)} ms`,
    );
  const one = createRedis({ url: replicated.redis.url, name: 'wait' });
  await one.connected();
  for (const withWait of [false, true]) {
    const times: number[] = [];
    for (let count = 0; count < 500; count++) {
      const began = performance.now();
      await one.client.xadd('bench:wait', 'MAXLEN', '~', 100, '*', 'field', 'value');
      if (withWait) await one.client.call('wait', 1, 1_000);
      times.push(performance.now() - began);
    }
    times.sort((a, b) => a - b);
    console.log(
      `one XADD${withWait ? ' and WAIT 1' : ''}`.padEnd(26),
      `p50 ${times[250]!.toFixed(2)} ms`,
      `p99 ${times[495]!.toFixed(2)} ms`,
    );
  }
  await one.close();
} finally {
  for (const stack of [everysec, always, replicated]) await stack.stop();
  await replica.stop();
  rmSync(dir, { recursive: true, force: true });
}
