import assert from 'node:assert/strict';
import { createHmac } from 'node:crypto';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { get } from 'node:http';
import type { AddressInfo } from 'node:net';
import { delimiter, join } from 'node:path';
import { after, before, type TestContext, test } from 'node:test';
import { type Browser, type BrowserContextOptions, chromium, type Page } from 'playwright-core';
import { WebSocketServer } from 'ws';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** The page in a real Chromium, on a real stack. */

const CHROMIUM_ARGS = [
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];
const WAIT_MS = 20_000;

/** 140 different words: four seconds of the demo model, and every loss or double would show. */
const LONG = Array.from({ length: 140 }, (_, index) => `w${index + 1}`).join(' ');
const LONG_ANSWER = `You asked the demo model to say: ${LONG}`;

let stack: Stack;
let browser: Browser;

before(async () => {
  [stack, browser] = await Promise.all([
    startStack(null, {
      gateways: 1,
      workers: 1,
      env: { ALLOWED_ORIGINS: '*' }, // each gateway serves the page, and takes sockets of the other's
      workerEnv: { LEASE_MS: '2000' },
    }),
    chromium.launch({ executablePath: findChromium(), args: CHROMIUM_ARGS }),
  ]);
});

after(async () => {
  await browser?.close();
  await stack?.stop();
});

