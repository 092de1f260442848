import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { createDelivery } from '../../gateway/delivery.ts';
import { Session, type SessionParts } from '../../gateway/session.ts';
import { ERRORS, RivuletError } from '../../shared/errors.ts';
import { createLogger } from '../../shared/logger.ts';
import type { ServerFrame } from '../../shared/protocol.ts';

/**
 * The session's state machine alone: any order of frames, with every answer from behind it coming early, late, or
 * as an error, and the client leaving at any moment.
 */

const log = createLogger('silent', {});
const users = fc.constantFrom<unknown>('20001', 20_002, 9, 'not good', undefined, null, {});
const messageIds = fc.constantFrom('m1', 'm2', 'm3');

const steps = fc.oneof(
  { weight: 2, arbitrary: fc.record({ type: fc.constant('init'), userId: users }) },
  {
    weight: 5,
    arbitrary: fc.record({ type: fc.constant('chat'), messageId: messageIds, contents: fc.constant('x') }),
  },
  { weight: 3, arbitrary: fc.record({ type: fc.constant('resume'), messageId: messageIds }) },
  { weight: 3, arbitrary: fc.record({ type: fc.constant('cancel'), messageId: messageIds }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('presence'), userIds: fc.constant(['20001']) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('heartbeat') }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('dance') }) },
  { weight: 1, arbitrary: fc.constantFrom('PING', '', '{', '[]') },
  { weight: 1, arbitrary: fc.constant('leave' as const) },
  { weight: 1, arbitrary: fc.constant('drain' as const) },
);

const outcomes = fc.array(fc.nat(6), { minLength: 60, maxLength: 60 });

test('a session: any frames in any order, whatever comes from behind it', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.scheduler(),
      fc.array(steps, { maxLength: 25 }),
      outcomes,
      async (s, frames, luck) => {
        let turn = 0;
        const next = () => luck[turn++ % luck.length]!;
        const behind = <T>(what: string, value: T): Promise<T> => {
          const promise = s.schedule(Promise.resolve(value), what);
          return next() === 0 ? promise.then(() => Promise.reject(new RivuletError('internal'))) : promise;
        };
        const sent: ServerFrame[] = [];
        let isOpen = true;
        let closes = 0;
        let afterEnd = 0;
        const mailbox = {};
        let mailboxes = 0;
        const session: Session = new Session(
          {
            send(text) {
              if (!isOpen) afterEnd++;
              sent.push(JSON.parse(text));
            },
            close(code) {
              assert.ok(code >= 4000 && code < 5000);
              if (!isOpen) return;
              isOpen = false;
              closes++;
              session.onClose();
            },
            get open() {
              return isOpen;
            },
            slow: false,
          },
          '',
          '',
          partsOf(),
        );

        function partsOf(): SessionParts {
          const attached = () =>
            next() === 1
              ? { state: 'unknown' }
              : {
                  state: 'attached',
                  status: next() === 2 ? 'done' : 'running',
                  recovered: true,
                  compacted: false,
                  node: 'n1',
                  entries: [
                    {
                      id: '1-0',
                      frame: '{"type":"start","messageId":"m1","id":"1-0","attempt":1}',
                      terminal: false,
                    },
                  ],
                  more: false,
                };
          const store = {
            attach: () => behind('attach', attached()),
            readLog: () => behind('log', { entries: [], more: false }),
            cancel: () =>
              behind(
                'cancel',
                next() === 1
                  ? { state: 'unknown' }
                  : { state: 'cancelled', id: '2-0', before: '1-0', frame: '{}', routes: ['n1'], node: 'n1' },
              ),
          };
          const counter = { inc() {}, observe() {} };
          return {
            node: 'n1',
            keys: { replies: () => 'r' },
            redis: { batch: () => behind('batch', []) },
            store,
            queue: { removeQueued: () => behind('remove', undefined) },
            desk: {
              admit: () =>
                behind(
                  'admit',
                  [
                    { state: 'created', position: 0, home: 'n1' },
                    { state: 'joined', status: 'running', position: 0, home: 'n1' },
                    { state: 'rejected', code: 'queue_full', message: 'x', temporary: true },
                  ][next() % 3],
                ),
            },
            places: { doubt() {} },
            delivery: createDelivery({
              store: store as never,
              node: 'n1',
              log,
              counters: { healed() {}, slow() {}, doubled() {} },
            }),
            mailboxes: {
              open: () => {
                mailboxes++;
                return behind(
                  'mailbox',
                  next() === 1
                    ? { mailbox, opened: { state: 'refused', code: 'banned', message: 'x', close: 4502 } }
                    : { mailbox, opened: { state: 'bound', start() {} } },
                ).catch((error) => {
                  mailboxes--;
                  throw error;
                });
              },
              close: () => mailboxes--,
              onDrain() {},
            },
            people: { handle: () => behind('people', { type: 'presence', online: {} }) },
            authenticate: (claimed: string | null) =>
              behind('door', { userId: claimed ?? '', expiresMs: null }).then((identity) => {
                if (identity.userId === '') throw new RivuletError('invalid_frame', 'userId is missing');
                return identity;
              }),
            metrics: new Proxy({}, { get: () => counter }),
            rates: { take: () => (next() === 5 && next() === 5 ? 100 : 0) },
            addressLimit: { leave() {} },
            heartbeatMs: 1,
            limits: {},
            log,
          } as unknown as SessionParts;
        }

        const asked = { chat: 0, resume: 0 };
        for (const frame of frames) {
          if (!isOpen) break;
          if (frame === 'leave') {
            isOpen = false;
            session.onClose();
          } else if (frame === 'drain') session.onDrain();
          else {
            if (typeof frame === 'object' && (frame.type === 'chat' || frame.type === 'resume'))
              asked[frame.type]++;
            session.onText(typeof frame === 'string' ? frame : JSON.stringify(frame));
          }
          if (next() > 3 && s.count() > 0) await s.waitOne();
        }
        await s.waitIdle();
        await new Promise((resolve) => setImmediate(resolve));
        await s.waitIdle();

        const count = (type: string) => sent.filter((frame) => frame.type === type).length;
        const codes = sent.flatMap((frame) => ('code' in frame ? [String(frame.code)] : []));
        for (const code of codes) assert.ok(code in ERRORS, code);
        assert.ok(count('ready') <= 1);
        const ready = sent.findIndex((frame) => frame.type === 'ready');
        const before = ready < 0 ? sent : sent.slice(0, ready);
        for (const frame of before)
          assert.ok(frame.type === 'error' || frame.type === 'heartbeat', frame.type);
        assert.ok(count('accepted') <= asked.chat);
        assert.ok(closes <= 1);
        if (isOpen && ready >= 0 && !codes.includes('not_ready')) {
          // Whoever stayed was answered: each question and each resume, once.
          const answers = count('accepted') + count('rejected') + count('resumed');
          const rates = sent.filter(
            (frame) => frame.type === 'error' && frame.code === 'rate_limited',
          ).length;
          assert.ok(answers + rates >= asked.chat + asked.resume, JSON.stringify(sent));
        }
        if (!isOpen) {
          assert.equal(session.bound, false, 'a closed session is not bound');
          assert.equal(afterEnd >= 0, true);
        }
      },
    ),
    { numRuns: 400, includeErrorInReport: true },
  );
});
