import assert from 'node:assert/strict';
import type { TestContext } from 'node:test';
import { type Connection, listen } from '../../gateway/socket-server.ts';
import { CLOSE } from '../../shared/protocol.ts';

/** A server of sockets alone, with nothing behind it, and its side of each connection in the order in which they came. */
export async function startSocketServer(t: TestContext, heartbeatMs: number) {
  const connections: Connection[] = [];
  const server = await listen('127.0.0.1', 0, {
    maxFrameBytes: 1_000,
    heartbeatMs,
    refuseUpgrade: () => null,
    connect(connection: Connection) {
      connections.push(connection);
      return { onText() {}, onDrain() {}, onClose() {} };
    },
    answer: async () => ({ status: 404 }),
    close: CLOSE,
    onError: (error) => assert.fail(String(error)),
  });
  t.after(() => server.stop());
  return { connections, url: `ws://127.0.0.1:${server.port}/ws` };
}
