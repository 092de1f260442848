import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import { after, before, type TestContext, test } from 'node:test';
import { type Browser, type BrowserContext, chromium, type Page } from 'playwright-core';
import { eventually } from '../helpers/eventually.ts';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** People in the page: browsers (contexts) of several users on two nodes of a real stack. */

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
const API_KEY = 'a-key-of-the-test-long-enough-for-it';
const CONNECTION_LOST = /Failed to load|ERR_|WebSocket|CORS/;

let stack: Stack;
let browser: Browser;
let n1: GatewayProcess;
let n2: GatewayProcess;

before(async () => {
  [stack, browser] = await Promise.all([
    startStack(null, {
      gateways: 2,
      workers: 0,
      env: { ALLOWED_ORIGINS: '*', API_KEYS: API_KEY, INBOX_MESSAGES: '30' },
    }),
    chromium.launch({ executablePath: findChromium(), args: CHROMIUM_ARGS }),
  ]);
  [n1, n2] = stack.gateways as [GatewayProcess, GatewayProcess];
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

let counter = 0;
const nextUser = (name: string) => `${name}-${++counter}`;

/** A browser of its own: storage, and so its device, outlives its pages. Complaints of a page fail the test. */
async function openBrowser(t: TestContext, { allow }: { allow?: RegExp } = {}): Promise<BrowserContext> {
  const context = await browser.newContext({ viewport: { width: 1360, height: 860 } });
  context.setDefaultTimeout(WAIT_MS);
  const complaints: string[] = [];
  context.on('weberror', (error) => complaints.push(String(error.error().stack)));
  context.on('console', (message) => {
    if (message.type() !== 'error' && message.type() !== 'warning') return;
    if (!allow?.test(message.text())) complaints.push(message.text());
  });
  t.after(async () => {
    await context.close();
    assert.deepEqual(complaints, []);
  });
  return context;
}

async function openPage(context: BrowserContext, user: string, gateway: GatewayProcess): Promise<Page> {
  const page = await context.newPage();
  await page.goto(`${gateway.http}/?userId=${user}`);
  await page.waitForSelector('#connection[data-state=ready]');
  return page;
}

async function add(page: Page, name: string, kind: 'user' | 'group' = 'user'): Promise<void> {
  await page.click('#add-person');
  await page.check(`#add-form input[value=${kind}]`, { force: true });
  await page.fill('#add-input', name);
  await page.keyboard.press('Enter');
}

const row = (page: Page, name: string) =>
  page.locator('#people .list-row', { has: page.locator('bdi', { hasText: new RegExp(`^${name}$`) }) });
const openThread = (page: Page, name: string) => row(page, name).locator('.list-item').click();
const title = (page: Page, name: string) => page.locator('#title', { hasText: name }).waitFor();

async function say(page: Page, text: string): Promise<void> {
  await page.fill('#question', text);
  await page.press('#question', 'Enter');
}

/** What the thread on screen says, as soon as it says so many things. */
async function texts(page: Page, count: number): Promise<string[]> {
  await page
    .locator('.message-text')
    .nth(count - 1)
    .waitFor();
  return page.locator('.message-text').allTextContents();
}

const allSent = (page: Page, count: number) =>
  eventually(
    `${count} messages sent`,
    async () => (await page.locator('.message[data-status=sent]').count()) === count,
  );

const callApi = async (body: object) => {
  const response = await fetch(`${n1.http}/v1/messages`, {
    method: 'POST',
    headers: { authorization: `Bearer ${API_KEY}`, 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });
  assert.equal(response.status, 202);
};

test('a direct message, live, both ways, across nodes; unread count and presence', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const one = await openPage(await openBrowser(t), ann, n1);
  await add(one, ann);
  assert.equal(await one.textContent('#add-error'), 'That is you.');
  await one.keyboard.press('Escape');
  await add(one, ben);
  await title(one, ben);
  await row(one, ben).locator('.presence[data-online=false]').waitFor();

  const two = await openPage(await openBrowser(t), ben, n2);
  await say(one, 'hello\nfrom n1');
  await allSent(one, 1);
  await row(one, ben).locator('.presence[data-online=true]').waitFor();
  await row(two, ann).locator('.badge', { hasText: '1' }).waitFor();
  assert.equal(await two.title(), '(1) Rivulet');
  await say(one, 'are you there?');
  await row(two, ann).locator('.badge', { hasText: '2' }).waitFor();
  await row(two, ann).locator('.presence[data-online=true]').waitFor();

  await openThread(two, ann);
  assert.deepEqual(await texts(two, 2), ['hello\nfrom n1', 'are you there?']);
  await two.locator('.day.new', { hasText: 'New' }).waitFor();
  await row(two, ann).locator('.badge').waitFor({ state: 'detached' });
  assert.equal(await two.title(), `${ann} · Rivulet`);
  await say(two, 'yes');
  assert.deepEqual(await texts(one, 3), ['hello\nfrom n1', 'are you there?', 'yes']);
  assert.equal(await row(one, ben).locator('.badge').count(), 0, 'it is on screen: read');
  assert.match((await one.textContent('#announcer')) ?? '', /yes$/);

  // The assistant's draft and the person's are two.
  await one.fill('#question', 'half a sentence to ben');
  await one.click('#new-chat');
  assert.equal(await one.inputValue('#question'), '');
  await openThread(one, ben);
  assert.equal(await one.inputValue('#question'), 'half a sentence to ben');
});

test('away and back: what waited in the inbox comes once, survives reloads, and is acknowledged', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const context = await openBrowser(t);
  const first = await openPage(context, ben, n2);
  await first.close();
  const sender = await openPage(await openBrowser(t), ann, n1);
  await add(sender, ben);
  for (const text of ['one', 'two', 'three']) await say(sender, text);
  await allSent(sender, 3);

  const page = await openPage(context, ben, n2);
  await row(page, ann).locator('.badge', { hasText: '3' }).waitFor();
  await openThread(page, ann);
  assert.deepEqual(await texts(page, 3), ['one', 'two', 'three']);
  await eventually('cursor of the one device at the end', async () => {
    const [entry] = await stack.look.client.xrevrange(stack.keys.inbox(ben), '+', '-', 'COUNT', 1);
    const cursors = await stack.look.client.hgetall(stack.keys.cursors(ben));
    const devices = Object.keys(cursors).filter((field) => field.startsWith('d:'));
    return devices.length === 1 && cursors[devices[0]!] === entry![0];
  });
  await page.reload();
  await title(page, ann);
  assert.deepEqual(await texts(page, 3), ['one', 'two', 'three']);
  await say(sender, 'four');
  assert.deepEqual(await texts(page, 4), ['one', 'two', 'three', 'four']);
  await page.reload();
  await page.waitForSelector('#connection[data-state=ready]');
  assert.deepEqual(await texts(page, 4), ['one', 'two', 'three', 'four']);
  assert.equal(await row(page, ann).locator('.badge').count(), 0);

  // Another browser is another device: it gets everything, too.
  const other = await openPage(await openBrowser(t), ben, n1);
  await row(other, ann).locator('.badge', { hasText: '4' }).waitFor();
});

test('groups: join by name, write, see who is there, leave, come back by Undo', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const group = nextUser('team');
  const one = await openPage(await openBrowser(t), ann, n1);
  const two = await openPage(await openBrowser(t), ben, n2);
  await add(one, 'no spaces', 'group');
  await one.locator('#add-error', { hasText: 'Letters, digits' }).waitFor();
  await one.keyboard.press('Escape');
  await add(one, group, 'group');
  await title(one, group);
  await one.locator('#detail', { hasText: 'Only you so far' }).waitFor();
  await add(two, group, 'group');
  await title(two, group);
  await say(two, 'hello group');
  assert.deepEqual(await texts(one, 1), ['hello group']);
  assert.equal(await one.locator('.message-from').textContent(), ben);
  await one.locator('#detail', { hasText: '2 members, 1 online' }).waitFor();
  await say(one, 'hello back');
  assert.deepEqual(await texts(two, 2), ['hello group', 'hello back']);

  await one.click('#open-members');
  await one.locator('.member', { hasText: ben }).locator('button').click();
  await title(one, ben);
  await openThread(one, group);
  await one.click('#open-members');
  await one.click('#members-leave');
  await row(one, group).waitFor({ state: 'detached' });
  await one.locator('.toast', { hasText: 'You left' }).waitFor();
  await eventually('leave', async () => {
    const members = await stack.look.client.smembers(stack.keys.group(group));
    return members.join() === ben;
  });
  await one.click('.toast button');
  await title(one, group);
  assert.deepEqual(await texts(one, 2), ['hello group', 'hello back']);

  // Taken out by somebody else: what is written is refused and says so; the door back is shown.
  await stack.look.client.srem(stack.keys.group(group), ann);
  await stack.look.client.srem(stack.keys.groups(ann), group);
  await say(one, 'am I still here?');
  await one.locator('.message[data-status=failed] .message-meta', { hasText: 'may not write' }).waitFor();
  await one.locator('#dock-note', { hasText: 'not in this group' }).waitFor();
  await one.click('#dock-note button');
  await one.waitForSelector('#composer', { state: 'visible' });
  await one.locator('.message-meta button', { hasText: 'Try again' }).click();
  assert.deepEqual((await texts(two, 3)).at(-1), 'am I still here?');
  await allSent(one, 2);
});

