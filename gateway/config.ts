import { z } from 'zod';
import {
  ConfigError,
  commonSettings,
  compactAfterMs,
  drainMs,
  integer,
  nodeIdSchema,
  parseConfig,
  retentionMs,
  webUrl,
  withRedisTls,
} from '../shared/config.ts';
import { parseNetwork } from './client-address.ts';
import type { DevicePolicy } from './mailboxes.ts';

const list = z.string().transform((text) =>
  text
    .split(',')
    .map((part) => part.trim())
    .filter((part) => part !== ''),
);

const apiKeys = list.refine(
  (all) => all.every((one) => /^[\x21-\x7e]+$/.test(one)),
  'API_KEYS may hold only visible ASCII characters, as bearer tokens do',
);

const networks = list.refine(
  (all) => all.every((one) => parseNetwork(one) !== null),
  'TRUSTED_PROXIES must be addresses or networks, as 10.0.0.0/8,::1',
);

const origins = list.refine(
  (all) => all.every((one) => /^(\*|null|[a-z][a-z0-9+.-]*:\/\/[^/\s]+)$/i.test(one)),
  'ALLOWED_ORIGINS must be * or origins without a path, as https://chat.example,https://localhost:3000',
);

const devicePolicy = z
  .string()
  .regex(/^(any|newest|[1-9]\d{0,2})$/, 'DEVICE_POLICY must be any, newest, or a number from 1 to 999')
  .transform((text): DevicePolicy => (text === 'any' || text === 'newest' ? text : Number(text)));

export const gatewaySettings = z
  .object({
    ...commonSettings,
    NODE_ID: nodeIdSchema,
    HOST: z.string().min(1).default('127.0.0.1'),
    PORT: integer('PORT', 0, 65_535).default(8080),
    PUBLIC_URL: webUrl('PUBLIC_URL', ', as http://gateway-1.example:8080').optional(),
    AUTH: z.enum(['none', 'jwt'], 'AUTH must be none or jwt').default('none'),
    JWT_SECRET: z.string().min(32, 'JWT_SECRET must have at least 32 characters').optional(),
    JWKS_URL: webUrl('JWKS_URL').optional(),
    JWT_ISSUER: z.string().min(1).optional(),
    JWT_AUDIENCE: z.string().min(1).optional(),
    API_KEYS: apiKeys.default([]),
    QUEUE_LIMIT: integer('QUEUE_LIMIT', 1, 1_000_000).default(100),
    USER_ACTIVE_LIMIT: integer('USER_ACTIVE_LIMIT', 1, 1_000).default(4),
    MAX_FRAME_BYTES: integer('MAX_FRAME_BYTES', 1_024, 16_777_216).default(262_144),
    ALLOWED_ORIGINS: origins.default([]),
    TLS_CERT_FILE: z.string().min(1).optional(),
    TLS_KEY_FILE: z.string().min(1).optional(),
    TRUSTED_PROXIES: networks.default([]),
    CONNECTIONS_PER_ADDRESS: integer('CONNECTIONS_PER_ADDRESS', 0, 10_000_000).default(10_000),
    CONNECTION_FRAMES_PER_SECOND: integer('CONNECTION_FRAMES_PER_SECOND', 0, 1_000_000).default(100),
    USER_FRAMES_PER_SECOND: integer('USER_FRAMES_PER_SECOND', 0, 1_000_000).default(200),
    GROUP_JOINS: z.enum(['open', 'closed'], 'GROUP_JOINS must be open or closed').default('open'),
    GROUP_MEMBERS: integer('GROUP_MEMBERS', 1, 100_000).default(10_000),
    MESSAGE_BYTES: integer('MESSAGE_BYTES', 1, 1_048_576).default(16_384),
    MESSAGE_USERS: integer('MESSAGE_USERS', 1, 100_000).default(1_000),
    INBOX_MESSAGES: integer('INBOX_MESSAGES', 1, 100_000).default(1_000),
    INBOX_AGE_MS: integer('INBOX_AGE_MS', 1_000, 31_536_000_000).default(2_592_000_000), // 30 days
    DEVICE_POLICY: devicePolicy.default('any'),
    QUOTA_PER_DAY: integer('QUOTA_PER_DAY', 0, 1_000_000_000).default(0),
    MODELS: list.default([]),
    MODERATION_WORDS: z.string().min(1).optional(),
    MODERATION_URL: webUrl('MODERATION_URL').optional(),
    MODERATION_TIMEOUT_MS: integer('MODERATION_TIMEOUT_MS', 10, 60_000).default(2_000),
    MODERATION_FAILURE: z
      .enum(['open', 'closed'], 'MODERATION_FAILURE must be open or closed')
      .default('closed'),
    RETENTION_MS: retentionMs,
    COMPACT_AFTER_MS: compactAfterMs,
    DRAIN_MS: drainMs,
  })
  .refine((config) => config.AUTH === 'none' || config.JWT_SECRET || config.JWKS_URL, {
    message: 'AUTH=jwt needs JWT_SECRET or JWKS_URL',
  })
  .refine((config) => !config.TLS_CERT_FILE === !config.TLS_KEY_FILE, {
    message: 'TLS_CERT_FILE and TLS_KEY_FILE go together',
  });

export type GatewayConfig = z.infer<typeof gatewaySettings>;

/** @throws ConfigError that names the variable */
export function readGatewayConfig(env: Record<string, string | undefined>): GatewayConfig {
  if (env.GROUPS === 'open' || env.GROUPS === 'closed')
    throw new ConfigError(
      'GROUPS is called GROUP_JOINS: bash has a GROUPS of its own, and drops what it is set to',
    );
  return withRedisTls(parseConfig(gatewaySettings, env));
}
