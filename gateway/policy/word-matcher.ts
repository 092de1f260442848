import { readFileSync } from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';
import { AhoCorasick } from '@monyone/aho-corasick';

/**
 * The thread of the word list: building the automaton for 30,000 words takes 0.3 s and a long text some ms, which
 * sockets should not wait for. Messages in: `{id, text}` or `{reload}`; out: `{id, word}` or `{loaded}`.
 */

export type MatcherCall = { id: number; text: string } | { reload: true };
export type MatcherAnswer = { id: number; word: string | null } | { loaded: number } | { failed: string };

/** What is compared: compatibility forms, case, and characters that do not show are made alike. */
export function normalize(text: string): string {
  return text
    .normalize('NFKC')
    .toLowerCase()
    .replace(/\p{Cf}|\u034f|[\u115f\u1160\u3164\uffa0]|[\ufe00-\ufe0f]/gu, '');
}

/** One word or phrase a line; empty lines and lines that begin with # are passed over. */
export function parseWordList(text: string): string[] {
  const words = text
    .split(/\r?\n/)
    .filter((line) => !line.startsWith('#'))
    .map((line) => normalize(line.trim()))
    .filter((line) => line !== '');
  return [...new Set(words)];
}

/** Letters and digits of scripts that put spaces between words. */
const SPACED = /[\p{L}\p{N}\p{M}]/u;
const UNSPACED =
  /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]/u;

function isWordPart(character: string | undefined): boolean {
  return character !== undefined && SPACED.test(character) && !UNSPACED.test(character);
}

/**
 * Finds a listed word in a text. Where a script puts spaces between words only whole words count, so that a word
 * inside a harmless longer one is none.
 */
export function createMatcher(words: string[]): (text: string) => string | null {
  if (words.length === 0) return () => null;
  const automaton = new AhoCorasick(words);
  return (text) => {
    const normalized = normalize(text);
    if (!automaton.hasKeywordInText(normalized)) return null;
    for (const { begin, keyword } of automaton.matchInText(normalized)) {
      const end = begin + keyword.length;
      const startsInside = isWordPart(normalized[begin]) && isWordPart(normalized[begin - 1]);
      const endsInside = isWordPart(normalized[end - 1]) && isWordPart(normalized[end]);
      if (!startsInside && !endsInside) return keyword;
    }
    return null;
  };
}

if (parentPort && workerData?.wordList) {
  const port = parentPort;
  const path = workerData.wordList as string;
  let match = createMatcher([]);
  const load = (): MatcherAnswer => {
    try {
      const words = parseWordList(readFileSync(path, 'utf8'));
      match = createMatcher(words);
      return { loaded: words.length };
    } catch (error) {
      return { failed: (error as Error).message };
    }
  };
  port.on('message', (call: MatcherCall) => {
    port.postMessage('reload' in call ? load() : { id: call.id, word: match(call.text) });
  });
  port.postMessage(load());
}
