import assert from 'node:assert/strict';
import { test } from 'node:test';
import { readGatewayConfig } from '../../gateway/config.ts';
import { backoffMs } from '../../shared/backoff.ts';
import { createKeys } from '../../shared/keys.ts';
import { isConnectionError, parseRedisUrl, redactUrl, retrying } from '../../shared/redis.ts';
import { addressHead, encodeLines, publishCommands, readEntry } from '../../shared/reply-stream.ts';
import { readWorkerConfig } from '../../worker/config.ts';

test('what one script touches shares a hash tag', () => {
  const keys = createKeys('chat:');
  const tag = (key: string) => /\{([^}]+)\}/.exec(key)?.[1];
  assert.equal(tag(keys.generation('u1', 'm1')), 'u1');
  assert.equal(tag(keys.log('u1', 'm1')), 'u1');
  assert.equal(tag(keys.active('u1')), 'u1');
  assert.equal(tag(keys.requests('n1')), 'n1');
  assert.equal(tag(keys.retries('n1')), 'n1');
  assert.equal(tag(keys.dead('n1')), 'n1');
  assert.equal(keys.requests('n1'), 'chat:req:{n1}');
  assert.equal(keys.log('u1', 'm1'), 'chat:log:{u1}:m1');
});

test('backoff doubles, jitters in its upper half, and is bounded', () => {
  assert.equal(
    backoffMs(1, 100, 10_000, () => 1),
    100,
  );
  assert.equal(
    backoffMs(1, 100, 10_000, () => 0),
    50,
  );
  assert.equal(
    backoffMs(4, 100, 10_000, () => 1),
    800,
  );
  assert.equal(
    backoffMs(60, 100, 10_000, () => 1),
    10_000,
  );
});

test('REDIS_URL chooses the engine', () => {
  assert.deepEqual(parseRedisUrl('redis://127.0.0.1:6380/2'), {
    kind: 'server',
    options: { host: '127.0.0.1', port: 6380, db: 2 },
    nodes: [],
  });
  const sentinel = parseRedisUrl('redis+sentinel://a:1,b/mymaster');
  assert.equal(sentinel.kind, 'sentinel');
  assert.deepEqual(sentinel.options.sentinels, [
    { host: 'a', port: 1 },
    { host: 'b', port: 26379 },
  ]);
  const guarded = parseRedisUrl('redis+sentinel://:p@a/m?sentinel-user=u&sentinel-password=x%26y');
  assert.equal(guarded.options.sentinelUsername, 'u');
  assert.equal(guarded.options.sentinelPassword, 'x&y');
  const cluster = parseRedisUrl('rediss+cluster://user:p%40ss@a:1,b:2');
  assert.equal(cluster.kind, 'cluster');
  assert.equal(cluster.options.password, 'p@ss');
  assert.ok(cluster.options.tls);
  assert.throws(() => parseRedisUrl('redis+sentinel://a:1'), /name of the master/);
  assert.throws(() => parseRedisUrl('redis://a,b'), /several hosts/);
  for (const raw of [':xx/yy@host', 'user:1234/56@host', 'user:xx@yy@host', ':%zzyy@host'])
    assert.throws(
      () => parseRedisUrl(`redis://${raw}:6379`),
      ({ message }: Error) => /percent-encoded/.test(message) && !/yy|1234/.test(message),
      raw,
    );
  assert.throws(() => parseRedisUrl('redis://host/abc'), /must be a number/);
  assert.throws(() => parseRedisUrl('redis+cluster://host/3'), /no database but 0/);
  for (const port of ['0', '65536', '99999'])
    assert.throws(() => parseRedisUrl(`redis+sentinel://a,host:${port}/m`), {
      message: `Wrong settings: REDIS_URL: the port of host:${port} must be from 1 to 65535`,
    });
  assert.equal(redactUrl('redis://u:secret@h:1'), 'redis://***@h:1');
  assert.equal(
    redactUrl('redis+sentinel://h/m?sentinel-password=x'),
    'redis+sentinel://h/m?sentinel-password=***',
  );
});

test('errors that a repeat may cure are told apart', () => {
  assert.ok(isConnectionError(new Error('READONLY You can not write against a read only replica.')));
  assert.ok(isConnectionError(new Error('LOADING Redis is loading the dataset in memory')));
  assert.ok(isConnectionError(new Error('Connection is closed.')));
  assert.ok(!isConnectionError(new Error('ERR The ID specified in XADD is equal or smaller')));
  assert.ok(!isConnectionError(new Error('NOGROUP No such key')));
  assert.ok(!isConnectionError(new Error('BUSYGROUP Consumer Group name already exists')));
});

test('a step of the clock does not end the patience with a Redis that is away', async (t) => {
  t.mock.timers.enable({ apis: ['Date'] });
  let tries = 0;
  const answer = retrying(async () => {
    t.mock.timers.tick(3_600_000);
    if (++tries < 3) throw new Error('Connection is closed.');
    return 'here';
  });
  assert.equal(await answer, 'here');
});

