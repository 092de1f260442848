import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createRoutes, type RouteParts } from '../../gateway/http/routes.ts';
import type { HttpCall } from '../../gateway/socket-server.ts';
import { httpAddress } from '../../shared/http-address.ts';

test('an address has brackets around an IPv6 host', () => {
  for (const [host, address] of [
    ['127.0.0.1', 'http://127.0.0.1:8080'],
    ['::1', 'http://[::1]:8080'],
    ['chat.local', 'http://chat.local:8080'],
  ] as const) {
    assert.equal(httpAddress({ isSecure: false, host, port: 8080 }), address);
    assert.equal(new URL(address).host, address.slice('http://'.length));
  }
  assert.equal(httpAddress({ isSecure: true, host: '::1', port: 8443 }), 'https://[::1]:8443');
});

test('/nodes leaves out what is no address, as an older gateway may tell it', async () => {
  const parts = {
    isUser: async () => true,
    nodeUrls: async () => ['http://::1:8080', 'http://10.0.0.1:8080', 'http://10.0.0.2:8080'],
  } as Partial<RouteParts> as RouteParts;
  const headers = new Map([['host', '10.0.0.1:8080']]);
  const call = { path: '/nodes', method: 'GET', headers } as Partial<HttpCall> as HttpCall;
  const answer = await createRoutes(parts)(call);
  assert.deepEqual(JSON.parse(String(answer.body)), {
    urls: ['http://10.0.0.1:8080', 'http://10.0.0.2:8080'],
  });
});
