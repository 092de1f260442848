import type { ChatPayload } from '../../shared/protocol.ts';

/**
 * What the demo model says. Pure: the same conversation always gets the same text. Each ability looks at the
 * question and answers, or passes (null); the first that answers wins.
 */
export function composeDemoAnswer({ contents, history = [] }: ChatPayload): string {
  const question = contents.trim();
  const asked = history.filter((message) => message.role === 'user').map((message) => message.content);
  for (const ability of ABILITIES) {
    const answer = ability(question, asked);
    if (answer !== null) return `${answer}${closing(asked.length)}`;
  }
  return `${reflect(question)}${closing(asked.length)}`;
}

type Ability = (question: string, asked: string[]) => string | null;

const ABILITIES: Ability[] = [recall, countWords, echo, reverse, calculate, explain, greet, listAbilities];

/** Longest text that is given back to the user, characters. */
const LONGEST_ECHO = 2_000;

function closing(earlier: number): string {
  if (earlier === 0) return '';
  return earlier === 1
    ? '\n\n(I also read your one earlier message in this conversation.)'
    : `\n\n(I also read your ${earlier} earlier messages in this conversation.)`;
}

function recall(question: string, asked: string[]): string | null {
  if (
    !/\bwhat (did|have) i (just )?(ask|asked|say|said|write|written)\b|\bmy (last|previous) (question|message)\b/i.test(
      question,
    )
  )
    return null;
  const last = asked.at(-1);
  return last === undefined
    ? 'This is the first message of our conversation, so there is nothing to recall yet. I am only the demo model, but I do read the history I am given.'
    : `Before this you wrote: "${shorten(last, 200)}". I am the demo model; the conversation came with your request, since the workers keep nothing.`;
}

function countWords(question: string): string | null {
  const text = argumentOf(
    question,
    /^(?:please )?(?:count (?:the )?words(?: in)?|how many words(?: are)?(?: there)?(?: in)?)\b/i,
  );
  if (text === null) return null;
  const words = wordsOf(text);
  return `That is ${plural(words.length, 'word')} and ${plural([...text].length, 'character')}, counted by the demo model.`;
}

function echo(question: string): string | null {
  const text = argumentOf(question, /^(?:please )?(?:echo|repeat(?: after me)?|say)\b/i);
  return text === null ? null : `You asked the demo model to say: ${shorten(text, LONGEST_ECHO)}`;
}

function reverse(question: string): string | null {
  const text = argumentOf(question, /^(?:please )?reverse\b/i);
  if (text === null) return null;
  return `Backwards, says the demo model, it reads: ${[...shorten(text, LONGEST_ECHO)].reverse().join('')}`;
}