test('reply entries carry several frames, in bounded pieces', () => {
  const keys = createKeys('chat:');
  const frame = (index: number, json = `{"n":${index},"text":"a\\nb 😀"}`) =>
    encodeLines(
      addressHead('u', 'm'),
      index === 0 ? '' : `1-${index - 1}`,
      `1-${index}`,
      index === 0 ? 's' : 't',
      json,
    );
  const commands = publishCommands(
    keys,
    'n1',
    Array.from({ length: 200 }, (_, index) => frame(index)),
  );
  const read: string[][] = [];
  const most = commands.map((command) => {
    assert.deepEqual(command.slice(0, 3), ['xadd', 'chat:reply:{n1}', 'NOMKSTREAM']);
    const before = read.length;
    readEntry(command.slice(7) as string[], (...one) => read.push(one));
    return read.length - before;
  });
  assert.deepEqual(most, [64, 64, 64, 8]);
  assert.deepEqual(read[0], ['u m - 1-0 s', '{"n":0,"text":"a\\nb 😀"}']);
  assert.deepEqual(read[199], ['u m 1-198 1-199 t', '{"n":199,"text":"a\\nb 😀"}']);
  const large = publishCommands(
    keys,
    'n1',
    Array.from({ length: 4 }, (_, index) => frame(index, 'x'.repeat(40_000))),
  );
  assert.equal(large.length, 2);
});

test('a reply entry of somebody else is passed over', () => {
  const read: string[][] = [];
  const entries = [
    ['frames', 'u m - 1-0 s\n{}\nu m 1-0 1-1 t'],
    ['frames', 'x'],
    ['frames', ''],
    ['!n', '{}'],
    [],
  ];
  for (const fields of entries) readEntry(fields, (...one) => read.push(one));
  assert.deepEqual(read, [
    ['u m - 1-0 s', '{}'],
    ['!n', '{}'],
  ]);
});

test('settings: defaults, and mistakes named by variable', () => {
  const gateway = readGatewayConfig({ NODE_ID: 'n1', API_KEYS: 'a, b', PORT: '' });
  assert.equal(gateway.PORT, 8080);
  assert.equal(gateway.QUEUE_LIMIT, 100);
  assert.deepEqual(gateway.API_KEYS, ['a', 'b']);
  const urls = { JWKS_URL: 'https://id.example/keys?v=a@b', MODERATION_URL: 'http://127.0.0.1:1/x' };
  assert.equal(readGatewayConfig({ NODE_ID: 'n1', ...urls }).JWKS_URL, urls.JWKS_URL);
  const worker = readWorkerConfig({});
  assert.equal(worker.WORKER_CONCURRENCY, 16);
  assert.equal(worker.EXIT_WHEN_IDLE_MS, undefined);
  const wrong: [() => unknown, RegExp][] = [
    [() => readGatewayConfig({}), /NODE_ID is required/],
    [() => readGatewayConfig({ NODE_ID: 'a b' }), /NODE_ID/],
    [() => readGatewayConfig({ NODE_ID: 'n', PORT: 'http' }), /PORT must be a whole number/],
    [() => readGatewayConfig({ NODE_ID: 'n', PORT: '70000' }), /PORT must be from 0 to 65535/],
    [() => readGatewayConfig({ NODE_ID: 'n', AUTH: 'magic' }), /AUTH must be none or jwt/],
    [() => readGatewayConfig({ NODE_ID: 'n', AUTH: 'jwt' }), /JWT_SECRET or JWKS_URL/],
    [() => readGatewayConfig({ NODE_ID: 'n', REDIS_URL: 'http://x' }), /REDIS_URL must start with/],
    ...(['PUBLIC_URL', 'JWKS_URL', 'MODERATION_URL', 'OTEL_EXPORTER_OTLP_ENDPOINT'] as const).flatMap(
      (name) =>
        ['file:///etc/keys', 'ftp://x', 'http:x', 'x', 'https://u:p@x/y'].map(
          (value): [() => unknown, RegExp] => [
            () => readGatewayConfig({ NODE_ID: 'n', [name]: value }),
            new RegExp(`^Error: Wrong settings: ${name} must be an http:// or https:// address`),
          ],
        ),
    ),
    ...['a b', 'good,a\tb', 'é', 'a\u00a0b', 'a\u200b'].map((keys): [() => unknown, RegExp] => [
      () => readGatewayConfig({ NODE_ID: 'n', API_KEYS: keys }),
      /API_KEYS may hold only visible ASCII characters/,
    ]),
    [() => readWorkerConfig({ WORKER_CONCURRENCY: '0' }), /WORKER_CONCURRENCY must be from 1/],
    [() => readWorkerConfig({ LOG_LEVEL: 'loud' }), /LOG_LEVEL must be one of/],
    [() => readWorkerConfig({ OTEL_EXPORTER_OTLP_ENDPOINT: 'ftp://x' }), /OTEL_\w+ must be an http/],
  ];
  for (const [read, message] of wrong) assert.throws(read, message);
});
