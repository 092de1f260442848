import { z } from 'zod';
import { describeIssues } from './protocol.ts';

/**
 * Settings come from environment variables and are parsed once, in each `main.ts`. Empty means unset. A wrong
 * value stops the start with the variable's name.
 */
export class ConfigError extends Error {}

export function parseConfig<T extends z.ZodType>(
  schema: T,
  env: Record<string, string | undefined>,
): z.infer<T> {
  const present = Object.fromEntries(
    Object.entries(env).filter(([, value]) => value !== undefined && value !== ''),
  );
  const parsed = schema.safeParse(present);
  if (parsed.success) return parsed.data;
  throw new ConfigError(`Wrong settings: ${describeIssues(parsed.error)}`);
}

/** A whole number from text, within bounds. */
export const integer = (name: string, min: number, max: number) =>
  z
    .string(`${name} is required`)
    .regex(/^\d+$/, `${name} must be a whole number`)
    .transform(Number)
    .refine((value) => value >= min && value <= max, `${name} must be from ${min} to ${max}`);

/** An address that `fetch` takes: it refuses those with a password in them. */
export function webUrl(name: string, example = '') {
  const error = `${name} must be an http:// or https:// address without user and password${example}`;
  return z.url({ protocol: /^https?$/, error }).refine((text) => !/^[^/]*\/\/[^/?#]*@/.test(text), error);
}

const LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'] as const;
const REDIS_SCHEMES = /^(redis|rediss|redis\+sentinel|rediss\+sentinel|redis\+cluster|rediss\+cluster):\/\//;

/** Settings that every process takes. */
export const commonSettings = {
  REDIS_URL: z
    .string()
    .regex(
      REDIS_SCHEMES,
      'REDIS_URL must start with redis://, rediss://, redis+sentinel:// or redis+cluster://',
    )
    .default('redis://127.0.0.1:6379'),
  /** Files for `rediss://`: an authority of your own, and a certificate with its key if the server asks for one. */
  REDIS_TLS_CA: z.string().optional(),
  REDIS_TLS_CERT: z.string().optional(),
  REDIS_TLS_KEY: z.string().optional(),
  KEY_PREFIX: z
    .string()
    .regex(/^[A-Za-z0-9._:-]{1,64}$/, 'KEY_PREFIX may hold 1 to 64 of A-Z a-z 0-9 . _ : -')
    .default('chat:'),
  /** Where traces go, as http://collector:4318; unset = no traces, and nothing loaded for them. */
  OTEL_EXPORTER_OTLP_ENDPOINT: webUrl('OTEL_EXPORTER_OTLP_ENDPOINT').optional(),
  LOG_LEVEL: z.enum(LEVELS, `LOG_LEVEL must be one of ${LEVELS.join(', ')}`).default('info'),
};

/** The settings with the TLS files as part of REDIS_URL, so that one text says how to reach Redis. */
export function withRedisTls<
  T extends {
    REDIS_URL: string;
    REDIS_TLS_CA?: string | undefined;
    REDIS_TLS_CERT?: string | undefined;
    REDIS_TLS_KEY?: string | undefined;
  },
>(config: T): T {
  const files = new URLSearchParams();
  if (config.REDIS_TLS_CA) files.set('ca', config.REDIS_TLS_CA);
  if (config.REDIS_TLS_CERT) files.set('cert', config.REDIS_TLS_CERT);
  if (config.REDIS_TLS_KEY) files.set('key', config.REDIS_TLS_KEY);
  if (files.size === 0) return config;
  if (!config.REDIS_URL.startsWith('rediss'))
    throw new ConfigError('REDIS_TLS_CA, REDIS_TLS_CERT and REDIS_TLS_KEY need a REDIS_URL with rediss://');
  const separator = config.REDIS_URL.includes('?') ? '&' : '?';
  return { ...config, REDIS_URL: `${config.REDIS_URL}${separator}${files}` };
}

/** Node ids appear in key names and in routes. */
export const nodeIdSchema = z
  .string('NODE_ID is required: a unique name for this gateway, for example n1')
  .regex(/^[A-Za-z0-9._-]{1,64}$/, 'NODE_ID may hold 1 to 64 of A-Z a-z 0-9 . _ -');

export const retentionMs = integer('RETENTION_MS', 1_000, 86_400_000).default(600_000);
export const compactAfterMs = integer('COMPACT_AFTER_MS', 0, 86_400_000).default(30_000); // slow readers have this long
export const drainMs = integer('DRAIN_MS', 0, 3_600_000).default(30_000);
