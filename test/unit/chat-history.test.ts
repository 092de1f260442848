import assert from 'node:assert/strict';
import { test } from 'node:test';
import { chooseHistory } from '../../infra/chat-history.ts';
import type { HistoryMessage } from '../../shared/protocol.ts';

const talk = (turns: number, text = ''): HistoryMessage[] =>
  Array.from({ length: turns }, (_, turn) => [
    { role: 'user' as const, content: `question ${turn}` },
    { role: 'assistant' as const, content: `answer ${turn} ${text}` },
  ]).flat();
const request = { messageId: 'm', contents: 'and then?', parameters: { temperature: 0 } };
const bytesOf = (history: HistoryMessage[]) =>
  Buffer.byteLength(JSON.stringify({ type: 'chat', ...request, history }));

test('of a short conversation all goes with the next question, of a long one the last twenty turns', () => {
  assert.deepEqual(chooseHistory([], request, 1_000), []);
  assert.deepEqual(chooseHistory(talk(3), request, 100_000), talk(3));
  assert.deepEqual(chooseHistory(talk(50), request, 100_000), talk(50).slice(-40));
});

test('the oldest turns are left out until the frame fits', () => {
  const history = talk(5, 'ä€😀"\n'.repeat(50));
  for (let turns = 0; turns <= 5; turns++) {
    const latest = history.slice(10 - 2 * turns);
    const most = bytesOf(latest) + 1; // a comma is counted before the first too
    assert.deepEqual(chooseHistory(history, request, most), latest);
    if (turns > 0) assert.deepEqual(chooseHistory(history, request, bytesOf(latest) - 1), latest.slice(2));
  }
  assert.deepEqual(
    chooseHistory(history, request, 10),
    [],
    'the question alone is too long: the client says so',
  );
});
