import type { ServerFrame } from '../../shared/protocol.ts';

/**
 * Our frames as the AI SDK's UI-message chunks. One generation is one assistant message with one step:
 *
 *   accepted, resumed   start {messageId} · start-step
 *   queued              data-queue {position}, transient
 *   start (again)       reset-step: the SDK takes the step's text back, as our `start` says
 *   token               text-start (once an attempt) · text-delta
 *   done                text-end · finish-step · finish {finishReason}, or abort when it was cancelled
 *   failed              data-error {code, temporary}, transient · error {errorText}
 *
 * The message's id is the generation's, in every replay, so that a replay replaces the message that it repeats.
 * Versions 5 and 6 of the SDK do not know `reset-step`, and fail on what they do not know. For them a restart
 * closes the text and adds a part `data-restart {attempt}`: what stands before the last one of these is void.
 */
export type Chunk =
  | { type: 'start'; messageId: string }
  | { type: 'start-step' | 'finish-step' | 'reset-step' }
  | { type: 'text-start' | 'text-end'; id: string }
  | { type: 'text-delta'; id: string; delta: string }
  | { type: 'data-queue'; data: { position: number }; transient: true }
  | { type: 'data-error'; data: { code: string; temporary: boolean; retryAfterMs?: number }; transient: true }
  | { type: 'data-restart'; data: { attempt: number } }
  | { type: 'finish'; finishReason: string }
  | { type: 'abort'; reason: string }
  | { type: 'error'; errorText: string };

const FINISH_REASONS = new Set(['stop', 'length', 'content-filter', 'tool-calls']);
const PROVIDERS_REASONS: Record<string, string> = {
  content_filter: 'content-filter',
  tool_calls: 'tool-calls',
};

export interface ChunkWriter {
  /** Says that there is an answer, queued or running. */
  open(): void;
  /** True when the answer has ended with this frame. */
  take(frame: ServerFrame): boolean;
}

export function createChunkWriter(options: {
  messageId: string;
  /** The client understands `reset-step`. */
  resets: boolean;
  emit(chunk: Chunk): void;
}): ChunkWriter {
  const { messageId, resets, emit } = options;
  let textId: string | null = null;
  let attempt = 0;
  let hasText = false;

  function closeText(): void {
    if (textId !== null) emit({ type: 'text-end', id: textId });
    textId = null;
  }

  return {
    open() {
      emit({ type: 'start', messageId });
      emit({ type: 'start-step' });
    },

    take(frame) {
      switch (frame.type) {
        case 'queued':
          emit({ type: 'data-queue', data: { position: frame.position }, transient: true });
          return false;
        case 'start':
          attempt = frame.attempt;
          if (!hasText) return false;
          hasText = false;
          if (resets) {
            textId = null; // the reset closes it
            emit({ type: 'reset-step' });
          } else {
            closeText();
            emit({ type: 'data-restart', data: { attempt } });
          }
          return false;
        case 'token':
          if (textId === null) {
            textId = `text-${attempt}`;
            hasText = true;
            emit({ type: 'text-start', id: textId });
          }
          emit({ type: 'text-delta', id: textId, delta: frame.text });
          return false;
        case 'done': {
          closeText();
          emit({ type: 'finish-step' });
          if (frame.finishReason === 'cancelled') {
            emit({ type: 'abort', reason: 'cancelled' });
            return true;
          }
          const reason = PROVIDERS_REASONS[frame.finishReason] ?? frame.finishReason;
          emit({ type: 'finish', finishReason: FINISH_REASONS.has(reason) ? reason : 'other' });
          return true;
        }
        case 'failed':
          closeText();
          emit({
            type: 'data-error',
            data: { code: frame.code, temporary: frame.temporary },
            transient: true,
          });
          emit({ type: 'error', errorText: frame.message });
          return true;
        default:
          return false; // `resumed`: a replay from the start follows, with its own `start`
      }
    },
  };
}
