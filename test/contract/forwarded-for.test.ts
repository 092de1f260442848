import assert from 'node:assert/strict';
import { once } from 'node:events';
import { get } from 'node:http';
import { test } from 'node:test';
import { WebSocket } from 'ws';
import { createClientAddress } from '../../gateway/client-address.ts';
import { listen } from '../../gateway/socket-server.ts';

/** A client writes a line of its own; its proxy adds one behind it, as HAProxy does, or to it, as nginx does. */
test('who is behind a proxy is read from the end of all lines of X-Forwarded-For', async (t) => {
  const addressOf = createClientAddress(['127.0.0.1']);
  const seen: string[] = [];
  const server = await listen('127.0.0.1', 0, {
    maxFrameBytes: 1_000,
    heartbeatMs: 60_000,
    refuseUpgrade(request) {
      seen.push(addressOf(request.address, request.forwardedFor));
      return null;
    },
    connect: () => ({ onText() {}, onDrain() {}, onClose() {} }),
    async answer(call) {
      seen.push(addressOf(call.address, call.headers.get('x-forwarded-for') ?? ''));
      return { status: 200 };
    },
    close: { noHeartbeat: 4002, payloadTooLarge: 4504, protocolViolation: 4503, slowClient: 4001 },
    onError: (error) => assert.fail(String(error)),
  });
  t.after(() => server.stop());
  const forged = '198.51.100.66';
  const lists: [lines: string[], address: string][] = [
    [[forged, '203.0.113.1'], '203.0.113.1'],
    [[forged, forged, '203.0.113.1, 127.0.0.1'], '203.0.113.1'],
    [['203.0.113.1', '127.0.0.1'], '203.0.113.1'],
    [[`${`${forged}, `.repeat(60)}203.0.113.1`], '203.0.113.1'],
    [[], '127.0.0.1'],
  ];
  for (const [lines, address] of lists) {
    const headers = { 'x-forwarded-for': lines };
    const socket = new WebSocket(`ws://127.0.0.1:${server.port}/ws`, { headers: headers as never });
    await once(socket, 'open');
    socket.terminate();
    const [response] = await once(get(`http://127.0.0.1:${server.port}/`, { headers }), 'response');
    response.resume();
    assert.deepEqual(seen.splice(0), [address, address], lines.join(' | ').slice(0, 60));
  }
});
