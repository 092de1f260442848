import { setTimeout as delay } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { createDeadLetters, type DeadLetter, type DeadLetters } from '../shared/dead-letters.ts';
import { createKeys } from '../shared/keys.ts';
import { createRedis } from '../shared/redis.ts';
import { chooseRedis, printable, reportFailure, UsageError } from './command.ts';

/** `npm run dead`: requests that used up their attempts; look at them, replay them, drop them. */

const HELP = `Usage: npm run dead -- list | show NAME… | replay NAME… | drop NAME… [options]

Dead letters are requests that used up their attempts. A NAME is <node>/<entry>, as list prints it.
A replay keeps the message id: clients that ask for it get the new answer. It is safe to run twice.

  --all            replay, drop: every letter (of --node, with --code)
  --node NODE      only letters of this node
  --code CODE      only letters with this code
  --batch N        replay: at most N requests are open on a node at a time (50)
  --limit N        list: at most N (100)
  --json           list, show: one JSON object a line
  --redis URL      which Redis; otherwise REDIS_URL, the running npm start, redis://127.0.0.1:6379
  --prefix TEXT    prefix of the keys; otherwise KEY_PREFIX, the running npm start, chat:`;

const REACH_MS = 2_500; // a person waits for the answer
const PAUSE_MS = 250;

async function main(args: string[], env: NodeJS.ProcessEnv): Promise<number> {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      all: { type: 'boolean', default: false },
      node: { type: 'string' },
      code: { type: 'string' },
      batch: { type: 'string', default: '50' },
      limit: { type: 'string', default: '100' },
      json: { type: 'boolean', default: false },
      redis: { type: 'string' },
      prefix: { type: 'string' },
      help: { type: 'boolean', short: 'h' },
    },
  });
  const [action, ...names] = positionals;
  if (values.help) {
    console.log(HELP);
    return 0;
  }
  if (!action) throw new UsageError('a command is missing');
  if (!['list', 'show', 'replay', 'drop'].includes(action))
    throw new UsageError(`there is no command ${action}`);
  const batch = wholeNumber('--batch', values.batch);
  const limit = wholeNumber('--limit', values.limit);
  if (action !== 'list' && names.length === 0 && !(values.all && action !== 'show'))
    throw new UsageError(`${action} needs names as list prints them${action === 'show' ? '' : ', or --all'}`);

  const config = chooseRedis(values, env);
  const redis = createRedis({ url: config.REDIS_URL, name: 'dead' });
  try {
    await redis.connected(REACH_MS);
    const letters = createDeadLetters({ redis, keys: createKeys(config.KEY_PREFIX) });

    let missing = 0;
    async function* chosen(): AsyncGenerator<DeadLetter> {
      for (const name of names) {
        const letter = await letters.find(name);
        if (letter) yield letter;
        else {
          console.error(`${name}: there is no such letter`);
          missing++;
        }
      }
      if (names.length > 0) return;
      for await (const letter of letters.list(values.node))
        if (values.code === undefined || letter.code === values.code) yield letter;
    }

    switch (action) {
      case 'list': {
        let shown = 0;
        for await (const letter of chosen()) {
          if (++shown > limit) {
            console.error(`more than ${limit}; see --limit`);
            break;
          }
          const { payload: _, ...facts } = letter;
          say(values.json ? JSON.stringify(facts) : describe(letter));
        }
        if (shown === 0 && !values.json) console.log('No dead letters.');
        break;
      }
      case 'show':
        for await (const letter of chosen()) say(JSON.stringify(letter, null, values.json ? 0 : 2));
        break;
      case 'drop': {
        let dropped = 0;
        for await (const letter of chosen()) if (await letters.drop(letter)) dropped++;
        console.log(`${dropped} dropped`);
        break;
      }
      default:
        await replay(letters, chosen(), batch);
    }
    return missing > 0 ? 1 : 0;
  } finally {
    await redis.close();
  }
}

const say = (text: string) => console.log(printable(text, process.stdout));

async function replay(
  letters: DeadLetters,
  chosen: AsyncGenerator<DeadLetter>,
  batch: number,
): Promise<void> {
  const counts = { replayed: 0, open: 0, answered: 0, gone: 0 };
  for await (const letter of chosen) {
    const node = await letters.chooseNode(letter);
    while ((await letters.countOpen([node])) >= batch) await delay(PAUSE_MS);
    counts[await letters.replay(letter)]++;
  }
  console.log(
    `${counts.replayed} replayed, ${counts.open} were open already, ${counts.answered} had an answer, ${counts.gone} were gone`,
  );
}

function describe({ name, user, messageId, attempts, code, reason, atMs }: DeadLetter): string {
  return `${name}  ${new Date(atMs).toISOString()}  ${user}/${messageId}  ${attempts} attempts  ${code}: ${reason}`;
}

function wholeNumber(name: string, text: string): number {
  const value = Number(text);
  if (Number.isInteger(value) && value > 0) return value;
  throw new UsageError(`${name} must be a whole number above 0`);
}

main(process.argv.slice(2), process.env).then(
  (code) => {
    process.exitCode = code;
  },
  (error: Error) => {
    process.exitCode = reportFailure(error, HELP);
  },
);
