import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { ConfigError } from '../../shared/config.ts';
import type { Handler } from '../handler.ts';
import { countPromptTokens } from './context-budget.ts';
import { demoHandler } from './demo.ts';
import { createOpenAiHandler } from './openai.ts';
import type { ModelSettings } from './settings.ts';

/**
 * Finds the handler that the settings name: a built-in one, or the default export of a module. A path is taken
 * from the working directory. Throws a `ConfigError` that names the variable to mend.
 */
export async function loadHandler(settings: ModelSettings): Promise<Handler> {
  if (settings.HANDLER === 'demo') return demoHandler;
  if (settings.HANDLER === 'openai') return loadOpenAiHandler(settings);
  return loadModule(settings.HANDLER);
}

async function loadOpenAiHandler(settings: ModelSettings): Promise<Handler> {
  if (!settings.OPENAI_BASE_URL)
    throw new ConfigError(
      'OPENAI_BASE_URL is required with HANDLER=openai, for example http://127.0.0.1:11434/v1',
    );
  // Also loads the tokenizer now rather than under the first long conversation.
  const empty = await countPromptTokens([
    { role: 'system', content: settings.SYSTEM_PROMPT ?? '' },
    { role: 'user', content: '' },
  ]);
  if (empty >= settings.CONTEXT_TOKENS)
    throw new ConfigError(
      `SYSTEM_PROMPT leaves no room for a question: it takes ${empty} of the ${settings.CONTEXT_TOKENS} tokens in CONTEXT_TOKENS`,
    );
  return createOpenAiHandler({
    baseUrl: settings.OPENAI_BASE_URL,
    apiKey: settings.OPENAI_API_KEY,
    model: settings.MODEL,
    systemPrompt: settings.SYSTEM_PROMPT,
    contextTokens: settings.CONTEXT_TOKENS,
    timeouts: {
      firstTokenMs: settings.FIRST_TOKEN_TIMEOUT_MS,
      betweenTokensMs: settings.TOKEN_TIMEOUT_MS,
    },
  });
}

async function loadModule(path: string): Promise<Handler> {
  const file = resolve(path);
  if (!existsSync(file))
    throw new ConfigError(
      `HANDLER: there is no file ${file}. Use demo, openai or a path to a .ts or .js module`,
    );
  let module: { default?: unknown };
  try {
    module = await import(pathToFileURL(file).href);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new ConfigError(`HANDLER: ${file} does not load: ${reason}`, { cause });
  }
  const handler = unwrapCommonJs(module.default);
  if (typeof handler !== 'function')
    throw new ConfigError(
      `HANDLER: ${file} has no function as its default export; it needs "export default async function* (request, context) { … }"`,
    );
  return handler as Handler;
}

/** A module compiled to CommonJS shows its default export one level down. */
function unwrapCommonJs(exported: unknown): unknown {
  return typeof exported === 'object' && exported !== null && 'default' in exported
    ? exported.default
    : exported;
}
