import assert from 'node:assert/strict';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, before, type TestContext, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { type Browser, chromium, type Page } from 'playwright-core';
import { eventually } from '../helpers/eventually.ts';
import { freePort } from '../helpers/free-port.ts';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** The AI SDK's `useChat` in a real Chromium, in React's strict mode, on a page of another origin. */

const CHROMIUM_ARGS = [
  ...['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'],
  ...['--disable-background-networking', '--disable-component-update', '--disable-sync'],
];

let stack: Stack;
let browser: Browser;
let server: Server;
let origin: string;
before(async () => {
  const bundle = await build({
    entryPoints: [fileURLToPath(new URL('../fixtures/ai-sdk-page.js', import.meta.url))],
    bundle: true,
    write: false,
    format: 'esm',
    target: 'es2022',
    define: { 'process.env.NODE_ENV': '"development"' },
    logLevel: 'error',
  });
  const script = bundle.outputFiles[0]!.text;
  server = createServer((request, response) => {
    const isScript = request.url === '/page.js';
    response.setHeader('content-type', isScript ? 'text/javascript' : 'text/html; charset=utf-8');
    response.end(
      isScript ? script : '<!doctype html><body><script type="module" src="/page.js"></script></body>',
    );
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  [stack, browser] = await Promise.all([
    startStack(null, {
      workers: 1,
      env: { LEASE_MS: '1500', RETRY_BASE_MS: '20', ALLOWED_ORIGINS: `https://else.example,${origin}` },
    }),
    chromium.launch({
      executablePath: process.env.CHROMIUM_PATH ?? '/usr/bin/chromium',
      args: CHROMIUM_ARGS,
    }),
  ]);
});
after(async () => {
  await browser?.close();
  await stack?.stop();
  server?.close();
  server?.closeAllConnections();
});

let chats = 0;

async function openPage(
  t: TestContext,
  transport: string,
  gateway: GatewayProcess = stack.gateways[0]!,
): Promise<{ page: Page; user: string; chat: string; url: string }> {
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await context.newPage();
  page.setDefaultTimeout(20_000);
  page.on('pageerror', (error) => t.diagnostic(error.message));
  const user = String(22_000 + ++chats);
  const chat = `chat-${chats}`;
  const url = `${origin}/?transport=${transport}&gateway=${gateway.http}&user=${user}&chat=${chat}`;
  await page.goto(url);
  await page.waitForSelector('#status');
  return { page, user, chat, url };
}

/** Calls the hook's functions from outside. */
const ask = (page: Page, text: string, tokens: number, intervalMs: number, more: object = {}) =>
  page.evaluate(
    ([text, parameters]) => {
      // biome-ignore lint/suspicious/noExplicitAny: the page's own
      void (window as any).chat.sendMessage({ text }, { body: { parameters } });
    },
    [text, { tokens, intervalMs, seed: 1, ...more }] as const,
  );

const statusIs = (page: Page, status: string) =>
  page.waitForFunction((wanted) => document.querySelector('#status')?.textContent === wanted, status);
const answers = (page: Page) => page.locator('.assistant').allTextContents();
const hasWords = (page: Page, count: number) =>
  page.waitForFunction(
    (wanted) => (document.querySelector('.assistant')?.textContent ?? '').split(' ').length >= wanted,
    count,
  );

async function assertAnswer(page: Page, words: number): Promise<void> {
  await hasWords(page, words); // it is `ready` before it resumes, too
  await statusIs(page, 'ready');
  const all = await answers(page);
  assert.equal(all.length, 1, 'one answer, not two');
  assert.equal(all[0]!.split(' ').length, words);
  assert.equal(await page.locator('#error').textContent(), '');
}

for (const transport of ['websocket', 'http']) {
  test(`${transport}: ask, and see the answer grow`, async (t) => {
    const { page } = await openPage(t, transport);
    await ask(page, 'hello', 60, 10);
    await statusIs(page, 'streaming');
    await hasWords(page, 5);
    await assertAnswer(page, 60);
    // biome-ignore lint/suspicious/noExplicitAny: the page's own
    const queue = await page.evaluate(() => (window as any).queue);
    assert.deepEqual(queue[0], { type: 'data-queue', data: { position: 0 }, transient: true });
  });

  test(`${transport}: reload in the middle, and the answer goes on where it is`, async (t) => {
    const { page, url } = await openPage(t, transport);
    await ask(page, 'hello', 150, 15);
    await hasWords(page, 20);
    await page.goto(`${url}&resume`); // strict mode mounts twice: the second resume replaces the first
    await assertAnswer(page, 150);
  });

  test(`${transport}: an attempt that starts over leaves no trace`, async (t) => {
    const { page } = await openPage(t, transport);
    await ask(page, 'hello', 40, 5, { failAttempts: 2 });
    await assertAnswer(page, 40);
  });

  test(`${transport}: a refusal is an error, and the chat goes on`, async (t) => {
    const { page } = await openPage(t, transport);
    await ask(page, 'x'.repeat(270_000), 5, 0);
    await statusIs(page, 'error');
    const said = await page.locator('#error').textContent();
    assert.match(said!, transport === 'http' ? /bytes/ : /network|bytes/);
  });
}

test('stop stops the model', async (t) => {
  const { page, user } = await openPage(t, 'websocket');
  await ask(page, 'hello', 3_000, 10);
  await hasWords(page, 5);
  // biome-ignore lint/suspicious/noExplicitAny: the page's own
  await page.evaluate(() => (window as any).chat.stop());
  await statusIs(page, 'ready');
  const keys = await eventually('the record', () => stack.look.client.keys(`chat:gen:{${user}}:*`));
  await eventually(
    'the cancel',
    async () => (await stack.look.client.hget(keys[0]!, 'status')) === 'cancelled',
  );
  await ask(page, 'and now?', 10, 0);
  await page.waitForFunction(() => document.querySelectorAll('.assistant').length === 2);
});

test('the gateway is killed in the middle: the page says so, and resumes at another', async (t) => {
  // Not port 0: Linux does not give a port that it chose itself to a second listener within a minute.
  const port = await freePort();
  const gateway = await stack.addGateway({ node: 'short', port });
  const { page } = await openPage(t, 'websocket', gateway);
  await ask(page, 'hello', 200, 15);
  await hasWords(page, 10);
  await gateway.kill();
  await statusIs(page, 'error');
  await stack.addGateway({ node: 'next', port });
  // biome-ignore lint/suspicious/noExplicitAny: the page's own
  await page.evaluate(() => (window as any).chat.resumeStream());
  await assertAnswer(page, 200);
});
