import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { get } from 'node:https';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { SignJWT } from 'jose';
import { type ClientOptions, WebSocket } from 'ws';
import type { ServerFrame } from '../../shared/protocol.ts';
import { makeCertificate } from '../helpers/certificate.ts';
import { openChat, type TestClient } from '../helpers/chat-client.ts';
import { type KeyServer, startKeyServer } from '../helpers/key-server.ts';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** Who gets in, how much they may ask, and that everybody sees only their own. */

const JWT_SECRET = 'a secret of thirty-two characters';
let stack: Stack;
let keys: KeyServer;
before(async () => {
  [stack, keys] = await Promise.all([startStack(null, { gateways: 0, workers: 1 }), startKeyServer()]);
});
after(() => Promise.all([stack.stop(), keys.stop()]));

const sign = (claims: object) =>
  new SignJWT({ ...claims }).setProtectedHeader({ alg: 'HS256' }).sign(new TextEncoder().encode(JWT_SECRET));
const inSeconds = (seconds: number) => Math.floor(Date.now() / 1000) + seconds;

/** What a handshake comes to: 101, or the HTTP status that refused it. */
function handshake(url: string, options: ClientOptions): Promise<number> {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(url, options);
    socket.on('open', () => {
      socket.terminate();
      resolve(101);
    });
    socket.on('unexpected-response', (_, response) => {
      resolve(response.statusCode!);
      response.resume();
    });
    socket.on('error', (error) => {
      if (!/Unexpected server response/.test(error.message)) reject(error);
    });
  });
}

/** Opens, says `init`, and gives the first frame and, where it closes, the code. */
async function introduce(
  url: string,
  init: object,
  options: ClientOptions = {},
): Promise<{ frame: ServerFrame; code: number | null; socket: WebSocket }> {
  const socket = new WebSocket(url, options);
  const closed = new Promise<number>((resolve) => socket.on('close', resolve));
  const first = new Promise<ServerFrame>((resolve, reject) => {
    socket.on('message', (data) => resolve(JSON.parse(data.toString()) as ServerFrame));
    socket.on('error', reject);
  });
  socket.on('open', () => socket.send(JSON.stringify({ type: 'init', ...init })));
  const frame = await first;
  return { frame, code: frame.type === 'ready' ? null : await closed, socket };
}

test('tokens: in the URL, in a header, in init; wrong ones close 4501', async (t) => {
  const gateway = await stack.addGateway({ node: 'jwt', env: { AUTH: 'jwt', JWT_SECRET } });
  const token = await sign({ sub: '20001', exp: inSeconds(60) });
  const ways: [string, object, ClientOptions][] = [
    [`${gateway.url}?userId=20001&token=${token}`, { userId: 20001 }, {}],
    [gateway.url, { userId: '20001' }, { headers: { authorization: `Bearer ${token}` } }],
    [gateway.url, { userId: 20001, token }, {}],
    [gateway.url, { token }, {}],
    [`${gateway.url}?token=nonsense`, { token }, {}],
  ];
  for (const [url, init, options] of ways) {
    const { frame, socket } = await introduce(url, init, options);
    t.after(() => socket.terminate());
    assert.ok(frame.type === 'ready', JSON.stringify(frame));
    assert.equal(frame.userId, '20001');
  }
  const other = await sign({ sub: '20002' });
  const stale = await sign({ sub: '20001', exp: inSeconds(-60) });
  const wrong: [object, string][] = [
    [{ userId: 20001 }, 'unauthorized'],
    [{ userId: 20001, token: 'nonsense' }, 'unauthorized'],
    [{ userId: 20001, token: stale }, 'unauthorized'],
    [{ userId: 20001, token: other }, 'forbidden'],
  ];
  for (const [init, code] of wrong) {
    const refused = await introduce(gateway.url, init);
    assert.ok(refused.frame.type === 'error');
    assert.deepEqual([refused.frame.code, refused.code], [code, 4501]);
  }
});

test('a connection ends with its token, 4501', async () => {
  const gateway = await stack.addGateway({ node: 'expiry', env: { AUTH: 'jwt', JWT_SECRET } });
  const { frame, socket } = await introduce(gateway.url, {
    token: await sign({ sub: '20001', exp: inSeconds(2) }),
  });
  assert.equal(frame.type, 'ready');
  const started = Date.now();
  const code = await new Promise((resolve) => socket.on('close', resolve));
  assert.equal(code, 4501);
  assert.ok(Date.now() - started < 15_000);
});

