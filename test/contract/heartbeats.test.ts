import assert from 'node:assert/strict';
import { type TestContext, test } from 'node:test';
import { WebSocket } from 'ws';
import { startSocketServer } from '../helpers/socket-server.ts';

/** Who is silent is pinged in time, a few in a turn, and closed in the end; by a clock that nobody sets. */

const HEARTBEAT_MS = 1_000;

async function connect(t: TestContext, count: number, autoPong: boolean) {
  const { connections, url } = await startSocketServer(t, HEARTBEAT_MS);
  const clients = Array.from({ length: count }, () => new WebSocket(url, { autoPong }));
  t.after(() => {
    for (const client of clients) client.terminate();
  });
  await Promise.all(
    clients.map(
      (client) => new Promise((resolve, reject) => client.once('open', resolve).once('error', reject)),
    ),
  );
  return { connections, clients };
}

test('who is silent is pinged in time, and few of them in one turn', async (t) => {
  const { connections, clients } = await connect(t, 300, true);
  let inTurn = 0;
  let most = 0;
  for (const connection of connections) {
    const ping = connection.ping.bind(connection);
    connection.ping = (payload) => {
      if (inTurn++ === 0)
        setImmediate(() => {
          inTurn = 0;
        });
      most = Math.max(most, inTurn);
      ping(payload);
    };
  }
  t.mock.timers.enable({ apis: ['Date'], now: Date.now() + 3_600_000 }); // nobody is silent for so long
  const opened = performance.now();
  const waited = await Promise.all(
    clients.map(
      (client) =>
        new Promise<number>((resolve, reject) => {
          client.once('ping', () => resolve(performance.now() - opened)).once('close', reject);
        }),
    ),
  );
  assert.ok(Math.max(...waited) < 1.1 * HEARTBEAT_MS + 100, `the last after ${Math.max(...waited)} ms`);
  assert.ok(most <= 64, `${most} in one turn`);
});

test('who answers no ping is pinged twice, then closed 4002', async (t) => {
  const { clients } = await connect(t, 1, false);
  const opened = performance.now();
  let pings = 0;
  clients[0]!.on('ping', () => pings++);
  const code = await new Promise((resolve) => clients[0]!.once('close', resolve));
  const waitedMs = performance.now() - opened;
  assert.equal(code, 4002);
  assert.equal(pings, 2);
  assert.ok(waitedMs < 3.1 * HEARTBEAT_MS + 100, `after ${waitedMs} ms`);
});
