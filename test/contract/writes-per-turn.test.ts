import assert from 'node:assert/strict';
import { type TestContext, test } from 'node:test';
import { WebSocket } from 'ws';
import { startSocketServer } from '../helpers/socket-server.ts';

/** A server with so many clients; both sides of each, in the same order. */
async function connectMany(t: TestContext, count: number) {
  const { connections, url } = await startSocketServer(t, 60_000);
  const clients: WebSocket[] = [];
  for (let index = 0; index < count; index++) {
    const client = new WebSocket(url);
    t.after(() => client.terminate());
    await new Promise((resolve, reject) => client.once('open', resolve).once('error', reject));
    clients.push(client);
  }
  return { connections, clients };
}

/** With something for everybody, first frames leave before those that only continue, and all arrive whole and in order. */
test('what is to be sent soon does not wait for everybody', async (t) => {
  const count = 400;
  const { connections, clients } = await connectMany(t, count);
  const arrived: string[] = [];
  let whenAll: () => void = () => {};
  const all = new Promise<void>((resolve) => {
    whenAll = resolve;
  });
  clients.forEach((client, index) => {
    client.on('message', (data) => {
      arrived.push(`${index} ${data}`);
      if (arrived.length === 2 * count + 1) whenAll();
    });
  });
  const last = connections.length - 1;
  for (const connection of connections) connection.send('one');
  connections[last]!.send('soon', true);
  for (const connection of connections) connection.send('two');
  await all;
  assert.deepEqual(
    arrived.filter((text) => text.startsWith(`${last} `)),
    [`${last} one`, `${last} soon`, `${last} two`],
  );
  assert.ok(arrived.indexOf(`${last} soon`) < arrived.indexOf(`${last - 1} one`));
  assert.ok(arrived.indexOf(`${last} soon`) < arrived.indexOf(`${count / 2} one`));
});

test('a ping leaves after what was sent before it, however many wait', async (t) => {
  const { connections, clients } = await connectMany(t, 400);
  const last = connections.length - 1;
  const arrived: string[] = [];
  const pinged = new Promise<void>((resolve) => {
    clients[last]!.on('message', (data) => arrived.push(String(data)));
    clients[last]!.on('ping', (data) => {
      arrived.push(`ping ${data}`);
      resolve();
    });
  });
  for (const connection of connections) connection.send('one');
  setImmediate(() => connections[last]!.ping('1'));
  await pinged;
  assert.deepEqual(arrived, ['one', 'ping 1']);
});
