import { readdirSync, readFileSync } from 'node:fs';
import { extname } from 'node:path';
import { stop, transform } from 'esbuild';
import type { HttpAnswer } from '../socket-server.ts';

/** The web page's files, read once at start; `client.js` is shared/client.ts without its types, `markdown-it.js` a library. */
const TYPES: Record<string, string> = {
  '.html': 'text/html; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.svg': 'image/svg+xml',
  '.png': 'image/png',
  '.ico': 'image/x-icon',
};

/** Nothing from elsewhere, nothing inline, no framing: what a model or a person sends stays text. */
const SECURITY_HEADERS = {
  'content-security-policy':
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss: http: https:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'x-content-type-options': 'nosniff',
  'x-frame-options': 'DENY',
  'referrer-policy': 'no-referrer',
  'cross-origin-opener-policy': 'same-origin',
  'permissions-policy': 'camera=(), microphone=(), geolocation=()',
  'cache-control': 'no-cache',
};

export async function loadStaticFiles(): Promise<Map<string, HttpAnswer>> {
  const folder = new URL('../public/', import.meta.url);
  const files = new Map<string, HttpAnswer>();
  const add = (path: string, type: string, body: string | Uint8Array) =>
    files.set(path, { status: 200, headers: { 'content-type': type, ...SECURITY_HEADERS }, body });
  for (const name of readdirSync(folder)) {
    const type = TYPES[extname(name)];
    if (type) add(`/${name}`, type, readFileSync(new URL(name, folder)));
  }
  const index = files.get('/index.html');
  if (index) files.set('/', index);
  const client = readFileSync(new URL('../../shared/client.ts', import.meta.url), 'utf8');
  const { code } = await transform(client, { loader: 'ts', format: 'esm', target: 'es2022' });
  await stop(); // its process has nothing more to do here
  add('/client.js', TYPES['.js']!, code);
  const markdownIt = import.meta.resolve('markdown-it/browser');
  add('/markdown-it.js', TYPES['.js']!, readFileSync(new URL(markdownIt)));
  return files;
}
