import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import test from 'node:test';
import { startRedisServer } from '../../infra/redis-server.ts';
import { createKeys } from '../../shared/keys.ts';
import { createRedis } from '../../shared/redis.ts';
import { watchFinishedLogs } from '../../worker/finished-logs.ts';
import { eventually } from '../helpers/eventually.ts';

test('a log that has expired goes when it is due, and not when Redis comes upon it', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-logs-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const server = await startRedisServer({ dir, args: ['--enable-debug-command', 'yes'] });
  t.after(() => server.stop());
  const redis = createRedis({ url: server.url, name: 'logs' });
  t.after(() => redis.close());
  await redis.connected();
  await redis.client.call('debug', 'set-active-expire', '0');
  const keys = createKeys('chat:');
  const stop = new AbortController();
  const logs = watchFinishedLogs({ redis, keys, afterMs: 50, signal: stop.signal });
  for (let index = 0; index < 100; index++) {
    await redis.client.xadd(keys.log('u', `m${index}`), '*', 'done', '{}');
    await redis.client.pexpire(keys.log('u', `m${index}`), 50);
    if (index > 0) logs.add('u', `m${index}`);
  }
  await eventually('all that were added are gone', async () => (await redis.client.dbsize()) === 1);
  stop.abort();
  await logs.ended;
});
