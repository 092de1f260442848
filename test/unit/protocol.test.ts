import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { ERRORS } from '../../shared/errors.ts';
import { parseClientFrame, parseUserId } from '../../shared/protocol.ts';

test('user ids: integers are their decimal strings', () => {
  assert.deepEqual(parseUserId(20001), { userId: '20001' });
  assert.deepEqual(parseUserId('20001'), { userId: '20001' });
  assert.deepEqual(parseUserId('a.b_c:d@e-F9'), { userId: 'a.b_c:d@e-F9' });
});

test('user ids: reserved, empty, long, odd ones are refused with the reason', () => {
  const refused: [unknown, RegExp][] = [
    [10_000, /reserved/],
    ['1', /reserved/],
    ['0042', /reserved/],
    [-5, /reserved/],
    [undefined, /missing/],
    ['', /1 to 64/],
    ['x'.repeat(65), /1 to 64/],
    ['a b', /may hold only/],
    ['{a}', /may hold only/],
    ['ü', /may hold only/],
    [1.5, /integer/],
    [Number.NaN, /integer/],
    [null, /string/],
    [{}, /string/],
    [true, /string/],
  ];
  for (const [value, reason] of refused) {
    const parsed = parseUserId(value);
    assert.ok('reason' in parsed, JSON.stringify(value));
    assert.match(parsed.reason, reason);
  }
  assert.ok('userId' in parseUserId('10001'));
  assert.ok('userId' in parseUserId('user1'));
});

test('a wrong frame is answered with the field that is wrong', () => {
  const wrong: [string, RegExp][] = [
    ['', /not valid JSON/],
    ['{', /not valid JSON/],
    ['[]', /JSON object/],
    ['null', /JSON object/],
    ['1', /JSON object/],
    ['{}', /type is missing/],
    ['{"type":1}', /type is missing/],
    ['{"type":"dance"}', /"dance" is not known/],
    ['{"type":"chat","contents":"x"}', /messageId/],
    ['{"type":"chat","messageId":"a b","contents":"x"}', /messageId may hold only/],
    ['{"type":"chat","messageId":"","contents":"x"}', /messageId must not be empty/],
    [`{"type":"chat","messageId":"${'m'.repeat(129)}","contents":"x"}`, /messageId must have at most 128/],
    ['{"type":"chat","messageId":"m","contents":5}', /contents must be a string/],
    ['{"type":"chat","messageId":"m","contents":""}', /contents must not be empty/],
    [
      '{"type":"chat","messageId":"m","contents":"x","history":[{"role":"robot","content":"x"}]}',
      /^history\.0\.role must be one of user, assistant, system$/,
    ],
    ['{"type":"resume","messageId":"m","after":"later"}', /after must look like/],
    ['{"type":"presence","userIds":[]}', /^userIds must not be empty$/],
    ['{"type":"presence"}', /^userIds is missing$/],
    ['{"type":"presence","userIds":[{}]}', /^userIds\.0 must be a user id/],
    ['{"type":"ack"}', /^id is missing$/],
    ['{"type":"ack","id":5}', /^id must be a string$/],
    ['{"type":"chat","messageId":"m","contents":"x","model":""}', /^model must not be empty$/],
    [
      `{"type":"chat","messageId":"m","contents":"x","model":"${'x'.repeat(129)}"}`,
      /^model must have at most 128 characters$/,
    ],
    ['{"type":"chat","messageId":"m","contents":"x","parameters":[]}', /^parameters must be an object$/],
    ['{"type":"chat","messageId":null,"contents":"x"}', /messageId must be a string/],
    // With a mistake in one, a message that was meant for one person must not reach the other.
    ...['""', '"a b"', '[]', `"${'u'.repeat(65)}"`].map((user): [string, RegExp] => [
      `{"type":"send","messageId":"m","to":{"user":${user},"group":"g"},"contents":"x"}`,
      /to\.user/,
    ]),
    ['{"type":"send","messageId":"m","to":{"user":"u","group":"g"},"contents":"x"}', /to must have one of/],
    ['{"type":"send","messageId":"m","to":{},"contents":"x"}', /to must have one of/],
  ];
  for (const [text, reason] of wrong) {
    const parsed = parseClientFrame(text);
    assert.ok('reason' in parsed, text);
    assert.match(parsed.reason, reason, text);
  }
});

test('unknown fields are ignored', () => {
  const parsed = parseClientFrame('{"type":"chat","messageId":"m","contents":"x","mood":"good"}');
  assert.ok('frame' in parsed);
  assert.deepEqual(parsed.frame, { type: 'chat', messageId: 'm', contents: 'x' });
});

test('null is what is absent', () => {
  const frame = (text: string) => {
    const parsed = parseClientFrame(text);
    assert.ok('frame' in parsed, text);
    return parsed.frame;
  };
  assert.deepEqual(
    frame('{"type":"chat","messageId":"m","contents":"x","history":null,"model":null,"parameters":null}'),
    { type: 'chat', messageId: 'm', contents: 'x' },
  );
  assert.deepEqual(frame('{"type":"init","userId":20001,"token":null,"device":null,"inboxAfter":null}'), {
    type: 'init',
    userId: 20001,
  });
  assert.deepEqual(frame('{"type":"send","messageId":"m","to":{"user":20002,"group":null},"contents":"x"}'), {
    type: 'send',
    messageId: 'm',
    to: { user: '20002' },
    contents: 'x',
  });
  assert.deepEqual(frame('{"type":"init","userId":20001,"inboxAfter":1795326329267}'), {
    type: 'init',
    userId: 20001,
    inboxAfter: '1795326329267',
  });
});

test('nothing that comes in makes the parser throw', () => {
  fc.assert(fc.property(fc.string(), (text) => void parseClientFrame(text)));
  fc.assert(fc.property(fc.json(), (text) => void parseClientFrame(text)));
  const near = fc.record(
    {
      type: fc.constantFrom(
        'init',
        'chat',
        'resume',
        'cancel',
        'send',
        'ack',
        'join',
        'presence',
        'heartbeat',
      ),
      messageId: fc.oneof(fc.string(), fc.integer(), fc.constant('m1')),
      contents: fc.anything(),
      history: fc.anything(),
      userId: fc.anything(),
      to: fc.anything(),
      after: fc.anything(),
    },
    { requiredKeys: ['type'] },
  );
  fc.assert(fc.property(near, (frame) => void parseClientFrame(JSON.stringify(frame))));
});

test('every code has a message for people', () => {
  for (const [code, { message }] of Object.entries(ERRORS)) assert.ok(message.length > 10, code);
});