test('where groups are closed, the dialog says so', async (t) => {
  const closed = await stack.addGateway({ node: 'closed', env: { GROUP_JOINS: 'closed' } });
  const page = await openPage(await openBrowser(t), nextUser('ann'), closed);
  await add(page, 'any', 'group');
  await page.locator('#add-error', { hasText: 'managed by the operators' }).waitFor();
  await page.keyboard.press('Escape');
  assert.equal(await page.locator('#people .list-row').count(), 0);
  await page.close(); // it would look for its gateway, and complain
  await closed.kill('SIGTERM');
});

test('bare links: brackets that belong to them, and what ends them', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const page = await openPage(await openBrowser(t), ben, n2);
  const sender = await stack.client(ann, n1);
  const contents =
    'https://bare.example/path_(x), https://x.example/a_ (see http://127.0.0.1:80/b?c=1) "https://d.example/e". //f.example/g mailto:h@i.example';
  sender.send({ type: 'send', messageId: 'l1', to: { user: ben }, contents });
  await sender.next('sent', 'l1');
  await openThread(page, ann);
  assert.deepEqual(await texts(page, 1), [contents]);
  assert.deepEqual(await page.locator('.message-text a').allTextContents(), [
    'https://bare.example/path_(x)',
    'https://x.example/a_',
    'http://127.0.0.1:80/b?c=1',
    'https://d.example/e',
  ]);
});

