import type { Logger } from 'pino';
import { z } from 'zod';
import { type Policy, UNAVAILABLE } from './policy.ts';
import { moderatedTexts } from './texts.ts';

/**
 * Asks another system whether a text may pass: `POST {type, userId, messageId, texts}` → 200
 * `{"allow": true|false, "message"?}`. No answer in time, any other answer, or too many questions open at once is a
 * failure: the text passes, or is refused for now, as the operator chose.
 */

const OPEN_QUESTIONS = 512; // about what a hook of 100 ms can answer at 5,000 messages a second

const answerSchema = z.object({ allow: z.boolean(), message: z.string().max(500).optional() });

export function createModerationHook(options: {
  url: string;
  timeoutMs: number;
  onFailure: 'open' | 'closed';
  log: Logger;
}): Policy {
  const { url, timeoutMs, log } = options;
  const failure = options.onFailure === 'open' ? null : UNAVAILABLE;
  let open = 0;
  let failing = false;

  return {
    name: 'moderation-hook',
    async check({ userId, frame }) {
      if (open >= OPEN_QUESTIONS) return failure;
      open++;
      try {
        const response = await fetch(url, {
          method: 'POST',
          headers: { 'content-type': 'application/json' },
          body: JSON.stringify({
            type: frame.type,
            userId,
            messageId: frame.messageId,
            texts: moderatedTexts(frame),
          }),
          signal: AbortSignal.timeout(timeoutMs),
          redirect: 'error',
        });
        if (!response.ok) throw new Error(`it answered ${response.status}`);
        const answer = answerSchema.parse(await response.json());
        if (failing) log.info('the moderation hook answers again');
        failing = false;
        if (answer.allow) return null;
        return { code: 'content_refused', ...(answer.message ? { message: answer.message } : {}) };
      } catch (error) {
        // Said once per outage: there may be thousands of messages in it.
        if (!failing)
          log.warn(
            { err: (error as Error).message, failure: options.onFailure },
            'the moderation hook fails',
          );
        failing = true;
        return failure;
      } finally {
        open--;
      }
    },
  };
}
