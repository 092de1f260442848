import type { Logger } from 'pino';
import type { GatewayConfig } from '../config.ts';
import { createModelList } from './model-list.ts';
import { createModerationHook } from './moderation-hook.ts';
import type { Policy } from './policy.ts';
import { createWordList } from './word-list.ts';

/** The checks at the door that the settings ask for, cheapest first. Add your own here. */
export async function createPolicies(
  config: GatewayConfig,
  log: Logger,
): Promise<{ policies: Policy[]; stop(): Promise<void> }> {
  const policies: Policy[] = [];
  const closers: (() => Promise<void>)[] = [];
  if (config.MODELS.length > 0) policies.push(createModelList(config.MODELS));
  if (config.MODERATION_WORDS) {
    const list = await createWordList({
      path: config.MODERATION_WORDS,
      onFailure: config.MODERATION_FAILURE,
      log,
    });
    closers.push(() => list.stop());
    policies.push(list);
  }
  if (config.MODERATION_URL)
    policies.push(
      createModerationHook({
        url: config.MODERATION_URL,
        timeoutMs: config.MODERATION_TIMEOUT_MS,
        onFailure: config.MODERATION_FAILURE,
        log,
      }),
    );
  return {
    policies,
    async stop() {
      for (const close of closers) await close();
    },
  };
}