test('hostile contents, notices and stored names are shown, not run', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const context = await openBrowser(t);
  const page = await openPage(context, ben, n2);
  const hostile =
    '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script> javascript:alert(3) <b>bold</b> ' +
    'https://example.com/"onmouseover="window.hacked=4 \u202Etxt.exe';
  const sender = await stack.client(ann, n1);
  sender.send({ type: 'send', messageId: 'x1', to: { user: ben }, contents: hostile });
  await sender.next('sent', 'x1');
  await openThread(page, ann);
  assert.deepEqual(await texts(page, 1), [hostile]);
  await callApi({ to: { all: true }, contents: hostile });
  await page.locator('.notice').waitFor();
  assert.equal(await page.locator('.notice-text').textContent(), hostile);
  const links = await page
    .locator('.message-text a')
    .evaluateAll((list) => list.map((link) => [link.getAttribute('href'), link.getAttribute('rel')]));
  const encoded = 'https://example.com/%22onmouseover=%22window.hacked=4';
  assert.deepEqual(links, [[encoded, 'noopener noreferrer nofollow']]);
  // A name as no server sends it, and entries of a wrong shape.
  await page.evaluate((user) => {
    const name = '<img src=x onerror=window.hacked=5>';
    const thread = { key: `u:${name}`, kind: 'user', name, messages: [] };
    localStorage.setItem(`rivulet:${user}:p:u:${name}`, JSON.stringify(thread));
    localStorage.setItem(
      `rivulet:${user}:p:u:other`,
      '{"key":"u:else","kind":"user","name":"else","messages":[]}',
    );
    localStorage.setItem(`rivulet:${user}:p:u:broken`, '{"key":"u:broken"');
  }, ben);
  await page.reload();
  await page.waitForSelector('#connection[data-state=ready]');
  await page.locator('#people bdi', { hasText: '<img src=x' }).waitFor();
  assert.equal(await page.locator('#people .list-row').count(), 2);
  assert.equal(await page.locator('main img, main script, main b, #people img').count(), 0);
  assert.equal(await page.evaluate(() => 'hacked' in window), false);
});

