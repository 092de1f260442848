import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { tailReplies } from '../../gateway/reply-tail.ts';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createKeys } from '../../shared/keys.ts';
import { createLogger } from '../../shared/logger.ts';
import { createRedis, type RedisConnection } from '../../shared/redis.ts';

/** A gateway that stood still for a moment has much to read: small entries come many at a time, large ones do not. */
test('a tail that is behind reads by bytes, in order', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-tail-'));
  const server = await startRedisServer({ dir });
  const keys = createKeys('chat');
  const redis = createRedis({ url: server.url, name: 'tail', hot: true });
  const stopping = new AbortController();
  const got: string[] = [];
  const reads: number[] = []; // frames that came before the event loop went on
  let inRead = 0;
  let whenMany: () => void = () => {};
  const tail = tailReplies({
    node: 'gw-1',
    keys,
    redis,
    onFrame(address) {
      got.push(address);
      if (inRead++ === 0)
        setImmediate(() => {
          reads.push(inRead);
          inRead = 0;
          whenMany();
        });
    },
    onBroken: (reason) => assert.fail(reason),
    log: createLogger('silent', {}),
    signal: stopping.signal,
  });
  t.after(async () => {
    stopping.abort();
    await redis.close();
    await tail.ended;
    await server.stop();
    rmSync(dir, { recursive: true, force: true });
  });
  await tail.opened;
  let written = 0;
  /** Makes entries in one step, so that the tail finds them all. */
  const write = async (count: number, bytes: number) => {
    const frame = 'x'.repeat(bytes);
    const multi = redis.client.multi();
    for (let index = 0; index < count; index++)
      multi.xadd(keys.replies('gw-1'), '*', 'frames', `a ${written++}\n${frame}\n`);
    await multi.exec();
    while (got.length < written)
      await new Promise<void>((resolve) => {
        whenMany = resolve;
      });
  };
  for (let round = 0; round < 40; round++) await write(2, 100);
  reads.length = 0;
  await write(1_000, 100);
  assert.ok(Math.max(...reads) > 64, `reads of ${reads}`);
  for (let round = 0; round < 40; round++) await write(2, 60_000);
  reads.length = 0;
  await write(100, 60_000);
  assert.ok(Math.max(...reads) <= 20, `reads of ${reads}`);
  assert.deepEqual(
    got,
    Array.from({ length: written }, (_, index) => `a ${index}`),
  );
});

test('a stream that cannot be made is told once, to whoever waits for it', async (t) => {
  const unheard: unknown[] = [];
  const note = (reason: unknown) => unheard.push(reason);
  process.on('unhandledRejection', note);
  t.after(() => process.off('unhandledRejection', note));
  const tail = tailReplies({
    node: 'gw-1',
    keys: createKeys('chat'),
    redis: {
      client: { xadd: () => Promise.reject(new Error('OOM')) },
      onReconnect() {},
    } as unknown as RedisConnection,
    onFrame() {},
    onBroken() {},
    log: createLogger('silent', {}),
    signal: AbortSignal.abort(),
  });
  await assert.rejects(tail.opened, /OOM/);
  await turn();
  assert.deepEqual(unheard, []);
});