test('keys that rotate under open connections; a key server that is away means: come again', async (t) => {
  const gateway = await stack.addGateway({ node: 'jwks', env: { AUTH: 'jwt', JWKS_URL: keys.url } });
  keys.fail(true);
  const away = await introduce(gateway.url, { token: await keys.sign({ sub: '20001' }) });
  assert.ok(away.frame.type === 'error');
  assert.deepEqual([away.frame.code, away.code], ['internal', 4004]);
  keys.fail(false);
  const first = await introduce(gateway.url, { token: await keys.sign({ sub: '20001' }) });
  t.after(() => first.socket.terminate());
  assert.equal(first.frame.type, 'ready');
  const old = await keys.sign({ sub: '20001' });
  await keys.rotate(true);
  const token = await keys.sign({ sub: '20001' });
  const deadline = Date.now() + 15_000;
  for (;;) {
    const next = await introduce(gateway.url, { token });
    next.socket.terminate();
    if (next.frame.type === 'ready') break;
    assert.equal(next.code, 4501, 'within the cooldown of 5 s an unknown key is just unknown');
    assert.ok(Date.now() < deadline);
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  const again = await introduce(gateway.url, { token: old });
  again.socket.terminate();
  assert.equal(again.frame.type, 'ready', 'the old key is still in the set');
  assert.equal(first.socket.readyState, WebSocket.OPEN);
});

test('with tokens, a user resumes, cancels and reads only what is theirs', async (t) => {
  const gateway = await stack.addGateway({ node: 'own', env: { AUTH: 'jwt', JWT_SECRET } });
  const open = async (userId: string): Promise<TestClient> => {
    const client = await openChat(gateway.url, userId, { token: await sign({ sub: userId }) });
    t.after(() => client.close());
    return client;
  };
  const owner = await open('30001');
  owner.send({
    type: 'chat',
    messageId: 'o1',
    contents: 'secret',
    parameters: { tokens: 150, intervalMs: 10, seed: 1 },
  });
  await owner.next('token', 'o1');
  const other = await open('30002');
  for (const type of ['resume', 'cancel']) {
    other.send({ type, messageId: 'o1' });
    assert.equal((await other.next('rejected', 'o1')).code, 'unknown_message');
  }
  // The same message id of another user is another message.
  other.send({
    type: 'chat',
    messageId: 'o1',
    contents: 'mine',
    parameters: { tokens: 3, intervalMs: 0, seed: 1 },
  });
  assert.equal((await other.next('accepted', 'o1')).duplicate, false);
  const theirs = await other.answer('o1');
  const answer = await owner.answer('o1');
  assert.ok(answer.end.type === 'done' && theirs.end.type === 'done');
  assert.equal(answer.end.finishReason, 'stop');
  assert.equal(answer.text.split(' ').length, 150);
  assert.notEqual(answer.text, theirs.text);
});

test('origins: the same, the allowed ones, and no origin at all', async () => {
  const gateway = await stack.addGateway({
    node: 'origin',
    env: { ALLOWED_ORIGINS: 'https://chat.example, https://other.example' },
  });
  const from = (origin: string | null) =>
    handshake(gateway.url, origin === null ? {} : { headers: { origin } });
  assert.equal(await from(null), 101);
  assert.equal(await from(`http://127.0.0.1:${gateway.port}`), 101);
  assert.equal(await from('https://chat.example'), 101);
  assert.equal(await from('https://other.example'), 101);
  for (const origin of [
    'https://evil.example',
    'http://chat.example', // another scheme
    'https://chat.example.evil.example',
    'https://chat.example:8443',
    'https://evil.example/https://chat.example',
    'null',
    `http://127.0.0.1:${gateway.port + 1}`,
    `http://localhost:${gateway.port}`,
  ])
    assert.equal(await from(origin), 403, origin);
  const rebound = { host: 'evil.example', origin: 'http://evil.example' };
  assert.equal(await handshake(gateway.url, { headers: rebound }), 403, 'a name that leads here');
  const open = await stack.addGateway({ node: 'anywhere', env: { ALLOWED_ORIGINS: '*' } });
  assert.equal(await handshake(open.url, { headers: { origin: 'https://evil.example' } }), 101);
});

test('too many frames: told so with a time, served again after it, cut off when deaf', async (t) => {
  const gateway = await stack.addGateway({
    node: 'rate',
    env: { CONNECTION_FRAMES_PER_SECOND: '5', USER_FRAMES_PER_SECOND: '10' },
  });
  const client = await openChat(gateway.url, '40001');
  t.after(() => client.close());
  for (let count = 0; count < 49; count++) client.send('PING'); // init was the first of 50
  client.send({ type: 'chat', messageId: 'r1', contents: 'x', parameters: { tokens: 3, intervalMs: 0 } });
  const rejected = await client.next('rejected', 'r1');
  assert.equal(rejected.code, 'rate_limited');
  assert.equal(rejected.temporary, true);
  assert.ok(rejected.retryAfterMs! > 0 && rejected.retryAfterMs! <= 200);
  await new Promise((resolve) => setTimeout(resolve, rejected.retryAfterMs));
  client.send({ type: 'chat', messageId: 'r1', contents: 'x', parameters: { tokens: 3, intervalMs: 0 } });
  assert.equal((await client.answer('r1')).end.type, 'done');

  // The user's own rate is over all connections: this one has sent little, the user much.
  const clients = await Promise.all([1, 2].map(() => openChat(gateway.url, '40001')));
  t.after(() => {
    for (const one of clients) one.close();
  });
  for (const one of clients) for (let count = 0; count < 40; count++) one.send('PING');
  const refused = await Promise.any(clients.map((one) => one.next('error')));
  assert.equal(refused.code, 'rate_limited');
  const stranger = await openChat(gateway.url, '40002');
  t.after(() => stranger.close());
  stranger.send('PING');
  await stranger.next('heartbeat');

  for (let count = 0; count < 3_000; count++) client.send('PING');
  assert.equal((await client.closed).code, 4503);
  const metrics = await (await fetch(`${gateway.http}/metrics`)).text();
  assert.ok(Number(/rivulet_rate_limited_total (\d+)/.exec(metrics)![1]) > 1_000);
});

test('connections of one address: the next one is closed 4003, and let in when one has left', async (t) => {
  const gateway = await stack.addGateway({
    node: 'address',
    env: { TRUSTED_PROXIES: '127.0.0.1', CONNECTIONS_PER_ADDRESS: '3' },
  });
  const open = (address: string) => {
    const socket = new WebSocket(gateway.url, { headers: { 'x-forwarded-for': `9.9.9.9, ${address}` } });
    t.after(() => socket.terminate());
    const closed = new Promise<number>((resolve) => socket.on('close', resolve));
    // Whoever answers PING is in; whoever is too many is closed.
    const entered = new Promise<number>((resolve) => {
      socket.on('open', () => socket.send('PING'));
      socket.on('message', () => resolve(0));
    });
    return { socket, closed, outcome: Promise.race([entered, closed]) };
  };
  const three = [open('203.0.113.1'), open('203.0.113.1'), open('203.0.113.1')];
  for (const one of three) assert.equal(await one.outcome, 0);
  assert.equal(await open('203.0.113.1').outcome, 4003);
  assert.equal(await open('203.0.113.2').outcome, 0);
  three[0]!.socket.close();
  await three[0]!.closed;
  assert.equal(await open('203.0.113.1').outcome, 0);
  const metrics = await (await fetch(`${gateway.http}/metrics`)).text();
  assert.match(metrics, /rivulet_address_limited_total 1\n/);
});

test('who never says who it is is closed after a minute, also while Redis is away', async (t) => {
  const clock = `const now = performance.now.bind(performance);
    process.on('SIGUSR2', () => { performance.now = () => now() + 61_000; });`;
  const away = await startStack(t, {
    workers: 0,
    gatewayEnv: { NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(clock)}` },
  });
  const gateway = away.gateways[0]!;
  const openSilent = (url: string) => {
    const socket = new WebSocket(url);
    t.after(() => socket.terminate());
    const opened = new Promise((resolve) => socket.on('open', resolve));
    const closed = new Promise<number>((resolve, reject) => {
      socket.on('close', resolve);
      setTimeout(() => reject(new Error('still open')), 15_000).unref();
    });
    return { opened, closed };
  };
  const silent = [openSilent(gateway.url), openSilent(gateway.url.replace('/ws', '/ai'))];
  const bound = await away.client(20001);
  await Promise.all(silent.map(({ opened }) => opened));
  await away.redis.kill();
  gateway.child.kill('SIGUSR2');
  for (const { closed } of silent) assert.equal(await closed, 4503);
  bound.send({ type: 'heartbeat' });
  await bound.next('heartbeat');
  await away.redis.restart();
});

test('TLS at the gateway itself', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-tls-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const files = makeCertificate(dir);
  const ca = readFileSync(files.cert);
  const gateway = await stack.addGateway({
    node: 'tls',
    env: { TLS_CERT_FILE: files.cert, TLS_KEY_FILE: files.key },
  });
  const { frame, socket } = await introduce(
    `wss://127.0.0.1:${gateway.port}/ws`,
    { userId: 50001 },
    { ca, headers: { origin: `https://127.0.0.1:${gateway.port}` } },
  );
  t.after(() => socket.terminate());
  assert.equal(frame.type, 'ready');
  const answer = new Promise<string>((resolve) => {
    let text = '';
    socket.on('message', (data) => {
      const next = JSON.parse(data.toString()) as ServerFrame;
      if (next.type === 'token') text += next.text;
      if (next.type === 'done') resolve(text);
    });
  });
  socket.send(
    JSON.stringify({
      type: 'chat',
      messageId: 't1',
      contents: 'x',
      parameters: { tokens: 2_000, intervalMs: 0, seed: 1 },
    }),
  );
  assert.equal((await answer).split(' ').length, 2_000);
  const status = await new Promise((resolve, reject) => {
    get(`https://127.0.0.1:${gateway.port}/readyz`, { ca }, (response) => {
      response.resume();
      resolve(response.statusCode);
    }).on('error', reject);
  });
  assert.equal(status, 200);
  await assert.rejects(fetch(`http://127.0.0.1:${gateway.port}/readyz`));
});

test('wrong TLS and proxy settings stop the start, by name', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-tls-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const files = makeCertificate(dir);
  const cases: [Record<string, string>, RegExp][] = [
    [{ TLS_CERT_FILE: files.cert }, /TLS_CERT_FILE and TLS_KEY_FILE go together/],
    [
      { TLS_CERT_FILE: '/nowhere.pem', TLS_KEY_FILE: files.key },
      /TLS_CERT_FILE \/nowhere.pem cannot be read/,
    ],
    [{ TLS_CERT_FILE: files.key, TLS_KEY_FILE: files.cert }, /do not fit/],
    [{ TRUSTED_PROXIES: 'my-proxy' }, /TRUSTED_PROXIES must be/],
  ];
  for (const [env, message] of cases) {
    const before = stack.gateways.length;
    await assert.rejects(stack.addGateway({ node: 'wrong', env }), message);
    assert.equal(await stack.gateways[before]!.exited, 2);
    stack.gateways.length = before;
  }
});

test('what comes with the page: nothing from elsewhere, nothing inline, no frames', async () => {
  const gateway: GatewayProcess = await stack.addGateway({ node: 'page' });
  for (const path of ['/', '/index.html', '/client.js']) {
    const { headers, status } = await fetch(`${gateway.http}${path}`);
    assert.equal(status, 200, path);
    const policy = headers.get('content-security-policy')!;
    for (const part of [
      "default-src 'none'",
      "script-src 'self'",
      "base-uri 'none'",
      "form-action 'none'",
      "frame-ancestors 'none'",
    ])
      assert.ok(policy.split('; ').includes(part), `${path}: ${part} in ${policy}`);
    assert.doesNotMatch(policy, /unsafe|script-src[^;]*(\*|data:|https:)/);
    assert.equal(headers.get('x-content-type-options'), 'nosniff');
    assert.equal(headers.get('x-frame-options'), 'DENY');
    assert.equal(headers.get('referrer-policy'), 'no-referrer');
    assert.equal(headers.get('cross-origin-opener-policy'), 'same-origin');
  }
  for (const path of ['/nothing', '/ws', '/../package.json', '/%2e%2e/package.json', '/<script>']) {
    const { headers, status } = await fetch(`${gateway.http}${path}`);
    assert.ok(status === 404 || status === 426, path);
    assert.equal(headers.get('x-content-type-options'), 'nosniff');
    assert.match(headers.get('content-type')!, /^text\/plain/);
  }
});
