import { setTimeout as wait } from 'node:timers/promises';
import { RivuletError } from '../../shared/errors.ts';
import type { HandlerContext, HandlerRequest, HandlerResult } from '../handler.ts';

/**
 * An example of your own handler: a teleprinter that types the question back in capitals. Run it with
 *
 *     HANDLER=worker/models/example-handler.ts npm start
 *
 * The path is taken from the working directory; `.ts` and `.js` both work. What a handler should do:
 *
 * - Yield text as soon as it exists, in pieces of any size. Rivulet makes frames of it and keeps them.
 * - Pass `signal` to everything that waits. It aborts on cancel, on takeover by another worker and on shutdown;
 *   what you throw after that is ignored.
 * - Keep nothing between calls: the next attempt may run on another machine. `request` has all there is.
 * - Throw a `RivuletError` to fail: `temporary: true` asks for another attempt (after `retryAfterMs`, if given),
 *   `false` ends the answer at once. Its message reaches the user; any other error counts as temporary.
 * - Continue after a failure by yielding `partial` first, or ignore it: then the user sees a fresh start.
 */
export default async function* typeBack(
  request: HandlerRequest,
  { signal, attempt, partial, log }: HandlerContext,
): AsyncGenerator<string, HandlerResult> {
  if (request.contents.length > 10_000)
    throw new RivuletError('payload_too_large', 'The teleprinter takes at most 10000 characters.', {
      temporary: false,
    });

  const answer = request.contents.toUpperCase();
  // Attempt 2 goes on where attempt 1 stopped, as long as it is the same answer.
  let position = 0;
  if (attempt > 1 && partial !== '' && answer.startsWith(partial)) {
    position = partial.length;
    yield partial;
  }

  // Log facts and ids, never what people wrote.
  log.debug({ messageId: request.messageId, attempt, length: answer.length }, 'typing');

  while (position < answer.length) {
    await wait(20, undefined, { signal }); // 50 strokes a second
    yield answer.slice(position, position + 5);
    position += 5;
  }
  return { finishReason: 'stop' };
}
