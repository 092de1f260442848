import assert from 'node:assert/strict';
import { once } from 'node:events';
import { get } from 'node:http';
import { test } from 'node:test';
import { WebSocket } from 'ws';
import { createClientAddress } from '../../gateway/client-address.ts';
import { listen } from '../../gateway/socket-server.ts';

const options: Parameters<typeof listen>[2] = {
  maxFrameBytes: 1_000,
  heartbeatMs: 60_000,
  refuseUpgrade: () => null,
  connect: () => ({ onText() {}, onDrain() {}, onClose() {} }),
  answer: async () => ({ status: 200 }),
  close: { noHeartbeat: 4002, payloadTooLarge: 4504, protocolViolation: 4503, slowClient: 4001 },
  onError: (error) => assert.fail(String(error)),
};

test('where it cannot be listened, host and port are named', async () => {
  await assert.rejects(listen('nonsense.invalid', 0, options), /PORT 0 on HOST nonsense\.invalid .* host/);
});

/** A client writes a line of its own; its proxy adds one behind it, as HAProxy does, or to it, as nginx does. */
test('who is behind a proxy is read from the end of all lines of X-Forwarded-For', async (t) => {
  const addressOf = createClientAddress(['127.0.0.1']);
  const seen: string[] = [];
  const server = await listen('127.0.0.1', 0, {
    ...options,
    refuseUpgrade(request) {
      seen.push(addressOf(request.address, request.forwardedFor));
      return null;
    },
    async answer(call) {
      seen.push(addressOf(call.address, call.headers.get('x-forwarded-for') ?? ''));
      return { status: 200 };
    },
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
