import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { createFrameRates } from '../../gateway/rate-limits.ts';
import { Session, type SessionParts } from '../../gateway/session.ts';

const LETS_IN = {
  authenticate: async (userId: string) => ({ userId, expiresMs: null }),
  mailboxes: { open: async () => ({ mailbox: {}, opened: { state: 'bound', start() {} } }), close() {} },
};

test('a cancel that waits in line is carried out when the client leaves; what else waits is not', async () => {
  const called: string[] = [];
  let answer = (_: null) => {};
  const slow = new Promise<null>((resolve) => {
    answer = resolve;
  });
  const parts = {
    ...LETS_IN,
    people: { handle: () => slow },
    store: {
      cancel: async (user: string, messageId: string) => {
        called.push(`cancel ${user} ${messageId}`);
        return { state: 'ended', status: 'done' };
      },
    },
    desk: { admit: () => called.push('admit') },
    rates: { take: () => 0 },
    addressLimit: { leave() {} },
  } as unknown as SessionParts;
  const session = new Session({ open: true, slow: false, send() {}, close() {} }, '', '', parts);
  session.onText('{"type":"init","userId":"20001"}');
  while (!session.bound) await turn();
  session.onText('{"type":"groups"}');
  session.onText('{"type":"chat","messageId":"m1","contents":"x"}');
  session.onText('{"type":"cancel","messageId":"m2"}');
  session.onText('{"type":"cancel","messageId":"m3"}');
  session.onClose();
  answer(null);
  await turn();
  await turn();
  assert.deepEqual(called, ['cancel 20001 m2', 'cancel 20001 m3']);
});

test('the span of a question whose client leaves before it is let in is ended', async () => {
  let admit = (_: object) => {};
  const outcomes: string[] = [];
  const subscription = { state: 'held', messageId: 'm1' };
  const parts = {
    ...LETS_IN,
    delivery: {
      hold: () => subscription,
      release() {},
      drop() {
        subscription.state = 'ended';
      },
    },
    desk: {
      admit: () =>
        new Promise((resolve) => {
          admit = resolve;
        }),
    },
    tracing: {
      start: () => ({
        context: '',
        set: (facts: Record<string, string>) => outcomes.push(facts['rivulet.outcome']!),
        end: () => outcomes.push('end'),
      }),
    },
    metrics: { admission: { observe() {} }, admitted: { inc() {} } },
    rates: { take: () => 0 },
    addressLimit: { leave() {} },
  } as unknown as SessionParts;
  const session = new Session({ open: true, slow: false, send() {}, close() {} }, '', '', parts);
  session.onText('{"type":"init","userId":"20001"}');
  while (!session.bound) await turn();
  session.onText('{"type":"chat","messageId":"m1","contents":"x"}');
  await turn();
  session.onClose();
  admit({ state: 'created', position: 0, home: 'n1' });
  await turn();
  assert.deepEqual(outcomes, ['connection left', 'end']);
});

test('a clock that is set back refuses nobody', (t) => {
  const sent: string[] = [];
  const rates = createFrameRates({ connectionFramesPerSecond: 1, userFramesPerSecond: 0 });
  const parts = { rates } as unknown as SessionParts;
  const session = new Session(
    { open: true, slow: false, send: (text) => sent.push(JSON.parse(text).type), close() {} },
    '',
    '',
    parts,
  );
  session.onText('PING');
  t.mock.timers.enable({ apis: ['Date'], now: Date.now() - 3_600_000 });
  session.onText('PING');
  assert.deepEqual(sent, ['heartbeat', 'heartbeat']);
});

test('a long frame that is refused again and again counts as many', async () => {
  const sent: { type: string; code: string }[] = [];
  let closed = 0;
  let isAbove = false;
  const parts = {
    ...LETS_IN,
    rates: { take: () => (isAbove ? 100 : 0) },
    metrics: { rateLimited: { inc() {} } },
  } as unknown as SessionParts;
  const connection = {
    open: true,
    slow: false,
    send: (text: string) => sent.push(JSON.parse(text)),
    close: (code: number) => {
      closed = code;
    },
  };
  const session = new Session(connection, '', '', parts);
  const long = JSON.stringify({ type: 'heartbeat', padding: 'x'.repeat(220_000) });
  session.onText(JSON.stringify({ type: 'init', userId: '20001', token: 'x'.repeat(8_192) }));
  while (!session.bound) await turn();
  session.onText(long);
  assert.equal(sent.pop()!.type, 'heartbeat');
  isAbove = true;
  for (let count = 0; count < 18; count++) session.onText(long);
  assert.equal(closed, 0);
  session.onText(long);
  assert.equal(closed, 4503);
});

test('a frame that makes no sense is answered with its messageId where that could be read', () => {
  const sent: object[] = [];
  const parts = { rates: { take: () => 0 }, metrics: { protocolErrors: { inc() {} } } };
  const session = new Session(
    { open: true, slow: false, send: (text) => sent.push(JSON.parse(text)), close() {} },
    '',
    '',
    parts as unknown as SessionParts,
  );
  session.onText('{"type":"resume","messageId":"m1","after":"later"}');
  session.onText('{"type":"resume","messageId":"a b"}');
  assert.deepEqual(sent, [
    { type: 'error', code: 'invalid_frame', message: 'after must look like 1-42', messageId: 'm1' },
    { type: 'error', code: 'invalid_frame', message: 'messageId may hold only A-Z a-z 0-9 . _ : @ -' },
  ]);
});

test('acks that wait in line are one, of the latest; null stands for what is absent', async () => {
  const handled: string[] = [];
  const sent: { code?: string }[] = [];
  const claims: unknown[] = [];
  let answer = (_: null) => {};
  const slow = new Promise<null>((resolve) => {
    answer = resolve;
  });
  const parts = {
    ...LETS_IN,
    authenticate: async (claimed: string | null) => {
      claims.push(claimed);
      return { userId: '20001', expiresMs: null };
    },
    people: {
      handle: (_user: string, _device: string, frame: { type: string; id?: string }) => {
        handled.push(`${frame.type} ${frame.id ?? ''}`);
        return slow;
      },
    },
    rates: { take: () => 0 },
  } as unknown as SessionParts;
  const connection = {
    open: true,
    slow: false,
    send: (text: string) => sent.push(JSON.parse(text)),
    close() {},
  };
  const session = new Session(connection, '', '', parts);
  session.onText('{"type":"init","userId":null}');
  while (!session.bound) await turn();
  assert.deepEqual(claims, [null]);
  session.onText('{"type":"groups"}');
  for (let index = 1; index <= 1_000; index++) session.onText(`{"type":"ack","id":"${index}-0"}`);
  session.onText('{"type":"ack","id":"7-0"}');
  session.onText('{"type":"ack","id":"no id"}');
  answer(null);
  for (let turns = 0; turns < 10; turns++) await turn();
  assert.deepEqual(handled, ['groups ', 'ack 1000-0', 'ack no id']);
  assert.deepEqual(
    sent.filter(({ code }) => code),
    [],
  );
});
