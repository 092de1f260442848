import { z } from 'zod';
import { integer } from '../../shared/config.ts';

/**
 * Settings of the models, spread into the worker's schema: `z.object({ ...commonSettings, ...modelSettings })`.
 *
 * A wait for the model has three limits. The first token may take long (a local server loads its model then),
 * the next ones may not. Waits above 300 s are refused, since Node's own HTTP client gives up there.
 */
export const modelSettings = {
  /** `demo`, `openai`, or a path to a module whose default export is a handler. */
  HANDLER: z.string().max(4096).default('demo'),
  /** See `chatCompletionsUrl` in `openai.ts` for what may be left out. Required with `HANDLER=openai`. */
  OPENAI_BASE_URL: z
    .string()
    .refine(isHttpUrl, 'OPENAI_BASE_URL must be an http:// or https:// address without user and password')
    .optional(),
  OPENAI_API_KEY: z
    .string()
    .regex(/^[\x21-\x7e]+$/, 'OPENAI_API_KEY may hold only visible ASCII characters')
    .optional(),
  /** Sent when the request names no model. Servers with one model may not need it. */
  MODEL: z.string().max(256).optional(),
  SYSTEM_PROMPT: z.string().max(100_000).optional(),
  /** Tokens that system prompt, history and question may take together. */
  CONTEXT_TOKENS: integer('CONTEXT_TOKENS', 16, 10_000_000).default(8192),
  FIRST_TOKEN_TIMEOUT_MS: integer('FIRST_TOKEN_TIMEOUT_MS', 1, 300_000).default(120_000),
  TOKEN_TIMEOUT_MS: integer('TOKEN_TIMEOUT_MS', 1, 300_000).default(30_000),
  /** One answer in all, first token included. */
  GENERATION_TIMEOUT_MS: integer('GENERATION_TIMEOUT_MS', 100, 86_400_000).default(600_000),
};

export type ModelSettings = z.infer<z.ZodObject<typeof modelSettings>>;

function isHttpUrl(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const url = new URL(text);
  return /^https?:$/.test(url.protocol) && url.username === '' && url.password === '';
}