test('a gateway dies under a message: pending, then sent once, under the same messageId', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const doomed = await stack.addGateway({ node: 'doomed' });
  const one = await openPage(await openBrowser(t, { allow: CONNECTION_LOST }), ann, doomed);
  await one.waitForSelector('#nodes .card:nth-child(2)'); // it knows where else to go
  const two = await openPage(await openBrowser(t), ben, n2);
  await add(one, ben);
  await say(one, 'before');
  await allSent(one, 1);
  await doomed.kill('SIGSTOP');
  await say(one, 'during');
  await say(one, 'after');
  await one.locator('.message[data-status=pending]').nth(1).waitFor();
  await doomed.kill();
  await allSent(one, 3);
  await openThread(two, ann);
  assert.deepEqual(await texts(two, 3), ['before', 'during', 'after']);
  await one.locator('#connection-text', { hasText: /n1|n2/ }).waitFor();

  const stored = await one.evaluate(() => {
    const key = Object.keys(localStorage).find((name) => name.includes(':p:u:'))!;
    return JSON.parse(localStorage.getItem(key)!).messages.map(
      (message: { messageId: string }) => message.messageId,
    );
  });
  const inbox = await stack.look.client.xrange(stack.keys.inbox(ben), '-', '+');
  const ids = inbox.map(([, fields]) => JSON.parse(`{${fields[1]}`).messageId);
  assert.deepEqual(ids, stored);
});

test('written while nobody is there, then reloaded: the next page sends it', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const context = await openBrowser(t, { allow: CONNECTION_LOST });
  const page = await openPage(context, ann, n1);
  await add(page, ben);
  await context.routeWebSocket('**/ws*', (route) => {
    if (blocked) void route.close({ code: 4000 });
    else route.connectToServer();
  });
  let blocked = true;
  await page.reload();
  await title(page, ben);
  await say(page, 'kept');
  await page.locator('.message-meta', { hasText: 'Your message is kept' }).waitFor();
  await page.reload();
  await page.locator('.message[data-status=pending]').waitFor();
  blocked = false;
  await allSent(page, 1);
  const reader = await stack.client(ben, n2);
  assert.equal((await reader.next('message')).contents, 'kept');
});

