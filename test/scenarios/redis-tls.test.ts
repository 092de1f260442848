import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { makeCertificate } from '../helpers/certificate.ts';
import { freePort } from '../helpers/free-port.ts';
import { spawnProcess, startStack } from '../helpers/stack.ts';

test('TLS to Redis, with an authority of our own and a client certificate', {
  timeout: 60_000,
}, async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-tls-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const { cert, key } = makeCertificate(dir);
  const port = await freePort();
  const env = {
    REDIS_URL: `rediss://127.0.0.1:${port}`,
    REDIS_TLS_CA: cert,
    REDIS_TLS_CERT: cert,
    REDIS_TLS_KEY: key,
  };
  const stack = await startStack(t, {
    env,
    redisArgs: [
      ...['--tls-port', String(port), '--tls-cert-file', cert, '--tls-key-file', key],
      ...['--tls-ca-cert-file', cert, '--tls-auth-clients', 'yes'],
    ],
  });
  const client = await stack.client(20001);
  client.send({
    type: 'chat',
    messageId: 'm',
    contents: 'x',
    parameters: { tokens: 5, intervalMs: 1, seed: 1 },
  });
  assert.equal((await client.answer('m')).end.type, 'done');

  const trustless = spawnProcess('worker/main.ts', { REDIS_URL: env.REDIS_URL });
  assert.equal(await trustless.exited, 1);
  assert.ok(trustless.logs.some((line) => /self-signed|certificate/i.test(JSON.stringify(line))));
  const clear = spawnProcess('worker/main.ts', { ...env, REDIS_URL: stack.redisUrl });
  assert.equal(await clear.exited, 2);
});
