import assert from 'node:assert/strict';
import { test } from 'node:test';
import { base64url, SignJWT } from 'jose';
import { createAuthenticate } from '../../gateway/authenticate.ts';
import { RivuletError } from '../../shared/errors.ts';
import { eventually } from '../helpers/eventually.ts';
import { startKeyServer } from '../helpers/key-server.ts';

/** Tokens at the door: secrets, keys that rotate, and what people try. */

const JWT_SECRET = 'a secret of thirty-two characters';
const unset = { JWT_ISSUER: undefined, JWT_AUDIENCE: undefined, JWT_SECRET: undefined, JWKS_URL: undefined };

const signed = (claims: object, alg = 'HS256', secret = JWT_SECRET) =>
  new SignJWT({ ...claims }).setProtectedHeader({ alg }).sign(new TextEncoder().encode(secret));

/** Asserts that a promise is rejected with a code of the table. */
const refused = (promise: Promise<unknown>, code: string, message?: RegExp) =>
  assert.rejects(promise, (error) => {
    assert.ok(error instanceof RivuletError, String(error));
    assert.equal(error.code, code, error.message);
    if (message) assert.match(error.message, message);
    return true;
  });

const inSeconds = (seconds: number) => Math.floor(Date.now() / 1000) + seconds;

test('a secret: sub is the user, whatever else was wrong is refused', async () => {
  const authenticate = createAuthenticate({ ...unset, AUTH: 'jwt', JWT_SECRET });
  const exp = inSeconds(60);
  assert.deepEqual(await authenticate('20001', await signed({ sub: '20001', exp })), {
    userId: '20001',
    expiresMs: exp * 1000,
  });
  assert.deepEqual(await authenticate(null, await signed({ sub: 'anna' })), {
    userId: 'anna',
    expiresMs: null,
  });
  await refused(authenticate('20002', await signed({ sub: '20001' })), 'forbidden');
  await refused(authenticate('20001', ''), 'unauthorized', /required/);
  await refused(authenticate('20001', 'nonsense'), 'unauthorized');
  await refused(authenticate('20001', 'a.b.c'), 'unauthorized');
  await refused(authenticate(null, await signed({ name: 'no sub' })), 'unauthorized');
  await refused(authenticate(null, await signed({ sub: '9' })), 'unauthorized', /reserved/);
  await refused(authenticate(null, await signed({ sub: 'a b' })), 'unauthorized', /may hold only/);
  await refused(
    authenticate(null, await signed({ sub: '20001', exp: inSeconds(-60) })),
    'unauthorized',
    /expired/,
  );
  await refused(authenticate(null, await signed({ sub: '20001', nbf: inSeconds(60) })), 'unauthorized');
  await refused(
    authenticate(null, await signed({ sub: '20001' }, 'HS256', `${JWT_SECRET}!`)),
    'unauthorized',
  );
  await refused(
    authenticate(null, await signed({ sub: '20001' }, 'HS512', JWT_SECRET.repeat(2))),
    'unauthorized',
  );
});

test('clocks may differ by a few seconds, and a token let in that way is not closed at once', async () => {
  const authenticate = createAuthenticate({ ...unset, AUTH: 'jwt', JWT_SECRET });
  const { expiresMs } = await authenticate(null, await signed({ sub: '20001', exp: inSeconds(-2) }));
  assert.ok(expiresMs! > Date.now(), 'some of the tolerance is left');
  await authenticate(null, await signed({ sub: '20001', nbf: inSeconds(2) }));
});

test('an unsigned token is refused', async () => {
  const authenticate = createAuthenticate({ ...unset, AUTH: 'jwt', JWT_SECRET });
  const part = (value: object) => base64url.encode(JSON.stringify(value));
  for (const alg of ['none', 'None', 'NONE', ''])
    await refused(authenticate(null, `${part({ alg })}.${part({ sub: '20001' })}.`), 'unauthorized');
});

test('issuer and audience are checked when they are set', async () => {
  const authenticate = createAuthenticate({
    ...unset,
    AUTH: 'jwt',
    JWT_SECRET,
    JWT_ISSUER: 'https://id.example',
    JWT_AUDIENCE: 'rivulet',
  });
  const good = { sub: '20001', iss: 'https://id.example', aud: ['other', 'rivulet'] };
  assert.equal((await authenticate(null, await signed(good))).userId, '20001');
  await refused(authenticate(null, await signed({ ...good, aud: 'other' })), 'unauthorized');
  await refused(authenticate(null, await signed({ ...good, iss: 'https://evil.example' })), 'unauthorized');
  await refused(authenticate(null, await signed({ sub: '20001' })), 'unauthorized');
});

