import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createRedis } from '../../shared/redis.ts';
import { startProxy } from '../faults/proxy.ts';

/**
 * Handshakes that a silent network cut short. ioredis repeats what they asked on the next connection; its replies
 * must not be taken for those of our commands, which would answer each command with the reply of the one before.
 */
test('after silent handshakes every command still gets its own reply', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-handshake-'));
  const server = await startRedisServer({ dir });
  const proxy = await startProxy(() => server.port);
  const redis = createRedis({ url: proxy.url, name: 'handshake', hot: true });
  t.after(async () => {
    await redis.close();
    await proxy.stop();
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  });
  await redis.connected();

  let asking = true;
  const wrong: string[] = [];
  let right = 0;
  const asks = (async () => {
    const under = new Set<Promise<void>>();
    for (let count = 0; asking; count++) {
      const word = `word-${count}`;
      const ask = redis.send(['echo', word]).then(
        (reply) => {
          if (reply === word) right++;
          else wrong.push(`${word} got ${String(reply).slice(0, 40)}`);
        },
        () => {}, // rejected with its connection: nobody takes it for an answer
      );
      under.add(ask);
      void ask.then(() => under.delete(ask));
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
    await Promise.all(under);
  })();
  for (let round = 1; round <= 2; round++) {
    proxy.silence();
    // Long enough for the watchdog to give up the first connection, and one that never got through its handshake.
    await new Promise((resolve) => setTimeout(resolve, 5_000));
    proxy.speak();
    const before = right;
    const deadline = Date.now() + 10_000;
    while (right < before + 100 && Date.now() < deadline)
      await new Promise((resolve) => setTimeout(resolve, 20));
    assert.ok(right >= before + 100, 'it answers again');
  }
  asking = false;
  await asks;
  assert.deepEqual(wrong.slice(0, 5), []);
});
