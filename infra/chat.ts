import { randomUUID } from 'node:crypto';
import { createInterface } from 'node:readline/promises';
import { parseArgs } from 'node:util';
import { WebSocket } from 'ws';
import { type Answer, type Client, ClientError, type ClientOptions, createClient } from '../shared/client.ts';
import { type HistoryMessage, parseUserId } from '../shared/protocol.ts';
import { chooseHistory } from './chat-history.ts';
import { findRun, NothingRunsError, printable, UsageError } from './command.ts';

/**
 * `npm run chat`: one question from the arguments or the pipe, or a conversation at a prompt. The answer goes to
 * stdout and nothing else does; what happens on the way (queue, restarts, reconnects) goes to stderr.
 */

const HELP = `Chat with Rivulet from the terminal.

  npm run chat -- --user 20001 "hello"          ask once, the answer streams to stdout
  cat notes.txt | npm run chat -- --user 20001  ask with what is piped in (also: - as the message)
  npm run chat -- --user 20001                  a conversation at a prompt

Options
  --user <id>          who you are: a number above 10000 or a name (default: your login name)
  --url <ws://…>       gateway, several by comma (default: RIVULET_URL, else the running npm start,
                       else ws://127.0.0.1:8080/ws)
  --token <token>      credentials, where the gateway asks for them (default: RIVULET_TOKEN)
  --conversation <id>  name of the conversation: one open answer at a time in each
  --message-id <id>    name of the question; the same one again joins its answer
  --model <name>       passed on to the model
  --parameters <json>  passed on to the model, for instance '{"temperature":0.2}'
  --help

Ctrl-C stops the answer and keeps what has come; a second one leaves at once.

Exit codes: 0 answered or stopped by Ctrl-C · 1 failed or refused · 2 wrong arguments · 3 no gateway reached
            130 second Ctrl-C`;

const EXIT = { ok: 0, failed: 1, usage: 2, unreachable: 3, interrupted: 130 } as const;
const REACH_MS = 4_000; // for the first connection
const ASK_WHY_MS = 1_500; // a gateway that answers does so at once, but for a Redis that it pings for a second
const LOST_MS = 60_000; // for getting it back in the middle of an answer
/** The terminal and npm both pass a Ctrl-C on; what comes within this time is the same one. */
const SAME_SIGNAL_MS = 300;
const LONGEST_INPUT = 1024 * 1024; // characters from a pipe; the gateway's own limit is lower

interface Settings {
  userId: string;
  urls: string[];
  token: string | undefined;
  message: string | null;
  conversationId: string | undefined;
  messageId: string | undefined;
  model: string | undefined;
  parameters: Record<string, unknown> | undefined;
}

type Environment = Record<string, string | undefined>;

function readSettings(args: string[], env: Environment, stdinIsTerminal: boolean): Settings | 'help' {
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse(args);
  } catch (error) {
    throw new UsageError((error as Error).message.split('. ')[0]!);
  }
  const { values, positionals } = parsed;
  if (values.help) return 'help';
  const user = parseUserId(values.user ?? defaultUser(env));
  if ('reason' in user) throw new UsageError(`--user: ${user.reason}`);
  const joined = positionals.join(' ');
  const piped = joined === '-' || (joined === '' && !stdinIsTerminal);
  return {
    userId: user.userId,
    urls: readUrls(values.url ?? env.RIVULET_URL, env),
    token: values.token ?? (env.RIVULET_TOKEN || undefined),
    message: piped ? '-' : joined || null,
    conversationId: values.conversation,
    messageId: values['message-id'],
    model: values.model,
    parameters: readParameters(values.parameters),
  };
}

function parse(args: string[]) {
  return parseArgs({
    args,
    allowPositionals: true,
    options: {
      user: { type: 'string', short: 'u' },
      url: { type: 'string' },
      token: { type: 'string' },
      conversation: { type: 'string' },
      'message-id': { type: 'string' },
      model: { type: 'string' },
      parameters: { type: 'string' },
      help: { type: 'boolean', short: 'h' },
    },
  });
}

function defaultUser(env: Environment): string {
  return (env.USER || env.LOGNAME || 'guest').replace(/[^A-Za-z0-9._:@-]/g, '-').slice(0, 64);
}

function readUrls(given: string | undefined, env: Environment): string[] {
  if (given)
    return given
      .split(',')
      .map((url) => url.trim())
      .filter(Boolean);
  const running = findRun(env)?.gateways ?? [];
  return running.length > 0 ? running.map((gateway) => gateway.url) : ['ws://127.0.0.1:8080/ws'];
}

