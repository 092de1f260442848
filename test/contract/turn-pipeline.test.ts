import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { setTimeout as delay, setImmediate as nextTurn } from 'node:timers/promises';
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

/** A server of our own: what it answers to a command (its name and its first argument) on which connection. */
async function connectToFake(
  t: TestContext,
  answer: (name: string, word: string, connection: number, socket: Socket) => string | undefined,
  delayMs = 0,
) {
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    const number = sockets.size;
    socket.on('error', () => {});
    socket.on('data', (data) => {
      const words = data.toString().split('\r\n');
      for (let at = 0; at < words.length; at++) {
        if (!/^\*\d+$/.test(words[at]!)) continue;
        const [name, word] = [words[at + 2]!.toLowerCase(), words[at + 4] ?? ''];
        const usual =
          name === 'echo' ? `+${word}` : name === 'ping' ? '+PONG' : name === 'info' ? '+loading:0' : '+OK';
        setTimeout(() => socket.write(`${answer(name, word, number, socket) ?? usual}\r\n`), delayMs);
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  const redis = createRedis({ url: `redis://127.0.0.1:${port}`, name: 'fake', hot: true });
  t.after(async () => {
    await redis.close();
    for (const socket of sockets) socket.destroy();
    server.close();
  });
  await redis.connected();
  return redis;
}

test('a reply is never taken for that of another command, also when ioredis asks on behalf of a connection that is gone', async (t) => {
  // A server that is loading when it is asked first, and then goes away; its successor is ready.
  let connections = 0;
  const redis = await connectToFake(t, (name, _word, connection, socket) => {
    connections = Math.max(connections, connection);
    if (name !== 'info' || connection > 2) return;
    setTimeout(() => socket.destroy(), 100);
    return '$32\r\nloading:1\r\nloading_eta_seconds:1';
  });
  const until = performance.now() + 2_000; // ioredis asks again a second after it was told of the loading
  for (let index = 0; performance.now() < until; index++) {
    assert.equal(await redis.send(['echo', `word-${index}`]), `word-${index}`);
    await delay(10);
  }
  assert.ok(connections > 2, 'it has connected anew');
});

test('a connection whose replies have lost their order is given up within seconds', async (t) => {
  let extra = true;
  const answer = (name: string, word: string) => {
    if (name !== 'echo' || word !== 'trouble' || !extra) return;
    extra = false;
    return '+nobody asked\r\n+trouble';
  };
  const redis = await connectToFake(t, answer, 30);
  let back = false;
  redis.onReconnect(() => {
    back = true;
  });
  const first = redis.send(['echo', 'trouble']);
  // From here on there is always somebody who waits for a reply.
  for (const deadline = performance.now() + 10_000; !back; await delay(5)) {
    redis.send(['echo', 'more']).catch(() => {});
    assert.ok(performance.now() < deadline, 'it is still used');
  }
  assert.equal(await first, 'nobody asked');
  assert.equal(await redis.send(['echo', 'fine']), 'fine');
});