test('keys from a server: cached, rotated, and kept while the server is away', async (t) => {
  const keys = await startKeyServer();
  t.after(() => keys.stop());
  const authenticate = createAuthenticate(
    { ...unset, AUTH: 'jwt', JWKS_URL: keys.url },
    { cooldownMs: 50, freshMs: 300 },
  );
  const first = await keys.sign({ sub: '20001' });
  for (let count = 0; count < 5; count++) await authenticate('20001', first);
  assert.equal(keys.fetches, 1, 'one fetch serves many tokens');

  await keys.rotate(true);
  const second = await keys.sign({ sub: '20001' });
  await eventually('the new key', () =>
    authenticate('20001', second).then(
      () => true,
      () => false,
    ),
  );
  await authenticate('20001', first);

  await keys.rotate();
  await eventually('the end of the old key', () =>
    authenticate('20001', first).then(
      () => false,
      (error: RivuletError) => error.code === 'unauthorized',
    ),
  );

  const third = await keys.sign({ sub: '20001' });
  await authenticate('20001', third);
  keys.fail(true);
  await new Promise((resolve) => setTimeout(resolve, 400)); // past freshMs
  await authenticate('20001', third);
  // Its key is not among the last ones: an old one, or a new one that cannot be fetched. Who has it shall come again.
  await refused(authenticate(null, second), 'internal', /cannot be fetched/);
  await refused(authenticate(null, `${third.slice(0, -8)}AAAAAAAA`), 'unauthorized');
});

test('a token that names no key is tried with each that fits, also while the key server is away', async (t) => {
  const keys = await startKeyServer();
  const other = await startKeyServer();
  t.after(() => Promise.all([keys.stop(), other.stop()]));
  const nameless = (server = keys) => server.sign({ sub: '20001' }, '5m', false);
  const authenticate = createAuthenticate(
    { ...unset, AUTH: 'jwt', JWKS_URL: keys.url },
    { cooldownMs: 50, freshMs: 300 },
  );
  const first = await nameless();
  await keys.rotate(true);
  const second = await nameless();
  const refuseOthers = async () => {
    await refused(authenticate(null, await nameless(other)), 'unauthorized', /not valid/);
    const expired = await keys.sign({ sub: '20001' }, inSeconds(-60), false);
    await refused(authenticate(null, expired), 'unauthorized', /expired/);
  };
  for (const token of [first, second]) assert.equal((await authenticate(null, token)).userId, '20001');
  await refuseOthers();
  keys.fail(true);
  await new Promise((resolve) => setTimeout(resolve, 400)); // past freshMs
  for (const token of [first, second]) assert.equal((await authenticate(null, token)).userId, '20001');
  await refuseOthers();
});

test('a key server that never answered is nobody’s fault at the door', async (t) => {
  const keys = await startKeyServer();
  t.after(() => keys.stop());
  keys.fail(true);
  const authenticate = createAuthenticate({ ...unset, AUTH: 'jwt', JWKS_URL: keys.url }, { cooldownMs: 50 });
  const token = await keys.sign({ sub: '20001' });
  await refused(authenticate('20001', token), 'internal', /cannot be fetched/);
  keys.fail(false);
  assert.equal((await authenticate('20001', token)).userId, '20001');
});

test('invented key ids do not become requests to the key server', async (t) => {
  const keys = await startKeyServer();
  t.after(() => keys.stop());
  const authenticate = createAuthenticate({ ...unset, AUTH: 'jwt', JWKS_URL: keys.url });
  await authenticate('20001', await keys.sign({ sub: '20001' }));
  const other = await startKeyServer();
  t.after(() => other.stop());
  const invented: string[] = [];
  for (let count = 0; count < 20; count++) {
    await other.rotate();
    invented.push(await other.sign({ sub: '20001' }));
  }
  await Promise.all(invented.map((token) => refused(authenticate('20001', token), 'unauthorized')));
  assert.ok(keys.fetches <= 3, `${keys.fetches} fetches`);
});

test('a key that comes while invented ids keep the key server from being asked', async (t) => {
  const keys = await startKeyServer();
  const other = await startKeyServer();
  t.after(() => Promise.all([keys.stop(), other.stop()]));
  const authenticate = createAuthenticate({ ...unset, AUTH: 'jwt', JWKS_URL: keys.url }, { cooldownMs: 300 });
  await refused(authenticate('20001', await other.sign({ sub: '20001' })), 'unauthorized');
  await keys.rotate();
  assert.equal((await authenticate('20001', await keys.sign({ sub: '20001' }))).userId, '20001');
});

test('a public key is never taken for a secret, nor a secret for a public key', async (t) => {
  const keys = await startKeyServer('RS256');
  t.after(() => keys.stop());
  const publicKey = keys.publicKey();
  const token = (secret: Uint8Array) =>
    new SignJWT({ sub: '20001' }).setProtectedHeader({ alg: 'HS256', kid: publicKey.kid! }).sign(secret);
  const guesses = [
    new TextEncoder().encode(JSON.stringify(publicKey)),
    new TextEncoder().encode(publicKey.n!),
    base64url.decode(publicKey.n!),
  ];
  const byKeys = createAuthenticate({ ...unset, AUTH: 'jwt', JWKS_URL: keys.url });
  const byBoth = createAuthenticate({ ...unset, AUTH: 'jwt', JWKS_URL: keys.url, JWT_SECRET });
  for (const authenticate of [byKeys, byBoth])
    for (const guess of guesses) await refused(authenticate(null, await token(guess)), 'unauthorized');
  const bySecret = createAuthenticate({ ...unset, AUTH: 'jwt', JWT_SECRET });
  await refused(bySecret(null, await keys.sign({ sub: '20001' })), 'unauthorized');

  assert.equal((await byBoth(null, await keys.sign({ sub: '20001' }))).userId, '20001');
  assert.equal((await byBoth(null, await signed({ sub: '20002' }))).userId, '20002');
});
