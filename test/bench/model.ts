import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Handler, HandlerContext, HandlerRequest, HandlerResult } from '../../worker/handler.ts';
import { LazyAbort } from '../../worker/lazy-abort.ts';
import { demoHandler } from '../../worker/models/demo.ts';
import { RunContext } from '../../worker/run-context.ts';

/**
 * The model of every system in the bench: the product's demo model, so that all deliver the same words at the same
 * cost. With `parameters.tokenPerTurn` each token comes in an event-loop turn of its own, as from a network: then
 * nothing can be merged but what waits for Redis.
 */
const benchModel: Handler = (request, context) =>
  request.parameters?.tokenPerTurn ? oneTokenATurn(request, context) : demoHandler(request, context);

export default benchModel;

async function* oneTokenATurn(
  request: HandlerRequest,
  context: HandlerContext,
): AsyncGenerator<string, HandlerResult | undefined | void> {
  const words = demoHandler(request, context);
  for (;;) {
    const next = await words.next();
    if (next.done) return next.value;
    yield next.value;
    await nextTurn();
  }
}

const log = { child: () => log } as unknown as HandlerContext['log'];

/** Runs the model for a system that has no worker of ours: calls `emit` with each token. */
export async function generate(
  request: { userId: string; messageId: string; contents: string; parameters: Record<string, unknown> },
  emit: (text: string) => void,
): Promise<void> {
  const context = new RunContext(new LazyAbort(), () => log, { attempt: 1, partial: '', trace: '' });
  for await (const text of benchModel(request, context)) emit(text);
}

/** The text that every system must deliver. */
export async function expectedText(contents: string, tokens: number, seed: number): Promise<string> {
  let text = '';
  await generate(
    { userId: 'u', messageId: 'm', contents, parameters: { tokens, intervalMs: 0, seed } },
    (part) => {
      text += part;
    },
  );
  return text;
}