function calculate(question: string): string | null {
  const match =
    /^(?:what(?: is|'s)|how much is|calculate|compute)?\s*([-+*/×÷^%().,\d\s]+?)\s*[=?.!]*$/i.exec(
      question.slice(0, 200),
    );
  if (!match || question.length > 200) return null;
  const expression = match[1]!.trim();
  if (!/\d/.test(expression) || !/[-+*/×÷^%]/.test(expression)) return null;
  const value = evaluate(expression);
  if (value === null) return null;
  return Number.isFinite(value)
    ? `${expression} = ${describeNumber(value)}. Even the demo model can do that much arithmetic.`
    : `${expression} has no finite value, as far as the demo model can tell.`;
}

function explain(question: string): string | null {
  if (!/\brivulet\b|\bhow (do|does) (you|this|it) work\b|\bwhat happens (when|with)\b/i.test(question))
    return null;
  return [
    'I am the demo model of Rivulet, so let me tell you how these words reach you.',
    'Your browser sent the question over a WebSocket to a gateway.',
    'The gateway put it in a Redis Stream; a worker took it from there through a consumer group and called me.',
    'Every piece of my answer is an entry in a log in Redis, under an id such as 1-7: attempt 1, piece 7.',
    'That log is why nothing gets lost. Reload the page in the middle of this sentence and it goes on where it was; kill the worker and another one takes over; both can be tried right now.',
    'Set HANDLER=openai and OPENAI_BASE_URL to talk to a real model instead.',
  ].join(' ');
}

function greet(question: string): string | null {
  if (!/^(?:hello|hi|hey|good (?:morning|afternoon|evening)|greetings)\b[\s\w,!.]{0,20}$/i.test(question))
    return null;
  return `Hello! You said "${shorten(question, 60)}", and here is the demo model, streaming a friendly answer word by word. Ask me how Rivulet works, give me a sum such as 12 * 7, or say "help" to see what else I can do.`;
}

function listAbilities(question: string): string | null {
  if (!/^(?:help|\?)$|\bwhat can you do\b|\bwho are you\b|\bwhat are you\b/i.test(question)) return null;
  return [
    'I am the demo model: no key, no network, and no great mind, but always here. You can ask me to:',
    '- explain Rivulet: "How does Rivulet work?"',
    '- calculate: "What is (3 + 4) * 12?"',
    '- count words: "Count words: the quick brown fox"',
    '- echo or reverse: "Repeat: good morning", "Reverse: drawer"',
    '- recall: "What did I ask before?"',
    'Anything else I answer with a few observations about your message. For real answers, run the worker with HANDLER=openai.',
  ].join('\n');
}

/** The answer to everything else: what can be said about a text without understanding it. */
function reflect(question: string): string {
  const words = wordsOf(question);
  const longest = words.reduce((best, word) => (word.length > best.length ? word : best), '');
  const observations = [
    `You ${question.endsWith('?') ? 'asked' : 'wrote'}: "${shorten(question, 120)}".`,
    `That is ${plural(words.length, 'word')}${longest && words.length > 1 ? `, and the longest of them is "${shorten(longest, 40)}"` : ''}.`,
  ];
  return [
    'I am the demo model that comes with Rivulet, so I cannot really think about this, but I did read it.',
    ...observations,
    'A real model would now stream its answer the way this one arrives: each piece written to a log in Redis before you see it, so that a reload or a lost connection costs you nothing.',
    'Say "help" for the few things that I can do myself.',
  ].join(' ');
}

/** The text after a command word and an optional colon, without surrounding quotes; null if it is another question. */
function argumentOf(question: string, command: RegExp): string | null {
  const match = command.exec(question);
  if (!match) return null;
  const text = question.slice(match[0].length).replace(/^\s*:?\s*/, '');
  const quoted = /^["“'](.+)["”']$/s.exec(text);
  return (quoted ? quoted[1]! : text) || null;
}

function wordsOf(text: string): string[] {
  return text.match(/\S+/g) ?? [];
}

function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`;
}

function shorten(text: string, length: number): string {
  const line = text.slice(0, length * 2).replace(/\s+/g, ' ');
  const characters = [...line];
  return characters.length > length || text.length > length * 2
    ? `${characters.slice(0, length).join('')}…`
    : line;
}

/** Fractions without what binary ones add in the last digits; whole numbers as they are while they are exact. */
function describeNumber(value: number): string {
  if (Number.isSafeInteger(value)) return String(value);
  const rounded = Number(value.toPrecision(14));
  return Math.abs(value) > Number.MAX_SAFE_INTEGER ? `about ${rounded}` : String(rounded);
}

/**
 * The value of a sum in + - * / % ^ and brackets, or null if it is not one. Recursive descent over at most 200
 * characters, so depth is bounded.
 */
function evaluate(expression: string): number | null {
  const tokens = expression.replaceAll(',', '').match(/\d+(?:\.\d+)?|\.\d+|[-+*/×÷^%()]|\S/g) ?? [];
  let position = 0;
  /** Steps over the next token if it is one of these. */
  const take = (...operators: string[]): boolean => {
    const token = tokens[position];
    if (token === undefined || !operators.includes(token)) return false;
    position++;
    return true;
  };

  const sum = (): number => {
    let value = product();
    for (;;) {
      if (take('+')) value += product();
      else if (take('-')) value -= product();
      else return value;
    }
  };
  const product = (): number => {
    let value = signed();
    for (;;) {
      if (take('*', '×')) value *= signed();
      else if (take('/', '÷')) value /= signed();
      else if (take('%')) value %= signed();
      else return value;
    }
  };
  const signed = (): number => {
    if (take('-')) return -signed();
    return take('+') ? signed() : power();
  };
  const power = (): number => {
    const base = atom();
    return take('^') ? base ** signed() : base;
  };
  const atom = (): number => {
    if (take('(')) {
      const value = sum();
      return take(')') ? value : Number.NaN;
    }
    const token = tokens[position++];
    return token === undefined ? Number.NaN : Number(token);
  };

  const value = sum();
  return position < tokens.length || Number.isNaN(value) ? null : value;
}
