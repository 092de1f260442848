import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { RivuletError } from '../../shared/errors.ts';
import type { HistoryMessage } from '../../shared/protocol.ts';
import { countPromptTokens, fitConversation, loadTokenizer } from '../../worker/models/context-budget.ts';

const conversation = (pairs: number): HistoryMessage[] =>
  Array.from({ length: pairs * 2 }, (_, index) => ({
    role: index % 2 === 0 ? 'user' : 'assistant',
    content: `message number ${index} of a conversation about rivers and boats`,
  }));

test('what fits stays whole and in order', async () => {
  const history = conversation(3);
  const fitted = await fitConversation({ systemPrompt: 'Be kind.', history, question: 'And now?' }, 8192);
  assert.deepEqual(fitted, {
    messages: [{ role: 'system', content: 'Be kind.' }, ...history, { role: 'user', content: 'And now?' }],
    dropped: 0,
  });
});

test('nothing but a question is nothing but a question', async () => {
  const { messages } = await fitConversation({ question: 'Why?' }, 8192);
  assert.deepEqual(messages, [{ role: 'user', content: 'Why?' }]);
});

test('trims the oldest first, as little as possible, never the system prompt or the question', async () => {
  const history = conversation(30);
  const systemPrompt = 'Be kind.';
  const question = 'And now?';
  const budget = 300;
  const { messages, dropped } = await fitConversation({ systemPrompt, history, question }, budget);
  assert.ok(dropped > 0 && dropped < history.length);
  assert.deepEqual(messages[0], { role: 'system', content: systemPrompt });
  assert.deepEqual(messages.at(-1), { role: 'user', content: question });
  assert.deepEqual(messages.slice(1, -1), history.slice(dropped));
  assert.equal(messages[1]!.role, 'user', 'begins with an answer without its question');
  assert.ok((await countPromptTokens(messages)) <= budget);
  const withOnePairMore = [messages[0]!, ...history.slice(dropped - 2), messages.at(-1)!];
  assert.ok((await countPromptTokens(withOnePairMore)) > budget);
});

test('any conversation: a suffix of the history that fits, or a clear refusal', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(
        fc.record({
          role: fc.constantFrom('user' as const, 'assistant' as const, 'system' as const),
          content: fc.string({ unit: 'binary', maxLength: 60 }),
        }),
        { maxLength: 12 },
      ),
      fc.string({ unit: 'binary', minLength: 1, maxLength: 60 }),
      fc.integer({ min: 16, max: 250 }),
      async (history, question, budget) => {
        const outcome = await fitConversation({ history, question }, budget).catch((error: unknown) => error);
        if (outcome instanceof RivuletError) {
          assert.equal(outcome.code, 'payload_too_large');
          assert.ok((await countPromptTokens([{ role: 'user', content: question }])) > budget);
          return;
        }
        const { messages, dropped } = outcome as Awaited<ReturnType<typeof fitConversation>>;
        assert.deepEqual(messages, [...history.slice(dropped), { role: 'user', content: question }]);
        assert.ok((await countPromptTokens(messages)) <= budget);
      },
    ),
    { numRuns: 200 },
  );
});

test('a question that is too long is refused with numbers, for good', async () => {
  await assert.rejects(
    fitConversation({ systemPrompt: 'Be kind.', question: 'river '.repeat(2_000) }, 1_000),
    (error: unknown) => {
      assert.ok(error instanceof RivuletError);
      assert.deepEqual([error.code, error.temporary], ['payload_too_large', false]);
      assert.match(
        error.message,
        /contents .* 98\d tokens .*context of 1000, system prompt 7.* 12000 characters/,
      );
      return true;
    },
  );
});

test('text that looks like a special token is text', async () => {
  const history = conversation(30);
  const question = 'What is <|endoftext|> or <|im_start|>?';
  const { messages, dropped } = await fitConversation({ history, question }, 300);
  assert.ok(dropped > 0);
  assert.equal(messages.at(-1)!.content, question);
});

test('the count of ordinary text is the count of the tokenizer', async () => {
  const { countTokens } = await import('gpt-tokenizer/encoding/cl100k_base');
  const count = await loadTokenizer();
  const text = 'The river, they said, was 4 fathoms deep; nobody had measured it since 1872. '.repeat(200);
  assert.equal(count(text), countTokens(text));
  const some = count(text, 100);
  assert.ok(some > 100 && some < 700, 'counting goes on long after the limit');
});

// Without the guards, each of these takes from 5 s to minutes.
for (const [name, unit] of [
  ['one letter', 'a'],
  ['letters without a break', 'qzjxkvbpygfwmucldrhsnioate'],
  ['spaces', ' '],
  ['underscores', '_'],
  ['Chinese', '江河湖海山川日月'],
  ['emoji', '👩‍👩‍👧'],
  ['long words', `${'kxqz'.repeat(31)} `],
] as const)
  test(`256 KB of ${name} takes no time to speak of`, async () => {
    const text = unit.repeat(Math.ceil(262_144 / Buffer.byteLength(unit)));
    const count = await loadTokenizer();
    let since = performance.now();
    count(text);
    const whole = performance.now() - since;
    assert.ok(whole < 15_000, `counted in ${whole} ms`);
    since = performance.now();
    await fitConversation({ question: 'hi', history: [{ role: 'user', content: text }] }, 8192);
    const fitted = performance.now() - since;
    assert.ok(fitted < 5_000, `fitted in ${fitted} ms`);
  });

test('a long history costs what the budget costs', async () => {
  const history = Array.from({ length: 1_000 }, (_, index) => ({
    role: 'user' as const,
    content: `${index} ${'lorem ipsum dolor '.repeat(100)}`,
  }));
  await loadTokenizer();
  const since = performance.now();
  const { dropped } = await fitConversation({ history, question: 'hi' }, 8192);
  const took = performance.now() - since;
  assert.ok(dropped > 900);
  assert.ok(took < 5_000, `${took} ms`);
});
