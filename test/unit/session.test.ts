import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { Session, type SessionParts } from '../../gateway/session.ts';

test('a cancel that waits in line is carried out when the client leaves; what else waits is not', async () => {
  const called: string[] = [];
  let answer = (_: null) => {};
  const slow = new Promise<null>((resolve) => {
    answer = resolve;
  });
  const parts = {
    authenticate: async (userId: string) => ({ userId, expiresMs: null }),
    mailboxes: { open: async () => ({ mailbox: {}, opened: { state: 'bound', start() {} } }), close() {} },
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
