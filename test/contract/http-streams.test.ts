import assert from 'node:assert/strict';
import { test } from 'node:test';
import { type HttpStream, listen, SLOW_BYTES } from '../../gateway/socket-server.ts';

/** Pages that make the stream slow each, and the next only when it has drained: as a replay is read from a log. */
test('a stream that was slow and is not any more says so, also when all has left at once', async (t) => {
  const page = 'x'.repeat(SLOW_BYTES + 1);
  const pages = 20;
  let written = 0;
  const server = await listen('127.0.0.1', 0, {
    maxFrameBytes: 1_000,
    heartbeatMs: 60_000,
    refuseUpgrade: () => null,
    connect: () => assert.fail('no sockets'),
    answer: async () => ({
      status: 200,
      stream(stream: HttpStream) {
        const onDrain = () => {
          for (; written < pages && !stream.slow; written++) stream.write(page);
          if (written === pages && !stream.slow) stream.end();
        };
        onDrain();
        return { onDrain, onClose() {} };
      },
    }),
    close: { noHeartbeat: 4002, payloadTooLarge: 4504, protocolViolation: 4503, slowClient: 4001 },
    onError: (error) => assert.fail(String(error)),
  });
  t.after(() => server.stop());
  const answer = await fetch(`http://127.0.0.1:${server.port}/`, { signal: AbortSignal.timeout(20_000) });
  assert.equal((await answer.arrayBuffer()).byteLength, pages * page.length);
});