function readParameters(json: string | undefined): Record<string, unknown> | undefined {
  if (json === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(json);
  } catch {
    throw new UsageError(`--parameters is not valid JSON: ${json.slice(0, 60)}`);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new UsageError('--parameters must be a JSON object');
  return value as Record<string, unknown>;
}

/** What happens on the way, on stderr; on a terminal one line that is overwritten. */
function createStatus(stream: NodeJS.WriteStream) {
  let shown = '';
  return {
    show(text: string) {
      if (text === shown) return;
      if (stream.isTTY) stream.write(`\r\x1b[2K\x1b[2m${text}\x1b[0m`);
      else stream.write(`${text}\n`);
      shown = text;
    },
    clear() {
      if (shown !== '' && stream.isTTY) stream.write('\r\x1b[2K');
      shown = '';
    },
    /** A line that stays. */
    say(text: string) {
      this.clear();
      stream.write(`${printable(text, stream)}\n`);
    },
  };
}
type Status = ReturnType<typeof createStatus>;

/** Streams an answer to stdout. Returns its text. */
async function printAnswer(client: Client, answer: Answer, status: Status): Promise<string> {
  let midLine = false;
  const off = [
    client.on('queued', ({ messageId, position }) => {
      if (messageId === answer.messageId) status.show(describePosition(position));
    }),
    client.on('accepted', ({ messageId, position }) => {
      if (messageId === answer.messageId && position > 0) status.show(describePosition(position));
    }),
    client.on('restart', ({ messageId, attempt }) => {
      if (messageId === answer.messageId) status.show(`the answer broke off, attempt ${attempt} begins…`);
    }),
    client.on('reconnecting', () => {
      if (midLine) process.stderr.write(process.stderr.isTTY ? '\n' : '');
      status.show('connection lost, reconnecting…');
    }),
    client.on('ready', ({ node }) => {
      status.show(`connected again, on ${node}`);
      if (process.stderr.isTTY) status.clear();
    }),
  ];
  try {
    for await (const part of answer.parts()) {
      status.clear();
      if (part.type === 'restart') {
        if (midLine) process.stdout.write('\n');
        status.say(`[attempt ${part.attempt}: the text above is void, the answer starts over]`);
        midLine = false;
      } else {
        const text = printable(part.text, process.stdout);
        midLine = !text.endsWith('\n');
        if (!process.stdout.write(text)) await drained();
      }
    }
  } finally {
    for (const stop of off) stop();
    status.clear();
    if (midLine) process.stdout.write('\n');
  }
  const result = await answer.done;
  if (result.status === 'cancelled') status.say('[stopped]');
  else if (result.finishReason === 'length') status.say('[ended at the length limit]');
  else if (result.finishReason === 'content_filter')
    status.say(`[${result.text === '' ? 'kept back' : 'cut off'} by the content filter of the model]`);
  else if (result.text === '') status.say('[the answer was empty]');
  return result.text;
}

function drained(): Promise<void> {
  return new Promise((resolve) => process.stdout.once('drain', resolve));
}

function describePosition(position: number): string {
  return position === 0 ? 'next in line…' : `in line, ${position} ahead…`;
}

/** A connection that stays away too long ends the program's patience, not the answer. */
function watchConnection(client: Client, onGiveUp: () => void): void {
  let timer: NodeJS.Timeout | undefined;
  client.on('reconnecting', () => {
    timer ??= setTimeout(onGiveUp, LOST_MS);
  });
  const clear = () => {
    clearTimeout(timer);
    timer = undefined;
  };
  client.on('ready', clear);
  client.on('disconnected', ({ final }) => final && clear());
}

/** Why no connection came about, as far as the gateways say it themselves. */
async function explainUnreachable({ urls }: Settings): Promise<string> {
  const reasons = await Promise.all(urls.map(askWhy));
  const known = [...new Set(reasons.filter((reason) => reason !== null))];
  if (known.length > 0) return known.join('\n');
  return `No gateway answers at ${urls.join(', ')}. Start one with "npm start", or name another with --url.`;
}

/** What /readyz says, or what is wrong with the certificate; null when nobody of ours is there. */
async function askWhy(url: string): Promise<string | null> {
  const origin = new URL(url).origin.replace(/^ws/, 'http');
  try {
    const response = await fetch(`${origin}/readyz`, { signal: AbortSignal.timeout(ASK_WHY_MS) });
    const text = (await response.text()).trim();
    if (response.ok && text === 'ready')
      return `The gateway at ${url} is ready, but no connection to it came about.`;
    return text.startsWith('not ready: ') ? `The gateway at ${url} is ${text}.` : null;
  } catch (error) {
    const { code = '', message = '' } = ((error as Error).cause ?? {}) as NodeJS.ErrnoException;
    if (!/CERT|SELF_SIGNED|UNABLE_TO_VERIFY|ISSUER/.test(code)) return null;
    return `The certificate of ${url} is not trusted: ${message}. If it is yours, name its authority: NODE_EXTRA_CA_CERTS=ca.pem npm run chat`;
  }
}

function describeError(error: unknown): { text: string; code: number } {
  if (!(error instanceof ClientError)) throw error;
  const { code, message, retryAfterMs } = error;
  switch (code) {
    case 'closed':
      return { text: message, code: EXIT.unreachable };
    case 'unauthorized':
      return { text: `Not signed in: ${message} Pass --token.`, code: EXIT.failed };
    default: {
      const later = retryAfterMs ? ` Try again in ${Math.ceil(retryAfterMs / 1000)} s.` : '';
      return { text: `${code}: ${message}${later}`, code: EXIT.failed };
    }
  }
}

async function readStdin(): Promise<string> {
  let text = '';
  process.stdin.setEncoding('utf8');
  for await (const piece of process.stdin) {
    text += piece;
    if (text.length > LONGEST_INPUT) throw new UsageError('the input is longer than a message may be');
  }
  if (text.trim() === '') throw new UsageError('there is nothing to ask: the input is empty');
  return text.trimEnd();
}

/** Ctrl-C: the first stops the answer, the second leaves. */
function stopOnInterrupt(current: () => Answer | null, onIdle: () => void): void {
  let interrupts = 0;
  let lastMs = Number.NEGATIVE_INFINITY;
  const onSignal = () => {
    const sameSignal = performance.now() - lastMs < SAME_SIGNAL_MS;
    lastMs = performance.now();
    if (sameSignal) return;
    const answer = current();
    if (!answer) return onIdle();
    interrupts++;
    if (interrupts > 1) process.exit(EXIT.interrupted);
    void answer.cancel();
    answer.done.then(
      () => {
        interrupts = 0;
      },
      () => {
        interrupts = 0;
      },
    );
  };
  process.on('SIGINT', onSignal);
}

/** A conversation at the prompt. Ends with Ctrl-D, or Ctrl-C at an empty prompt. */
async function converse(client: Client, settings: Settings, status: Status): Promise<number> {
  const history: HistoryMessage[] = [];
  const { conversationId, model, parameters } = settings;
  let mostFrameBytes = Number.POSITIVE_INFINITY; // as the gateway that we were last connected to had it
  const prompt = createInterface({
    input: process.stdin,
    output: process.stderr,
    prompt: '\x1b[1m›\x1b[0m ',
    historySize: 200,
  });
  let answer: Answer | null = null;
  stopOnInterrupt(
    () => answer,
    () => prompt.close(),
  );
  prompt.on('SIGINT', () => process.emit('SIGINT'));
  status.say(
    `Connected to ${client.session?.node} as ${settings.userId}. Ctrl-C stops an answer, Ctrl-D leaves.`,
  );
  let open = true;
  prompt.on('close', () => {
    open = false;
  });
  prompt.prompt();
  for await (const line of prompt) {
    const question = line.trim();
    if (question !== '') {
      mostFrameBytes = client.session?.limits.maxFrameBytes ?? mostFrameBytes;
      const request = { messageId: randomUUID(), contents: question, conversationId, model, parameters };
      const earlier = chooseHistory(history, request, mostFrameBytes);
      answer = client.chat(question, { ...request, history: earlier.length > 0 ? earlier : undefined });
      try {
        const text = await printAnswer(client, answer, status);
        history.push({ role: 'user', content: question }, { role: 'assistant', content: text });
      } catch (error) {
        const { text, code } = describeError(error);
        status.say(text);
        if (client.state === 'closed') return code;
      } finally {
        answer = null;
      }
    }
    if (open) prompt.prompt();
  }
  return EXIT.ok;
}

async function askOnce(
  client: Client,
  settings: Settings,
  contents: string,
  status: Status,
): Promise<number> {
  const { conversationId, messageId, model, parameters } = settings;
  const answer = client.chat(contents, { conversationId, messageId, model, parameters });
  stopOnInterrupt(
    () => answer,
    () => process.exit(EXIT.interrupted),
  );
  await printAnswer(client, answer, status);
  return EXIT.ok;
}

function openClient(options: ClientOptions): Client {
  try {
    return createClient(options);
  } catch (error) {
    if (error instanceof ClientError) throw new UsageError(`--url: ${error.message}`);
    throw error;
  }
}

async function main(): Promise<number> {
  const settings = readSettings(process.argv.slice(2), process.env, process.stdin.isTTY === true);
  if (settings === 'help') {
    process.stdout.write(`${HELP}\n`);
    return EXIT.ok;
  }
  const contents = settings.message === '-' ? await readStdin() : settings.message;
  const { urls, userId, token } = settings;
  const status = createStatus(process.stderr);
  const client = openClient({ url: urls, userId, token, device: 'terminal', WebSocket });
  try {
    await client.connect({ timeoutMs: REACH_MS });
    watchConnection(client, () => {
      status.say(
        `The connection did not come back within ${LOST_MS / 1000} s. The answer goes on without us.`,
      );
      process.exit(EXIT.unreachable);
    });
    return contents === null
      ? await converse(client, settings, status)
      : await askOnce(client, settings, contents, status);
  } catch (error) {
    if (error instanceof ClientError && error.code === 'timeout') {
      status.say(await explainUnreachable(settings));
      return EXIT.unreachable;
    }
    const { text, code } = describeError(error);
    status.say(text);
    return code;
  } finally {
    await client.close();
  }
}

// A reader that left (`| head -1`) is no failure of ours.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(EXIT.ok);
  throw error;
});

try {
  process.exitCode = await main();
} catch (error) {
  if (error instanceof NothingRunsError) {
    process.stderr.write(`${error.message}\n`);
    process.exitCode = EXIT.unreachable;
  } else if (error instanceof UsageError) {
    process.stderr.write(`${error.message}\nTry: npm run chat -- --help\n`);
    process.exitCode = EXIT.usage;
  } else throw error;
}
