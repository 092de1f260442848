import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createClientAddress, parseNetwork } from '../../gateway/client-address.ts';
import { createAddressLimit, createFrameRates } from '../../gateway/rate-limits.ts';

test('a connection has its burst, then its rate', () => {
  const rates = createFrameRates({ connectionFramesPerSecond: 10, userFramesPerSecond: 0 });
  const client = { rateMs: 0, userId: '' };
  let admitted = 0;
  while (rates.take(client, 1_000_000) === 0) admitted++;
  assert.equal(admitted, 100); // ten seconds' worth
  const waitMs = rates.take(client, 1_000_000);
  assert.equal(waitMs, 100);
  assert.ok(rates.take(client, 1_000_000 + waitMs - 1) > 0, 'no sooner than was said');
  assert.equal(rates.take(client, 1_000_000 + waitMs), 0);
  assert.ok(rates.take(client, 1_000_000 + waitMs) > 0);
  assert.equal(rates.take(client, 2_000_000), 0);
});

test('a long frame counts as several, and at the most as a full bucket', () => {
  const rates = createFrameRates({ connectionFramesPerSecond: 100, userFramesPerSecond: 0 });
  const burst = (length: number) => {
    const client = { rateMs: 0, userId: '' };
    let admitted = 0;
    while (rates.take(client, 1_000_000, length) === 0) admitted++;
    return admitted;
  };
  assert.equal(burst(4_095), 1_000);
  assert.equal(burst(4_096), 500);
  assert.equal(burst(262_144), 15);
  assert.equal(burst(16_777_216), 1);
  const slow = createFrameRates({ connectionFramesPerSecond: 0, userFramesPerSecond: 1 });
  assert.equal(slow.takeUser('anna', 1_000_000.1, 262_144), 0);
  const waitMs = slow.takeUser('anna', 1_000_000.1, 262_144);
  assert.equal(slow.takeUser('anna', 1_000_000.1 + waitMs, 262_144), 0);
});

test('a user has one rate over all connections, and is forgotten afterwards', () => {
  const rates = createFrameRates({ connectionFramesPerSecond: 0, userFramesPerSecond: 1 });
  const now = 1_000_000;
  for (let count = 0; count < 10; count++)
    assert.equal(rates.take({ rateMs: 0, userId: 'anna' }, now), 0, String(count));
  assert.equal(rates.take({ rateMs: 0, userId: 'anna' }, now), 1_000);
  assert.equal(rates.take({ rateMs: 0, userId: 'bert' }, now), 0);
  for (let user = 0; user < 50_000; user++) rates.takeUser(`u${user}`, now);
  assert.equal(rates.users, 50_002);
  rates.takeUser('anna', now + 60_000);
  assert.equal(rates.users, 1);
});

test('no limits, no work', () => {
  const rates = createFrameRates({ connectionFramesPerSecond: 0, userFramesPerSecond: 0 });
  const client = { rateMs: 0, userId: 'anna' };
  for (let count = 0; count < 10_000; count++) assert.equal(rates.take(client, 5), 0);
  assert.equal(rates.users, 0);
});

test('connections of an address', () => {
  const limit = createAddressLimit(2);
  assert.ok(limit.enter('a') && limit.enter('a') && limit.enter('b'));
  assert.equal(limit.enter('a'), false);
  limit.leave('a');
  assert.equal(limit.enter('a'), true);
  for (const address of ['a', 'a', 'b', 'never']) limit.leave(address);
  assert.equal(limit.size, 0);
  for (let count = 0; count < 10; count++) assert.ok(limit.enter(''), 'nobody is not counted');
  assert.ok(createAddressLimit(0).enter('a'));
});

test('whose connection it is', () => {
  const direct = createClientAddress([]);
  assert.equal(direct('198.51.100.7', ''), '198.51.100.7');
  assert.equal(direct('198.51.100.7', '203.0.113.1'), '198.51.100.7', 'nobody is believed');
  assert.equal(direct('127.0.0.1', ''), '');
  assert.equal(direct('0000:0000:0000:0000:0000:0000:0000:0001', ''), '');
  assert.equal(direct('0000:0000:0000:0000:0000:ffff:c633:6407', ''), '198.51.100.7');
  assert.equal(direct('2001:db8:1:2:3:4:5:6', ''), '2001:db8:1:2');
  assert.equal(direct('2001:db8:1:2::9', ''), direct('2001:0db8:0001:0002:ffff:ffff:ffff:ffff', ''));
  assert.equal(direct('2001:db8::1', ''), '2001:db8:0:0');

  const proxied = createClientAddress(['127.0.0.1', '10.0.0.0/8', 'fd00::/8']);
  assert.equal(proxied('127.0.0.1', '203.0.113.1'), '203.0.113.1');
  assert.equal(proxied('127.0.0.1', '1.2.3.4, 203.0.113.1'), '203.0.113.1', 'the client wrote the first');
  assert.equal(proxied('127.0.0.1', '1.2.3.4, 203.0.113.1, 10.1.1.1'), '203.0.113.1');
  assert.equal(proxied('127.0.0.1', `${'1.2.3.4, '.repeat(60)}203.0.113.1`), '203.0.113.1', 'a long list');
  assert.equal(proxied('fd00::1', '[2001:db8:1:2::3]:443'), '2001:db8:1:2');
  assert.equal(proxied('127.0.0.1', '203.0.113.1:5555'), '203.0.113.1');
  assert.equal(proxied('198.51.100.7', '203.0.113.1'), '198.51.100.7', 'not a proxy of ours');
  assert.equal(proxied('127.0.0.1', ''), '127.0.0.1');
  assert.equal(proxied('127.0.0.1', 'garbage'), '127.0.0.1');
});

test('networks in settings', () => {
  for (const good of ['10.0.0.0/8', '::1', '127.0.0.1', 'fd00::/8']) assert.ok(parseNetwork(good), good);
  for (const bad of ['', '10.0.0.0/33', 'x', '10.0.0.0/', '::1/129', '1.2.3.4/8/9', 'example.com'])
    assert.equal(parseNetwork(bad), null, bad);
});
