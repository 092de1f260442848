import { userInfo } from 'node:os';
import { parseArgs } from 'node:util';
import { type AccessStore, createAccessStore, UNLIMITED } from '../shared/access.ts';
import { createKeys } from '../shared/keys.ts';
import { createNodeRegistry } from '../shared/node-registry.ts';
import { createLiveNodes, readPresence } from '../shared/presence.ts';
import { parseUserId } from '../shared/protocol.ts';
import { createRedis, type RedisConnection } from '../shared/redis.ts';
import { chooseRedis, reportFailure, UsageError } from './command.ts';

/** `npm run users`: bans, locks and quotas, for administrators. Every change is kept in the audit stream. */

const HELP = `Usage: npm run users -- <command> [options]

  ban <user> [reason…]          for good; closes the user's connections on every node (4502)
  unban <user>
  lock <user> <until>           for a time: 30m, 12h, 7d, or a date as 2030-01-31T12:00Z; closes connections too
  unlock <user>
  quota <user> <number|unlimited|default>   conversations a day
  show <user>                   what is decided, used today, and connected
  audit [number]                the latest decisions

  --by NAME      who decides; otherwise the name of this login
  --redis URL    which Redis; otherwise REDIS_URL, the running npm start, redis://127.0.0.1:6379
  --prefix TEXT  prefix of the keys; otherwise KEY_PREFIX, the running npm start, chat:`;

const COMMANDS = ['ban', 'unban', 'lock', 'unlock', 'quota', 'show', 'audit'];
const REACH_MS = 2_500;

async function main(args: string[], env: NodeJS.ProcessEnv): Promise<number> {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      by: { type: 'string' },
      redis: { type: 'string' },
      prefix: { type: 'string' },
      help: { type: 'boolean', short: 'h' },
    },
  });
  if (values.help) {
    console.log(HELP);
    return 0;
  }
  const [command] = positionals;
  if (!command) throw new UsageError('a command is missing');
  if (!COMMANDS.includes(command)) throw new UsageError(`there is no command ${command}`);
  if (values.by?.trim() === '') throw new UsageError('--by must name somebody');
  const config = chooseRedis(values, env);
  const redis = createRedis({ url: config.REDIS_URL, name: 'users' });
  try {
    await redis.connected(REACH_MS);
    for (const line of await runCommand(positionals, {
      redis,
      prefix: config.KEY_PREFIX,
      by: values.by ?? userInfo().username,
    }))
      console.log(line);
    return 0;
  } finally {
    await redis.close();
  }
}

/** Carries a command out and returns the lines to print. */
async function runCommand(
  [command, ...rest]: string[],
  { redis, prefix, by }: { redis: RedisConnection; prefix: string; by: string },
): Promise<string[]> {
  const keys = createKeys(prefix);
  const access = createAccessStore({ redis, keys });
  if (command === 'audit') {
    refuseMore(rest.slice(1));
    const most = rest[0] === undefined ? 20 : readNumber(rest[0]);
    if (most === 0) throw new UsageError('audit shows at least one decision');
    const entries = await access.readAudit(most);
    if (entries.length === 0) return ['No decisions.'];
    return entries.map(
      ({ time, by, action, user, details }) =>
        `${new Date(time).toISOString()}  ${by}  ${action} ${user}${details ? `  ${details}` : ''}`,
    );
  }
  const parsed = parseUserId(rest[0]);
  if ('reason' in parsed) throw new UsageError(parsed.reason);
  const user = parsed.userId;
  const argument = rest.slice(1).join(' ');
  if (command === 'unban' || command === 'unlock' || command === 'show') refuseMore(rest.slice(1));
  switch (command) {
    case 'ban':
      await access.ban(user, argument || 'no reason given', by);
      return [`${user} is banned; connections are being closed`];
    case 'unban':
      await access.unban(user, by);
      return [`${user} is not banned any more`];
    case 'lock': {
      const untilMs = readUntil(argument, Date.now());
      await access.lock(user, untilMs, by);
      return [`${user} is locked until ${new Date(untilMs).toISOString()}; connections are being closed`];
    }
    case 'unlock':
      await access.unlock(user, by);
      return [`${user} is not locked any more`];
    case 'quota': {
      const quota =
        argument === 'default' ? null : argument === 'unlimited' ? UNLIMITED : readNumber(argument);
      await access.setQuota(user, quota, by);
      return [`${user}: ${describeQuota(quota)}`];
    }
    default: // show
      return show(user, access, redis, keys);
  }
}

async function show(
  user: string,
  access: AccessStore,
  redis: RedisConnection,
  keys: ReturnType<typeof createKeys>,
): Promise<string[]> {
  const { banned, lockedUntil, quota, usedToday } = await access.read(user);
  const [seconds] = await redis.client.time();
  const live = createLiveNodes(await createNodeRegistry({ redis, keys }).nodes(), Number(seconds) * 1_000);
  const [connections] = await readPresence({ redis, keys }, [user], live);
  const place = await redis.client.xlen(keys.inbox(user));
  return [
    `user         ${user}`,
    `banned       ${banned === null ? 'no' : `yes: ${banned}`}`,
    `locked       ${lockedUntil === null ? 'no' : `until ${new Date(lockedUntil).toISOString()}`}`,
    `quota        ${describeQuota(quota)}; counted today: ${usedToday}`,
    `inbox        ${place} messages`,
    ...connections!.map(
      ({ node, device, since }) => `connected    ${device} on ${node} since ${new Date(since).toISOString()}`,
    ),
  ];
}

function describeQuota(quota: number | null): string {
  if (quota === null) return 'conversations a day as everybody';
  return quota < 0 ? 'any number of conversations a day' : `${quota} conversations a day`;
}

function refuseMore(words: string[]): void {
  if (words.length > 0) throw new UsageError(`Unexpected argument '${words[0]}'`);
}

function readNumber(text: string): number {
  if (!/^\d{1,9}$/.test(text)) throw new UsageError(`"${text}" is not a number`);
  return Number(text);
}

const UNITS_MS: Record<string, number> = { m: 60_000, h: 3_600_000, d: 86_400_000 };
const DATE = /^(\d{4}-\d\d-\d\d)(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d)?)?$/;

/** The time of a date that is in the calendar, else NaN: `Date.parse` takes February 31 for March 3, and words for nothing. */
function parseDate(text: string): number {
  const day = DATE.exec(text)?.[1];
  if (day === undefined) return Number.NaN;
  const isThere = new Date(Date.parse(day) || 0).toISOString().startsWith(day);
  return isThere ? Date.parse(text) : Number.NaN;
}

/** A time to come: a span from now, or a date. */
function readUntil(text: string, nowMs: number): number {
  const span = /^(\d{1,6})([mhd])$/.exec(text);
  const untilMs = span ? nowMs + Number(span[1]) * UNITS_MS[span[2]!]! : parseDate(text);
  if (Number.isNaN(untilMs))
    throw new UsageError(`"${text}" is neither a span as 12h nor a date as 2030-01-31 or 2030-01-31T12:00Z`);
  if (untilMs <= nowMs) throw new UsageError(`${text} is in the past`);
  return untilMs;
}

main(process.argv.slice(2), process.env).then(
  (code) => process.exit(code),
  (error: Error) => process.exit(reportFailure(error, HELP)),
);