test('two tabs of one user are in step: own messages, reading, removing', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const context = await openBrowser(t);
  const one = await openPage(context, ann, n1);
  const two = await openPage(context, ann, n1);
  const peer = await stack.client(ben, n2);
  await add(one, ben);
  await say(one, 'from the first tab');
  await peer.next('message');
  await openThread(two, ben);
  await allSent(two, 1);
  await say(two, 'from the second');
  await peer.next('message');
  assert.deepEqual(await texts(one, 2), ['from the first tab', 'from the second']);
  await one.click('#new-chat');
  await two.click('#new-chat');
  peer.send({ type: 'send', messageId: 'b1', to: { user: ann }, contents: 'back' });
  await peer.next('sent', 'b1');
  await row(one, ben).locator('.badge', { hasText: '1' }).waitFor();
  await row(two, ben).locator('.badge', { hasText: '1' }).waitFor();
  await openThread(one, ben);
  assert.equal((await texts(one, 3)).at(-1), 'back');
  await row(two, ben).locator('.badge').waitFor({ state: 'detached' });
  await row(one, ben).hover();
  await row(one, ben).locator('.list-remove').click();
  await row(two, ben).waitFor({ state: 'detached' });
  await one.click('.toast button');
  assert.equal((await texts(one, 3)).length, 3, 'undo brings it back');
  await row(two, ben).waitFor();
});

test('away for too long: older messages were dropped, and the page says so until it is dismissed', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('ben')];
  const context = await openBrowser(t);
  const sender = await stack.client(ann, n1);
  for (let index = 0; index < 33; index++) {
    sender.send({ type: 'send', messageId: `m${index}`, to: { user: ben }, contents: `message ${index}` });
    await sender.next('sent', `m${index}`);
  }
  const page = await openPage(context, ben, n2);
  await page.locator('.notice.dropped', { hasText: 'dropped' }).waitFor();
  await row(page, ann).locator('.badge', { hasText: '30' }).waitFor();
  await page.reload();
  await page.locator('.notice.dropped button').click();
  await page.reload();
  await page.waitForSelector('#connection[data-state=ready]');
  await openThread(page, ann);
  assert.equal((await texts(page, 30)).length, 30);
  const line = page.locator('.day.new');
  assert.ok((await line.boundingBox())!.y > 0, 'reading begins where it was left');
  await page.waitForSelector('#to-latest', { state: 'visible' });
  assert.equal(await page.locator('.message-text').last().textContent(), 'message 32');
  assert.equal(await page.locator('.notice').count(), 0);
});

test('from the server itself: a thread to read, a notice to dismiss', async (t) => {
  const ann = nextUser('ann');
  const page = await openPage(await openBrowser(t), ann, n2);
  await callApi({ to: { user: ann }, contents: 'Your order has shipped.' });
  await callApi({ to: { all: true }, contents: 'Maintenance at ten.' });
  await openThread(page, 'System');
  assert.deepEqual(await texts(page, 1), ['Your order has shipped.']);
  assert.ok(await page.locator('#composer').isHidden());
  await page.locator('.notice', { hasText: 'Maintenance at ten.' }).locator('button').click();
  await page.waitForSelector('#notices', { state: 'hidden' });
});

test('narrow: the list is behind the button, which tells of unread ones; nothing sticks out', async (t) => {
  const [ann, ben] = [nextUser('ann'), nextUser('b'.repeat(50))];
  const context = await browser.newContext({
    viewport: { width: 360, height: 740 },
    isMobile: true,
    hasTouch: true,
    colorScheme: 'dark',
  });
  context.setDefaultTimeout(WAIT_MS);
  t.after(() => context.close());
  const page = await openPage(context, ann, n1);
  const sender = await stack.client(ben, n2);
  sender.send({ type: 'send', messageId: 'x1', to: { user: ann }, contents: 'longword'.repeat(60) });
  await sender.next('sent', 'x1');
  await page.waitForSelector('#unread-dot', { state: 'visible' });
  assert.equal(await page.getAttribute('#open-sidebar', 'aria-label'), 'Conversations, 1 unread');
  await page.tap('#open-sidebar');
  await row(page, ben).locator('.list-item').tap();
  await texts(page, 1);
  await page.waitForSelector('#unread-dot', { state: 'hidden' });
  assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= window.innerWidth));
});