function findChromium(): string {
  if (process.env.CHROMIUM_PATH) return process.env.CHROMIUM_PATH;
  const folders = (process.env.PATH ?? '').split(delimiter);
  for (const name of ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'])
    for (const folder of folders) if (existsSync(join(folder, name))) return join(folder, name);
  throw new Error('no Chromium on the PATH; set CHROMIUM_PATH');
}

let users = 0;

/** A fresh profile, connected. Anything that the page complains about fails the test. */
async function openPage(
  t: TestContext,
  options: {
    gateway?: GatewayProcess;
    user?: string;
    context?: BrowserContextOptions;
    /** What the page must say of its connection before the test goes on. */
    connection?: 'ready' | 'off' | 'connecting';
    /** Done with the page before it is loaded. */
    prepare?: (page: Page) => Promise<void>;
    /** Complaints that belong to the test, such as those about a server that was killed. */
    allow?: RegExp;
  } = {},
): Promise<Page> {
  const context = await browser.newContext({ viewport: { width: 1360, height: 860 }, ...options.context });
  const page = await context.newPage();
  page.setDefaultTimeout(WAIT_MS);
  const complaints: string[] = [];
  page.on('pageerror', (error) => complaints.push(error.message));
  page.on('console', (message) => {
    if (message.type() !== 'error' && message.type() !== 'warning') return;
    if (!options.allow?.test(message.text())) complaints.push(message.text());
  });
  t.after(async () => {
    await context.close();
    assert.deepEqual(complaints, []);
  });
  await options.prepare?.(page);
  const { http } = options.gateway ?? stack.gateways[0]!;
  await page.goto(`${http}/?userId=${options.user ?? `page-${++users}`}`);
  await page.waitForSelector(`#connection[data-state=${options.connection ?? 'ready'}]`);
  return page;
}

/** Plays the gateway for the page's frames of these types, with frames about the same message; the others pass. */
function answerInstead(types: string[], answer: (say: (frame: object) => void, contents: string) => void) {
  return (blank: Page) =>
    blank.routeWebSocket(/\/ws/, (socket) => {
      const server = socket.connectToServer();
      socket.onMessage((data) => {
        const { type, messageId, contents } = JSON.parse(String(data)) as Record<string, string>;
        const say = (frame: object) => socket.send(JSON.stringify({ messageId, ...frame }));
        if (types.includes(type!)) answer(say, contents!);
        else server.send(data);
      });
    });
}

async function ask(page: Page, question: string): Promise<void> {
  await page.fill('#question', question);
  await page.press('#question', 'Enter');
}

async function lastAnswer(page: Page): Promise<string> {
  return (await page.locator('.turn').last().locator('.prose').textContent()) ?? '';
}

const waitForStatus = (page: Page, status: string) =>
  page.waitForSelector(`.turn:last-child[data-status="${status}"]`);

/** Until the answer on screen has at least this many characters. */
async function waitForText(page: Page, length: number): Promise<string> {
  await page.waitForFunction(
    (least) => (document.querySelector('.turn:last-child .prose')?.textContent ?? '').length >= least,
    length,
  );
  return lastAnswer(page);
}

test('ask and watch it stream, by keyboard alone', async (t) => {
  const page = await openPage(t);
  await page.waitForFunction(() => document.activeElement?.id === 'question');
  await page.keyboard.type('Repeat: one');
  await page.keyboard.press('Shift+Enter');
  await page.keyboard.type('two');
  assert.equal(await page.inputValue('#question'), 'Repeat: one\ntwo');
  await page.fill('#question', `Repeat: ${LONG}`);
  await page.keyboard.press('Enter');
  assert.equal(await page.inputValue('#question'), '');
  const early = await waitForText(page, 60);
  assert.ok(early.length < LONG_ANSWER.length, 'it streams');
  assert.equal(await page.getAttribute('#send', 'aria-label'), 'Stop the answer');
  await waitForStatus(page, 'done');
  assert.equal(await lastAnswer(page), LONG_ANSWER);
  assert.equal(await page.getAttribute('#send', 'aria-label'), 'Send');
  assert.match((await page.textContent('#announcer')) ?? '', /^The answer: You asked/);

  await ask(page, 'What did I ask before?');
  await waitForStatus(page, 'done');
  assert.match(await lastAnswer(page), /Before this you wrote: "Repeat: w1/, 'the history goes along');
});

test('a reload in the middle resumes the same generation', async (t) => {
  const page = await openPage(t);
  await ask(page, `Repeat: ${LONG}`);
  const before = await waitForText(page, 150);
  await page.reload();
  const after = await waitForText(page, 20);
  assert.ok(LONG_ANSWER.startsWith(before) && LONG_ANSWER.startsWith(after));
  await waitForStatus(page, 'done');
  assert.equal(await lastAnswer(page), LONG_ANSWER);
  const turn = await page.evaluate(() => {
    const key = Object.keys(localStorage).find((name) => name.includes(':c:'))!;
    return JSON.parse(localStorage.getItem(key)!).turns[0];
  });
  assert.deepEqual([turn.attempt, turn.tries, turn.status], [1, 0, 'done'], 'asked once, answered once');
  await page.reload();
  await page.waitForSelector('.turn');
  assert.equal(await lastAnswer(page), LONG_ANSWER, 'and it stays');
});

test('a killed gateway in the middle: the page moves to the other one', async (t) => {
  const doomed = await stack.addGateway({ node: 'doomed' });
  const page = await openPage(t, { gateway: doomed, allow: /Failed to load|ERR_|WebSocket|CORS/ });
  // The page learns of the other gateway from the live view.
  await page.waitForSelector('#nodes .card:nth-child(2)');
  await ask(page, `Repeat: ${LONG}`);
  const before = await waitForText(page, 100);
  await doomed.kill();
  await page.waitForFunction(() => /n1/.test(document.getElementById('connection-text')?.textContent ?? ''));
  await page.waitForSelector('.turn:last-child .turn-state[data-tone=good]');
  await waitForStatus(page, 'done');
  assert.ok(LONG_ANSWER.startsWith(before));
  assert.equal(await lastAnswer(page), LONG_ANSWER);
  await ask(page, 'What is 6 * 7?');
  await waitForStatus(page, 'done');
  assert.match(await lastAnswer(page), /42/, 'and life goes on there');
  // Also when the killed one is no longer listed: then the list names none that the page was loaded from.
  await page.waitForSelector(
    '#nodes .card:has-text("doomed")[data-alive=false], #nodes:not(:has-text("doomed"))',
  );
  for (let polls = 0; polls < 3; polls++)
    await page.waitForResponse(`${stack.gateways[0]!.http}/pipeline`, { timeout: 5_000 });
  assert.equal(await page.textContent('#pipeline-live'), 'Live');
});

test('behind a load balancer: the gateways that it hides are never dialled, also when it is gone', async (t) => {
  const doomed = await stack.addGateway({ node: 'hidden' });
  const other = await listen(t);
  const nodes = [
    { node: 'hidden', alive: true, url: other.url, waiting: 0, running: 0, retries: 0, dead: 0 },
  ];
  const page = await openPage(t, {
    gateway: doomed,
    allow: /Failed to load|ERR_|WebSocket|CORS/,
    prepare: async (blank) => {
      const json = { time: Date.now(), nodes, workers: [] };
      await blank.route(`${doomed.http}/pipeline`, (route) => route.fulfill({ json }));
    },
  });
  await page.waitForSelector('#nodes .card');
  await doomed.kill();
  await page.locator('#banner', { hasText: 'cannot be reached' }).waitFor();
  assert.equal(other.dialled(), 0);
});

test('a link cannot name a server: what it adds is never dialled, also when the own one is gone', async (t) => {
  const doomed = await stack.addGateway({ node: 'left' });
  const stranger = await listen(t);
  const page = await openPage(t, { gateway: doomed, allow: /Failed to load|ERR_|WebSocket|CORS/ });
  await page.goto(`${page.url()}&nodes=${stranger.url}`);
  await page.waitForSelector('#nodes .card:nth-child(2)');
  await doomed.kill();
  await page.waitForFunction(() => /n1/.test(document.getElementById('connection-text')?.textContent ?? ''));
  assert.equal(stranger.dialled(), 0);
});

/** A server that a page has no business with. */
async function listen(t: TestContext): Promise<{ url: string; dialled(): number }> {
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1' });
  await once(server, 'listening');
  t.after(() => server.close());
  let dialled = 0;
  server.on('connection', (socket) => {
    dialled++;
    socket.close();
  });
  const { port } = server.address() as AddressInfo;
  return { url: `ws://127.0.0.1:${port}/ws`, dialled: () => dialled };
}

test('the stop button and Esc keep the partial text', async (t) => {
  const page = await openPage(t);
  for (const stop of [() => page.click('#send'), () => page.keyboard.press('Escape')]) {
    await ask(page, `Repeat: ${LONG}`);
    await waitForText(page, 60);
    await stop();
    await waitForStatus(page, 'cancelled');
    const text = await lastAnswer(page);
    assert.ok(text.length < LONG_ANSWER.length && LONG_ANSWER.startsWith(text));
    assert.equal(await page.locator('.turn').last().locator('.turn-state').textContent(), 'Stopped');
    assert.equal(await page.evaluate(() => document.activeElement?.id), 'question');
  }
});

test('hostile text in question and answer is shown, not run', async (t) => {
  const page = await openPage(t);
  const dialogs: string[] = [];
  page.on('dialog', (dialog) => {
    dialogs.push(dialog.message());
    void dialog.dismiss();
  });
  const hostile =
    '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script> [click](javascript:window.hacked=3) ' +
    '[data](data:text/html,x) <a href="javascript:alert(4)">x</a> **bold** [fine](https://example.com/a_b_c) `<b>`';
  await ask(page, `Repeat: ${hostile}`);
  await waitForStatus(page, 'done');
  assert.equal(await page.locator('.bubble').textContent(), `You: Repeat: ${hostile}`);
  const answer = page.locator('.turn .prose');
  assert.match(await lastAnswer(page), /<img src=x onerror="window.hacked=1"><script>/);
  const links = await answer
    .locator('a')
    .evaluateAll((list) => list.map((link) => [link.getAttribute('href'), link.getAttribute('rel')]));
  assert.deepEqual(links, [['https://example.com/a_b_c', 'noopener noreferrer nofollow']]);
  assert.equal(await answer.locator('strong').textContent(), 'bold');
  assert.equal(await page.locator('.thread img, .thread script, .thread b').count(), 0);
  assert.equal(await page.evaluate(() => 'hacked' in window), false);
  assert.deepEqual(dialogs, []);
});

test('Markdown: blocks are built once, and hostile sizes stay quick', async (t) => {
  const page = await openPage(t);
  const result = await page.evaluate(async () => {
    const path = '/markdown.js';
    const { createMarkdownView } = await import(path);
    const text = [
      '# Title',
      'One *two* **three** `four` snake_case_name 2 * 3 * 4',
      'second line',
      '',
      '- a',
      '- b',
      '  - c',
      '',
      '3. x',
      '',
      '```js',
      'if (a < b) **no**',
      '```',
      '> quoted',
      '',
      '---',
      'https://example.com/x?y=1).',
      '',
      'so',
      '| a | b |',
      '|---|--:|',
      '| `x` | ~~y~~ |',
      '',
      '1. z',
      '',
      '   w',
    ].join('\n');
    const box = document.createElement('div');
    const view = createMarkdownView(box);
    view.update(text.slice(0, 80));
    const first = box.firstElementChild;
    for (let end = 80; end <= text.length; end++) view.update(text.slice(0, end));
    const html = box.innerHTML;
    const kept = box.firstElementChild === first;
    const started = performance.now();
    const pieces = [
      '`',
      '*',
      '**a',
      'a**',
      '[',
      '[a](',
      '![[',
      '_a ',
      '>',
      '> ',
      '- ',
      '\\',
      'http://',
      '``` ',
      '# ',
      '|',
      ' ',
    ];
    for (const piece of pieces)
      createMarkdownView(document.createElement('div')).update(piece.repeat(40_000 / piece.length));
    const whole = document.createElement('div');
    createMarkdownView(whole).update(text.replaceAll('\n', '\r\n'));
    view.update('Something *else*');
    return {
      html,
      kept,
      same: whole.innerHTML === html,
      anew: box.textContent,
      ms: performance.now() - started,
    };
  });
  assert.ok(result.kept);
  assert.equal(
    result.html.replace(/<div class="code-head">.*?<\/div>/, '').replace(/ dir="\w+"/g, ''),
    '<h3>Title</h3><p>One <em>two</em> <strong>three</strong> <code>four</code> snake_case_name 2 * 3 * 4<br>second line</p>' +
      '<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol start="3"><li>x</li></ol>' +
      '<div class="code"><pre tabindex="0"><code>if (a &lt; b) **no**</code></pre></div>' +
      '<blockquote><p>quoted</p></blockquote><hr>' +
      '<p><a href="https://example.com/x?y=1" target="_blank" rel="noopener noreferrer nofollow">https://example.com/x?y=1</a>).</p>' +
      '<p>so</p><div class="table" tabindex="0"><table><thead><tr><th>a</th><th style="text-align: right;">b</th></tr></thead>' +
      '<tbody><tr><td><code>x</code></td><td style="text-align: right;"><s>y</s></td></tr></tbody></table></div>' +
      '<ol><li><p>z</p><p>w</p></li></ol>',
  );
  assert.ok(result.same, 'read at once it looks the same');
  assert.equal(result.anew, 'Something else');
  assert.ok(result.ms < 5_000, `${Math.round(result.ms)} ms`);
});

test('Markdown: what streamed looks like what is read at once, and blocks far above stay', async (t) => {
  const page = await openPage(t);
  const texts = [
    ['[1]: https://exa', 'mple.com/page\n\n[the page][1]'],
    ['[the page][1]\n\none\n\ntwo\n\nthree\n\n', '[1]: https://exa', 'mple.com/page'],
    ['1. a\n\n2', '.', ' b\n\n3', '. c'],
    ['[1]: https://a.example\n\none\n\ntwo\n\nthree\n\n', '[1]: https://b.example\n\n[x][1]'],
  ];
  const shown = await page.evaluate(async (list) => {
    const path = '/markdown.js';
    const { createMarkdownView } = await import(path);
    return list.map((pieces) => {
      const [box, whole] = [document.createElement('div'), document.createElement('div')];
      const view = createMarkdownView(box);
      for (const end of pieces.keys()) view.update(pieces.slice(0, end + 1).join(''));
      const [streamed, first] = [box.innerHTML, box.firstElementChild];
      view.update(pieces.join(''), true);
      createMarkdownView(whole).update(pieces.join(''), true);
      return {
        streamed: streamed === whole.innerHTML,
        ended: box.innerHTML === whole.innerHTML,
        kept: box.firstElementChild === first,
        links: Array.from(box.querySelectorAll('a'), (link) => link.href),
        lists: box.querySelectorAll('ol').length,
      };
    });
  }, texts);
  const like = { streamed: true, ended: true, kept: true, links: [] as string[], lists: 0 };
  assert.deepEqual(shown, [
    { ...like, links: ['https://example.com/page'] },
    // A definition that far below its use waits for the end.
    { ...like, streamed: false, kept: false, links: ['https://example.com/page'] },
    { ...like, lists: 1 },
    { ...like, links: ['https://a.example/'] },
  ]);
});

test('an answer whose links are defined at its end has them once it is over', async (t) => {
  let say = (_frame: object) => {};
  const page = await openPage(t, {
    prepare: answerInstead(['chat'], (toPage) => {
      say = toPage;
      say({ type: 'accepted', position: 0, duplicate: false });
      say({ type: 'start', id: '1-0', attempt: 1 });
      say({ type: 'token', id: '1-1', text: above });
    }),
  });
  const above = '[the page][1]\n\none\n\ntwo\n\nthree\n\n';
  const below = '[1]: https://example.com/page';
  await ask(page, 'Where is it?');
  await waitForText(page, 10);
  say({ type: 'token', id: '1-2', text: below });
  say({ type: 'done', id: '1-3', finishReason: 'stop', length: above.length + below.length });
  await page.locator('.prose a[href="https://example.com/page"]', { hasText: /^the page$/ }).waitFor();
});

test('Markdown: a fence names its language, and backticks after backticks are inline code', async (t) => {
  const page = await openPage(t);
  const texts = [
    ['```  ts title\nlet a;\n```', 'ts|let a;'],
    ['```\na', 'code|a'],
    ['~~~ c++ `x`\na\n~~~', 'c++|a'],
    ['````\n```\n````', 'code|```'],
    ['``` a ` b', 'p'],
    ['```a```', 'p'],
    ['[x](ftp://example.com) [y](//example.com)', 'p'],
  ];
  const shown = await page.evaluate(async (list) => {
    const path = '/markdown.js';
    const { createMarkdownView } = await import(path);
    return list.map(([text]) => {
      const box = document.createElement('div');
      createMarkdownView(box).update(text);
      const name = box.querySelector('.code-head span')?.textContent;
      const links = box.querySelectorAll('a').length;
      return name
        ? `${name}|${box.querySelector('pre')!.textContent}`
        : box.firstElementChild!.localName + (links || '');
    });
  }, texts);
  assert.deepEqual(
    shown,
    texts.map(([, wanted]) => wanted),
  );
});

test('two tabs of one user: both follow the answer', async (t) => {
  const one = await openPage(t);
  const two = await one.context().newPage();
  await two.goto(one.url());
  await two.waitForSelector('#connection[data-state=ready]');
  await ask(one, `Repeat: ${LONG}`);
  await waitForText(one, 60);
  await two.click('.list-item');
  const seen = await waitForText(two, 80);
  assert.ok(LONG_ANSWER.startsWith(seen) && seen.length < LONG_ANSWER.length);
  await Promise.all([waitForStatus(one, 'done'), waitForStatus(two, 'done')]);
  assert.equal(await lastAnswer(two), LONG_ANSWER);
  await one.hover('.list-row');
  await one.click('.list-remove');
  await two.waitForSelector('#welcome', { state: 'visible' });
  await one.click('.toast button');
  await one.waitForSelector('.turn');
  assert.equal(await lastAnswer(one), LONG_ANSWER, 'undo brings it back');
});

test('an answer that streams in another tab takes no click: the rows of the list stay', async (t) => {
  const one = await openPage(t);
  await ask(one, 'What is 6 * 7?');
  await waitForStatus(one, 'done');
  const two = await one.context().newPage();
  await two.goto(one.url());
  await two.waitForSelector('#connection[data-state=ready]');
  await one.click('#new-chat');
  await ask(one, `Repeat: ${LONG}`);
  await waitForText(one, 20);
  await two.waitForSelector('.list-item .list-busy');
  await two.hover('.list-item:has-text("6 * 7")');
  await two.mouse.down();
  await two.evaluate(async () => {
    for (let saves = 0; saves < 2; saves++)
      await new Promise((resolve) => addEventListener('storage', resolve, { once: true }));
  });
  await two.mouse.up();
  await two.waitForSelector('.turn[data-status=done]');
  assert.match(await lastAnswer(two), /42/);
  await waitForStatus(one, 'done');
  await two.waitForSelector('#conversations:not(:has(.list-busy))');
});

test('stopped in one tab, asked again in another: the new answer can be stopped in both', async (t) => {
  const one = await openPage(t);
  const two = await one.context().newPage();
  await two.goto(one.url());
  await two.waitForSelector('#connection[data-state=ready]');
  await ask(one, `Repeat: ${LONG}`);
  await two.click('.list-item');
  await waitForText(two, 60);
  await two.click('#send');
  await Promise.all([waitForStatus(one, 'cancelled'), waitForStatus(two, 'cancelled')]);
  await one.click('.turn-actions button:last-child');
  await Promise.all([waitForText(one, 40), waitForText(two, 40)]);
  assert.doesNotMatch((await two.textContent('.turn-state')) ?? '', /Stopping/);
  await two.reload();
  await waitForText(two, 40);
  assert.ok(await two.isEnabled('#send'));
  await two.click('#send');
  await Promise.all([waitForStatus(one, 'cancelled'), waitForStatus(two, 'cancelled')]);
});

test('a worker killed in the middle: the answer starts over, the end is right', async (t) => {
  const page = await openPage(t);
  await ask(page, `Repeat: ${LONG}`);
  await waitForText(page, 100);
  await Promise.all([stack.workers.at(-1)!.kill(), stack.addWorker()]);
  await waitForStatus(page, 'done');
  assert.equal(await lastAnswer(page), LONG_ANSWER);
});

test('no worker: it waits in line and says so; the live view shows it; then it is answered', async (t) => {
  await stack.workers.at(-1)!.kill('SIGTERM');
  const page = await openPage(t);
  await page.waitForSelector('#no-workers', { state: 'visible' });
  try {
    await ask(page, 'What is 6 * 7?');
    await page.locator('.turn-state', { hasText: 'Next in line' }).waitFor();
    const card = page.locator('#nodes .card', { hasText: 'n1' });
    await card.locator('.stat', { hasText: 'waiting' }).locator('dd', { hasText: '1' }).waitFor();
  } finally {
    await stack.addWorker();
  }
  await waitForStatus(page, 'done');
  assert.match(await lastAnswer(page), /42/);
});

test('narrow and dark: nothing sticks out, drawers open and close', async (t) => {
  const page = await openPage(t, {
    context: { viewport: { width: 360, height: 740 }, colorScheme: 'dark', isMobile: true, hasTouch: true },
  });
  await ask(page, `Repeat: ${'longword'.repeat(30)}`);
  await waitForStatus(page, 'done');
  const fits = () => page.evaluate(() => document.documentElement.scrollWidth <= window.innerWidth);
  assert.ok(await fits());
  const shot = await page.screenshot();
  assert.ok(shot.length > 10_000, 'something is drawn');
  const [background] = await page.evaluate(() => [getComputedStyle(document.body).backgroundColor]);
  assert.equal(background, 'rgb(15, 20, 22)');
  await page.tap('#open-sidebar');
  await page.waitForSelector('.list-item', { state: 'visible' });
  await page.keyboard.press('Escape');
  await page.waitForSelector('.list-item', { state: 'hidden' });
  await page.tap('#toggle-pipeline');
  await page.waitForSelector('#nodes .card', { state: 'visible' });
  assert.ok(await fits());
  await page.tap('#close-pipeline');
  await page.waitForSelector('#nodes', { state: 'hidden' });
});

test('a drawer over the page takes the keyboard with it, also beside a sidebar that stays', async (t) => {
  const page = await openPage(t, { context: { viewport: { width: 1000, height: 800 } } });
  await page.click('#toggle-pipeline');
  await page.waitForSelector('#scrim', { state: 'visible' });
  for (let presses = 0; presses < 12; presses++) {
    await page.keyboard.press('Tab');
    assert.ok(await page.evaluate(() => !document.activeElement?.closest('#chat, #sidebar')));
  }
  await page.keyboard.press('Escape');
  assert.equal(await page.evaluate(() => document.activeElement?.id), 'toggle-pipeline');
  await page.click('#user');
});

test('the list of conversations keeps the keyboard, also when a row goes or an answer elsewhere ends', async (t) => {
  const page = await openPage(t);
  for (const question of ['Repeat: one', 'Repeat: two', `Repeat: ${LONG}`]) {
    await page.click('#new-chat');
    await ask(page, question);
    if (question.length < 20) await waitForStatus(page, 'done');
  }
  const focused = () =>
    page.evaluate(() => {
      const { activeElement } = document;
      return `${activeElement?.className} ${activeElement?.closest('li')?.textContent ?? activeElement?.id}`;
    });
  await waitForText(page, 10);
  await page.locator('.list-row .list-remove').nth(1).focus();
  assert.match(await focused(), /list-remove Repeat: two/);
  await waitForStatus(page, 'done');
  assert.match(await focused(), /list-remove Repeat: two/);
  await page.keyboard.press('Enter');
  assert.match(await focused(), /list-remove Repeat: one/, 'the next one');
  await page.keyboard.press('Enter');
  assert.match(await focused(), /list-remove Repeat: w1/, 'the last one');
});

test('Enter beside a running answer says why nothing is sent, Esc that ends a composition stops nothing, a draft stays', async (t) => {
  const page = await openPage(t);
  await ask(page, `Repeat: ${LONG}`);
  await waitForText(page, 20);
  await ask(page, 'and then?');
  await page.locator('.toast', { hasText: 'One answer at a time' }).waitFor();
  await page.dispatchEvent('#question', 'keydown', { key: 'Escape', isComposing: true });
  await waitForText(page, 100);
  assert.equal(await page.locator('.turn').getAttribute('data-status'), 'running');
  await page.reload();
  assert.equal(await page.inputValue('#question'), 'and then?');
  await waitForStatus(page, 'done');
  await page.press('#question', 'Enter');
  await waitForStatus(page, 'done');
  await page.reload();
  assert.equal(await page.inputValue('#question'), '');
});

test('Enter that confirms a composition sends nothing, also where the composition has ended before the key', async (t) => {
  const page = await openPage(t);
  await page.fill('#question', 'にほんご');
  const press = (init: object) => page.dispatchEvent('#question', 'keydown', { key: 'Enter', ...init });
  await press({ isComposing: true, keyCode: 229 });
  await press({ keyCode: 229 }); // as in Safari
  assert.equal(await page.inputValue('#question'), 'にほんご');
  assert.equal(await page.locator('.turn').count(), 0);
  await press({ keyCode: 13 });
  await page.waitForSelector('.turn');
});

test('offline is said at once, and a gateway that cannot be reached after four seconds', async (t) => {
  const gateway = await stack.addGateway({ node: 'alone' });
  const page = await openPage(t, {
    gateway,
    allow: /Failed to load|ERR_|WebSocket|CORS/,
    prepare: async (blank) => {
      await blank.route('**/pipeline', (route) => route.fulfill({ status: 503, body: '' }));
    },
  });
  await page.context().setOffline(true);
  await page.locator('#connection', { hasText: /^Offline$/ }).waitFor({ timeout: 1_000 });
  await page.context().setOffline(false);
  await page.locator('#connection', { hasText: 'Connected' }).waitFor();
  await gateway.kill();
  const started = performance.now();
  await page.locator('#banner', { hasText: 'cannot be reached' }).waitFor();
  const ms = performance.now() - started;
  assert.ok(ms > 3_500 && ms < 5_500, `${Math.round(ms)} ms`);
});

test('the live view of a gateway without Redis is away for a while, not missing', async (t) => {
  let isAway = true;
  const page = await openPage(t, {
    allow: /503/,
    prepare: async (blank) => {
      await blank.route('**/pipeline', (route) =>
        isAway ? route.fulfill({ status: 503, json: { error: { code: 'unavailable' } } }) : route.continue(),
      );
    },
  });
  await page.locator('#pipeline-note', { hasText: 'cannot be reached right now' }).waitFor();
  isAway = false;
  await page.waitForSelector('#pipeline-live[data-state=live]');
});

test('right to left: questions, answers and titles find their own direction, code stays', async (t) => {
  const page = await openPage(t);
  const hebrew = [
    'שלום עולם',
    '# כותרת',
    '',
    'פסקה עם `npm start` באמצע.',
    '',
    '- ראשון',
    '- שני',
    '',
    '> ציטוט',
    '',
    'In English.',
    '',
    '```js',
    "const greeting = 'שלום';",
    '```',
  ].join('\n');
  await page.fill('#question', hebrew);
  const direction = (selector: string) =>
    page
      .locator(selector)
      .last()
      .evaluate((element) => {
        const { direction, textAlign } = getComputedStyle(element);
        return `${direction} ${textAlign}`;
      });
  assert.equal(await direction('#question'), 'rtl start');
  await page.evaluate(async () => {
    const path = '/markdown.js';
    const { createMarkdownView } = await import(path);
    const box = document.createElement('div');
    box.className = 'prose';
    document.getElementById('thread')!.append(box);
    createMarkdownView(box).update((document.getElementById('question') as HTMLTextAreaElement).value);
  });
  const blocks = ['p:first-child', 'h3', 'ul', 'blockquote'].map((block) => `#thread > .prose > ${block}`);
  for (const rtl of blocks) assert.equal(await direction(rtl), 'rtl start', rtl);
  for (const ltr of ['p:has(+ .code)', '.code pre', 'p > code'])
    assert.equal(await direction(`#thread > .prose ${ltr}`), 'ltr start', ltr);
  await page.press('#question', 'Enter');
  await waitForStatus(page, 'done');
  for (const rtl of ['.bubble', '#title', '.list-item .list-text'])
    assert.equal(await direction(rtl), 'rtl start', rtl);
});

test('a long conversation: the page is no taller than its window, and the skip link only moves the focus', async (t) => {
  const page = await openPage(t);
  for (const question of ['one', 'two', 'three', 'four']) {
    await ask(page, `Repeat: ${`${question}\n`.repeat(30)}`);
    await waitForStatus(page, 'done');
  }
  for (const viewport of [
    { width: 1280, height: 800 },
    { width: 390, height: 844 },
  ]) {
    await page.setViewportSize(viewport);
    await page.reload();
    await page.waitForSelector('.turn:last-child[data-status=done]');
    const address = page.url();
    await page.focus('#skip');
    await page.keyboard.press('Enter');
    assert.deepEqual(
      await page.evaluate(() => ({
        focus: document.activeElement?.id,
        height: document.scrollingElement!.scrollHeight,
        scrolled: document.scrollingElement!.scrollTop,
      })),
      { focus: 'question', height: viewport.height, scrolled: 0 },
    );
    assert.equal(page.url(), address);
  }
});

test('a question above the limit of the gateway stays in the field, and the history is cut to what fits', async (t) => {
  const gateway = await stack.addGateway({ node: 'narrow', env: { MAX_FRAME_BYTES: '2000' } });
  const page = await openPage(t, { gateway });
  const long = '\u20ac'.repeat(650); // three bytes each
  await ask(page, long);
  await page.locator('.toast', { hasText: 'too long: at most 2,000 bytes' }).waitFor();
  assert.equal(await page.inputValue('#question'), long);
  assert.equal(await page.locator('.turn').count(), 0);
  await ask(page, `Repeat: ${'w'.repeat(900)}`);
  await waitForStatus(page, 'done');
  await ask(page, 'What is 6 * 7?');
  await waitForStatus(page, 'done');
  assert.match(await lastAnswer(page), /42/);
  await page.context().close(); // before its gateway: else it complains of a server that is gone
  await gateway.kill();
});

test('a question that was asked before the gateway named its limit: it says so, and the conversation goes on', async (t) => {
  const gateway = await stack.addGateway({ node: 'late', env: { MAX_FRAME_BYTES: '2000' } });
  let letIn = () => {};
  const mayConnect = new Promise<void>((resolve) => {
    letIn = resolve;
  });
  const page = await openPage(t, {
    gateway,
    connection: 'connecting',
    prepare: (blank) =>
      blank.routeWebSocket(/\/ws/, async (socket) => {
        await mayConnect;
        socket.connectToServer();
      }),
  });
  await ask(page, 'long '.repeat(500));
  letIn();
  await waitForStatus(page, 'failed');
  assert.equal(await page.textContent('.turn-state'), 'This message is too long.');
  await ask(page, 'What is 6 * 7?');
  await waitForStatus(page, 'done');
  assert.match(await lastAnswer(page), /42/);
  await page.context().close(); // before its gateway: else it complains of a server that is gone
  await gateway.kill();
});

test('a full storage: the oldest conversations make room, but none for what they cannot make room for', async (t) => {
  const page = await openPage(t);
  const lengths = [...Array<number>(40).fill(100_000), 6_000_000, 1_500_000, 1_500_000];
  const looks = await page.evaluate(async (sizes) => {
    const path = '/conversations.js';
    const { createConversationStore } = await import(path);
    const store = createConversationStore('full', () => {});
    const { setItem } = Storage.prototype;
    const ids: string[] = [];
    const seen: boolean[][] = [];
    for (const size of sizes) {
      const conversation = store.create();
      store.addTurn(conversation, 'x'.repeat(size));
      conversation.updatedAt = ids.push(conversation.id);
      if (ids.length === 42)
        Storage.prototype.setItem = function (key, value) {
          if (value.length > size) throw new DOMException('full', 'QuotaExceededError');
          setItem.call(this, key, value);
        };
      store.save(conversation);
      Storage.prototype.setItem = setItem;
      const keys = Object.keys(localStorage);
      seen.push([
        ...ids.map((id) => keys.some((key) => key.endsWith(id))),
        store.list().length === ids.length,
      ]);
    }
    return seen.slice(-3);
  }, lengths);
  const [afterHuge, afterFailure, afterLarge] = looks;
  const all = Array<boolean>(40).fill(true);
  assert.deepEqual(afterHuge, [...all, false, true]);
  assert.deepEqual(afterFailure, [...all, false, false, true], 'what was dropped in vain is put back');
  const dropped = afterLarge!.indexOf(true);
  assert.ok(dropped > 0 && dropped < 10, `${dropped} were dropped`);
  assert.deepEqual(afterLarge, [...all.fill(false, 0, dropped), false, false, true, false], 'the oldest');
});

test('a long paste is there at once, in the direction of its first letter', async (t) => {
  const page = await openPage(t, { context: { permissions: ['clipboard-read', 'clipboard-write'] } });
  for (const [word, direction] of [
    ['word ', 'ltr'],
    ['... \u05e9\u05dc\u05d5\u05dd ', 'rtl'],
  ] as const) {
    const text = word.repeat(direction === 'ltr' ? 200_000 : 2_000);
    await page.evaluate((copied) => navigator.clipboard.writeText(copied), text);
    const started = performance.now();
    await page.press('#question', 'Control+v');
    await page.evaluate(() => new Promise((resolve) => requestAnimationFrame(resolve)));
    const ms = performance.now() - started;
    assert.ok(ms < 6_000, `${Math.round(ms)} ms`);
    assert.equal(await page.getAttribute('#question', 'dir'), direction);
    assert.equal(
      await page.evaluate(() => (document.getElementById('question') as HTMLTextAreaElement).value.length),
      text.length,
    );
    await page.fill('#question', '');
    assert.equal(await page.getAttribute('#question', 'dir'), 'auto');
  }
});

test('not checked for the moment: a question and a message say to try again, not that they are forbidden', async (t) => {
  const page = await openPage(t, {
    prepare: answerInstead(['chat', 'send'], (say) =>
      say({
        type: 'rejected',
        code: 'content_refused',
        message: 'Moderation cannot be reached.',
        temporary: true,
        retryAfterMs: 20,
      }),
    ),
  });
  await ask(page, 'a question');
  await waitForStatus(page, 'failed');
  assert.match((await page.textContent('.turn-state')) ?? '', /could not be checked.*try again/i);
  await page.waitForSelector('.turn-actions button:has-text("Try again")');
  await page.click('#add-person');
  await page.fill('#add-input', 'ben');
  await page.keyboard.press('Enter');
  await ask(page, 'a message');
  await page.locator('#messages', { hasText: /Not sent: .*could not be checked.*try again/i }).waitFor();
});

test('an answer that the content filter cut off, or kept back, does not look whole', async (t) => {
  const page = await openPage(t, {
    prepare: answerInstead(['chat'], (say, text) => {
      say({ type: 'accepted', position: 0, duplicate: false });
      say({ type: 'start', id: '1-0', attempt: 1 });
      if (text !== 'nothing') say({ type: 'token', id: '1-1', text });
      say({
        type: 'done',
        id: `1-${text === 'nothing' ? 1 : 2}`,
        finishReason: 'content_filter',
        length: text === 'nothing' ? 0 : text.length,
      });
    }),
  });
  for (const [question, note] of [
    ['something', 'Cut off by the content filter of the model'],
    ['nothing', 'Kept back by the content filter of the model'],
  ] as const) {
    await ask(page, question);
    await page.locator('.turn:last-child .turn-state', { hasText: note }).waitFor();
  }
});

test('another name: checked, remembered, with its own conversations', async (t) => {
  const page = await openPage(t);
  await ask(page, 'What is 6 * 7?');
  await waitForStatus(page, 'done');
  await page.click('#user');
  for (const [name, fault] of [
    ['77', /reserved/],
    ['no spaces', /Letters/],
  ] as const) {
    await page.fill('#user-input', name);
    await page.keyboard.press('Enter');
    assert.match((await page.textContent('#user-error')) ?? '', fault);
  }
  await page.fill('#user-input', 'someone.else');
  await page.keyboard.press('Enter');
  await page.waitForSelector('#connection[data-state=ready]');
  assert.equal(await page.textContent('#user-name'), 'someone.else');
  assert.equal(await page.locator('.list-item').count(), 0);
  assert.match(page.url(), /userId=someone\.else/);
});

function signIn(sub: string, secret: string): string {
  const encode = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url');
  const unsigned = `${encode({ alg: 'HS256', typ: 'JWT' })}.${encode({ sub, exp: 4_102_444_800 })}`;
  return `${unsigned}.${createHmac('sha256', secret).update(unsigned).digest('base64url')}`;
}

test('where sign-in is asked for: a stranger is told, the live view is off, a token lets in', async (t) => {
  const secret = 'a secret of thirty-two characters!';
  const gateway = await stack.addGateway({ node: 'signed', env: { AUTH: 'jwt', JWT_SECRET: secret } });
  const page = await openPage(t, { gateway, connection: 'off', allow: /401/ });
  await page.locator('#banner', { hasText: 'You are not signed in: a token is required.' }).waitFor();
  await page.waitForSelector('body:not(.pipeline-open)');
  let looks = 0;
  page.on('request', (request) => {
    if (request.url().endsWith('/pipeline')) looks++;
  });
  await page.click('#toggle-pipeline');
  await page.locator('#pipeline-note', { hasText: 'off for this user' }).waitFor();
  await page.goto(`${gateway.http}/?userId=ann&token=${signIn('ann', secret)}`);
  await page.waitForSelector('#connection[data-state=ready]');
  assert.equal(new URL(page.url()).search, '?userId=ann', 'the token leaves the address bar');
  assert.ok(await page.isDisabled('#user'), 'a name comes with its token');
  await page.waitForTimeout(2_500);
  assert.ok(looks <= 2, `the live view was asked for ${looks} times`);
  await page.goto(`${gateway.http}/?userId=ben`);
  await page.locator('#banner', { hasText: 'not accepted: the token belongs to another user.' }).waitFor();
});

test('signed in, without a load balancer: the page moves when its gateway is killed', async (t) => {
  const env = { AUTH: 'jwt', JWT_SECRET: 'a secret of thirty-two characters!' };
  const [doomed, spare] = [
    await stack.addGateway({ node: 'signed-1', env }),
    await stack.addGateway({ node: 'signed-2', env }),
  ];
  const authorization = `Bearer ${signIn('eve', env.JWT_SECRET)}`;
  const [stranger, proxied] = [
    await fetch(`${spare.http}/nodes`),
    await askBehindProxy(spare, authorization),
  ];
  assert.equal(stranger.status, 401);
  assert.deepEqual(proxied, { urls: [] });
  const page = await openPage(t, {
    gateway: doomed,
    user: `eve&token=${signIn('eve', env.JWT_SECRET)}`,
    allow: /Failed to load|ERR_|WebSocket|CORS|401/,
  });
  await page.waitForResponse((response) => response.url().endsWith('/nodes'));
  await doomed.kill();
  await page.locator('#connection', { hasText: /signed-2|n1/ }).waitFor();
});

/** What a gateway tells through a load balancer, which keeps the name that people dial. */
async function askBehindProxy(gateway: GatewayProcess, authorization: string): Promise<unknown> {
  const headers = { authorization, host: 'chat.example' };
  const [answer] = await once(get(`${gateway.http}/nodes`, { headers }), 'response');
  return JSON.parse((await answer.toArray()).join(''));
}
