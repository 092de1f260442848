import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { Redis } from 'ioredis';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createRedis, retrying } from '../../shared/redis.ts';

/** A failover that is announced while a connection is being made: ioredis ends the client, and we open it again. */
test('a connection that is told to close while it is being made comes back', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-ended-'));
  const server = await startRedisServer({ dir });
  const redis = createRedis({ url: server.url, name: 'ended' });
  t.after(async () => {
    await redis.close();
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  });
  await redis.connected();
  const { client } = redis;
  assert.ok(client instanceof Redis);
  const ended = new Promise((resolve) => client.once('end', resolve));
  client.once('connecting', () => {
    // What ioredis' FailoverDetector does when it hears of a new master.
    (client as unknown as { connector: { disconnect(): void } }).connector.disconnect();
  });
  client.stream.destroy();
  await ended;
  assert.equal(await retrying(() => client.ping(), { deadlineMs: 5_000 }), 'PONG');
});
