import { z } from 'zod';
import { ConfigError, commonSettings, parseConfig, withRedisTls } from '../shared/config.ts';
import { type RunState, readRunState, stateFolder } from './run-state.ts';

/** What the commands for people have in common: which system they are about, and how they refuse. */

/** A mistake in how a command was called; every command leaves with 2. */
export class UsageError extends Error {}

/** Says why a command failed, and how to call it if that is why. Returns its exit code. */
export function reportFailure(error: Error, help: string): number {
  const isUsage =
    error instanceof UsageError || /^ERR_PARSE_ARGS_/.test((error as NodeJS.ErrnoException).code ?? '');
  process.stderr.write(`${error.message}\n${isUsage ? `\n${help}\n` : ''}`);
  return isUsage || error instanceof ConfigError ? 2 : 1;
}

/** RIVULET_DIR asks for a certain system; another one in its place would be a surprise. */
export class NothingRunsError extends Error {}

/** The running `npm start`, or null. @throws NothingRunsError when none runs from the folder that RIVULET_DIR names */
export function findRun(env: NodeJS.ProcessEnv): RunState | null {
  const run = readRunState(stateFolder(env));
  if (run || !env.RIVULET_DIR) return run;
  throw new NothingRunsError(
    `Nothing runs from RIVULET_DIR=${env.RIVULET_DIR}. Start it: RIVULET_DIR=${quote(env.RIVULET_DIR)} npm start`,
  );
}

const { REDIS_URL, REDIS_TLS_CA, REDIS_TLS_CERT, REDIS_TLS_KEY, KEY_PREFIX } = commonSettings;
const redisSettings = z.object({ REDIS_URL, REDIS_TLS_CA, REDIS_TLS_CERT, REDIS_TLS_KEY, KEY_PREFIX });

/** The Redis that a command looks into: what its options say, else the settings, else the running `npm start`. */
export function chooseRedis(
  options: { redis?: string | undefined; prefix?: string | undefined },
  env: NodeJS.ProcessEnv,
): z.infer<typeof redisSettings> & { isNamed: boolean } {
  const named = options.redis ?? (env.REDIS_URL || undefined);
  const run = named === undefined ? findRun(env) : readRunState(stateFolder(env));
  const config = parseConfig(redisSettings, {
    ...env,
    REDIS_URL: named ?? run?.redisUrl,
    KEY_PREFIX: options.prefix ?? (env.KEY_PREFIX || run?.keyPrefix),
  });
  return { ...withRedisTls(config), isNamed: named !== undefined || run !== null };
}

/** Text of strangers, for a stream: to a terminal go no control characters but newline and tab, for it would obey them. */
export function printable(text: string, { isTTY }: { isTTY?: boolean }): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what it is about
  return isTTY ? text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, '') : text;
}

/** For a shell, where it would not be one plain word. */
export function quote(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}
