import assert from 'node:assert/strict';
import { test } from 'node:test';
import { readGatewayConfig } from '../../gateway/config.ts';
import { createOrigins } from '../../gateway/origins.ts';

/** Which pages may use a gateway. `scenarios/doors` and `scenarios/ai-sdk` ask its doors. */

const jwt: Record<string, string> = { AUTH: 'jwt', JWT_SECRET: 'x'.repeat(32) };
const originsOf = (env: Record<string, string> = {}) =>
  createOrigins(readGatewayConfig({ NODE_ID: 'n1', ...env }));

test('where anybody may be anybody, a page’s own name is one that no stranger can give out', () => {
  const own = [
    'localhost:8080',
    'chat.localhost',
    '127.0.0.1:8080',
    '192.168.1.4:8080',
    '[::1]:8080',
    'myserver:8080',
    'raspberry.local',
  ];
  const origins = originsOf();
  for (const host of own) assert.ok(origins.allows(`http://${host}`, host), host);
  for (const host of ['evil.example:8080', 'localhost.evil.example', '127.0.0.1.evil.example'])
    assert.equal(origins.allows(`http://${host}`, host), false, host);
  assert.equal(origins.allows('http://localhost:8081', 'localhost:8080'), false);
  assert.equal(origins.allows('null', 'localhost:8080'), false);
  assert.ok(origins.allows('', 'gateway.internal.example'), 'no page');
  assert.match(origins.explain('http://evil.example'), /evil\.example .*ALLOWED_ORIGINS/);
});

test('a public name is one’s own when a setting says so, or who asks must say who they are', () => {
  const host = 'chat.example';
  const settings: Record<string, string>[] = [
    { PUBLIC_URL: 'http://chat.example/' },
    { ALLOWED_ORIGINS: 'http://chat.example' },
    jwt,
  ];
  for (const env of settings) {
    assert.ok(originsOf(env).allows('http://chat.example', host), JSON.stringify(env));
    assert.equal(originsOf(env).allows('http://evil.example', host), false);
  }
});
