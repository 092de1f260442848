import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createRedis } from '../../shared/redis.ts';

async function connect(t: TestContext) {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-pipeline-'));
  const server = await startRedisServer({ dir });
  const redis = createRedis({ url: server.url, name: 'pipeline', hot: true });
  t.after(async () => {
    await redis.close();
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  });
  await redis.connected();
  return { server, redis };
}

test('outcomes say what became of each command, beside others whose replies are read', async (t) => {
  const { redis } = await connect(t);
  const [before, outcomes, after] = await Promise.all([
    redis.batch([['echo', 'before']]),
    redis.outcomes([
      ['xadd', 's', '5-0', 'field', 'value'],
      ['xadd', 's', '4-0', 'field', 'value'],
      ['xadd', 'none', 'NOMKSTREAM', '*', 'field', 'value'],
      ['echo', ''],
    ]),
    redis.batch([['echo', 'after']]),
  ]);
  assert.deepEqual(before, [[null, 'before']]);
  assert.match((outcomes[1] as Error).message, /equal or smaller/);
  assert.deepEqual([outcomes[0], outcomes[2], outcomes[3]], [true, false, true]);
  assert.deepEqual(after, [[null, 'after']]);
  assert.deepEqual(await redis.outcomes([]), []);
  await redis.close();
  const [closed] = await redis.outcomes([['echo', '']]);
  assert.ok(closed instanceof Error);
});

/** The memory of commands is used again: not while the socket still holds them. */
test('commands for a server that reads nothing for a while arrive as they were sent', async (t) => {
  const { server, redis } = await connect(t);
  const turns = 240;
  const perTurn = 10;
  const value = (index: number) => `${index} `.padEnd(8_000, index % 2 ? 'é' : 'e');
  process.kill(server.pid, 'SIGSTOP');
  const sent: Promise<[Error | null, unknown][]>[] = [];
  for (let turn = 0; turn < turns; turn++) {
    const batch = Array.from({ length: perTurn }, (_, index) => turn * perTurn + index);
    sent.push(redis.batch(batch.map((index) => ['set', `key:${index}`, value(index)])));
    await nextTurn();
  }
  process.kill(server.pid, 'SIGCONT');
  const replies = (await Promise.all(sent)).flat();
  assert.equal(replies.length, turns * perTurn);
  assert.ok(replies.every(([error, reply]) => error === null && reply === 'OK'));
  for (let index = 0; index < turns * perTurn; index++)
    assert.equal(await redis.send(['get', `key:${index}`]), value(index));
});
