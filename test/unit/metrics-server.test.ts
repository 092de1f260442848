import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { test } from 'node:test';
import { pino } from 'pino';
import { createMetricsRegistry } from '../../shared/metrics.ts';
import { startMetricsServer } from '../../worker/metrics-server.ts';
import { eventually } from '../helpers/eventually.ts';

/** The worker's port for numbers. `scenarios/observability` scrapes it. */

const start = (host: string, port: number, lines: string[] = []) =>
  startMetricsServer({
    host,
    port,
    registry: createMetricsRegistry(),
    isReady: () => true,
    log: pino({ base: null }, { write: (line) => lines.push(line) }),
  });

test('a port that another worker still has is a warning, and is taken once it is free', async (t) => {
  const former = createServer().listen(0, '127.0.0.1');
  t.after(() => former.close());
  await once(former, 'listening');
  const { port } = former.address() as AddressInfo;
  const lines: string[] = [];
  const server = await start('127.0.0.1', port, lines);
  t.after(() => server.stop());
  assert.match(lines.join(''), /METRICS_PORT is taken/);

  const never = await start('127.0.0.1', port);
  await never.stop(); // while it waits
  former.close();
  await eventually('the port', () => lines.some((line) => line.includes('"msg":"metrics"')));
  assert.equal((await fetch(`http://127.0.0.1:${port}/readyz`)).status, 200);
});

test('an address that is not ours ends the start', async () => {
  await assert.rejects(start('192.0.2.1', 0), /METRICS_PORT 0 on 192\.0\.2\.1 cannot be listened on/);
});
