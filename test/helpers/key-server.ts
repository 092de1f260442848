import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { exportJWK, generateKeyPair, type JWK, type JWTPayload, SignJWT } from 'jose';

/** A real HTTP server of public keys, as an identity provider runs one, that signs tokens and rotates its keys. */
export interface KeyServer {
  readonly url: string;
  /** How often the keys were fetched. */
  readonly fetches: number;
  /** Replaces the key by a new one; with `keep`, the old one stays in the set. */
  rotate(keep?: boolean): Promise<void>;
  /** A token by the newest key, which it names unless told not to. */
  sign(claims: JWTPayload, expires?: string | number, namesKey?: boolean): Promise<string>;
  /** The newest public key as the set has it. */
  publicKey(): JWK;
  /** Answers 503 from now on. */
  fail(isFailing: boolean): void;
  stop(): Promise<void>;
}

export async function startKeyServer(algorithm = 'ES256'): Promise<KeyServer> {
  let keys: JWK[] = [];
  let signing: { id: string; key: CryptoKey };
  let made = 0;
  let fetches = 0;
  let isFailing = false;

  async function rotate(keep = false): Promise<void> {
    const id = `key-${++made}`;
    const pair = await generateKeyPair(algorithm);
    signing = { id, key: pair.privateKey };
    const jwk = { ...(await exportJWK(pair.publicKey)), kid: id, alg: algorithm, use: 'sig' };
    keys = keep ? [...keys, jwk] : [jwk];
  }
  await rotate();

  const server = createServer((_, response) => {
    fetches++;
    if (isFailing) {
      response.writeHead(503).end();
      return;
    }
    response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify({ keys }));
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/keys`,
    get fetches() {
      return fetches;
    },
    rotate,
    sign(claims, expires = '5m', namesKey = true) {
      return new SignJWT(claims)
        .setProtectedHeader({ alg: algorithm, ...(namesKey ? { kid: signing.id } : {}) })
        .setIssuedAt()
        .setExpirationTime(expires)
        .sign(signing.key);
    },
    publicKey: () => keys.at(-1)!,
    fail(failing) {
      isFailing = failing;
    },
    stop() {
      return new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      });
    },
  };
}
