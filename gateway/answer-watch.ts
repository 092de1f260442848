import type { ClientFrameOf } from '../shared/protocol.ts';
import type { Tracing } from '../shared/tracing.ts';
import type { AnswerWatch, Subscription } from './delivery.ts';
import type { GatewayMetrics } from './metrics.ts';

/** Metrics and the trace of one chat, from its frame to its terminal frame. Nothing here runs for each token. */
export function watchAnswer(
  user: string,
  frame: ClientFrameOf<'chat'>,
  startedMs: number,
  { metrics, tracing, node }: { metrics: GatewayMetrics; tracing: Tracing | null; node: string },
): AnswerWatch & { readonly trace: string; refused(code: string): void; joined(): void } {
  const span = tracing?.start('chat', '', {
    'rivulet.user': user,
    'rivulet.message_id': frame.messageId,
    'rivulet.node': node,
  });
  const seconds = () => (performance.now() - startedMs) / 1000;
  let open = true;
  const end = (outcome: string, failure?: string) => {
    if (!open) return;
    open = false;
    span?.set({ 'rivulet.outcome': outcome });
    span?.end(failure);
  };
  return {
    trace: span?.context ?? '',
    sawText: false,
    firstText() {
      metrics.firstToken.observe(seconds());
      span?.event('first token');
    },
    ended(complete) {
      if (open && complete) metrics.answer.observe(seconds());
      end(complete ? 'ended' : 'connection left');
    },
    refused: (code) => end('rejected', code),
    joined: () => end('joined'),
  };
}

/** Has the one who follows an answer watch it; who has left meanwhile does not. */
export function watchOrEnd(subscription: Subscription, watch: AnswerWatch): void {
  if (subscription.state === 'ended') watch.ended(false);
  else subscription.watch = watch;
}
