import assert from 'node:assert/strict';
import { test } from 'node:test';
import { WebSocket } from 'ws';
import { type Connection, listen } from '../../gateway/socket-server.ts';

/** Messages of every size to a client that reads slowly arrive whole and in order. */
test('long messages survive a client that stops reading', async (t) => {
  const sizes = [10, 4_000, 14_990, 15_000, 15_010, 16_380, 16_384, 40_000, 300_000];
  const letters = ['a', 'ж', '漢', '😀'];
  const messages = Array.from({ length: 400 }, (_, index) => {
    const letter = letters[index % letters.length]!;
    return JSON.stringify({ index, text: letter.repeat(sizes[index % sizes.length]! / letter.length) });
  });
  let next = 0;
  const server = await listen('127.0.0.1', 0, {
    maxFrameBytes: 1_000,
    heartbeatMs: 60_000,
    refuseUpgrade: () => null,
    connect(connection: Connection) {
      const send = () => {
        while (next < messages.length && !connection.slow) connection.send(messages[next++]!);
      };
      return { onText: send, onDrain: send, onClose() {} };
    },
    answer: async () => ({ status: 404 }),
    close: { noHeartbeat: 4002, payloadTooLarge: 4504, protocolViolation: 4503, slowClient: 4001 },
    onError: (error) => assert.fail(String(error)),
  });
  t.after(() => server.stop());
  const client = new WebSocket(`ws://127.0.0.1:${server.port}/ws`);
  t.after(() => client.terminate());
  const got: string[] = [];
  await new Promise<void>((resolve, reject) => {
    client.on('open', () => client.send('go'));
    client.on('error', reject);
    client.on('message', (data) => {
      got.push(data.toString());
      if (got.length === 1) {
        client.pause();
        setTimeout(() => client.resume(), 1_000); // until every buffer on the way is full
      }
      if (got.length === messages.length) resolve();
    });
    client.on('close', (code) => reject(new Error(`closed ${code} after ${got.length} messages`)));
  });
  assert.ok(got.every((text, index) => text === messages[index]));
});
