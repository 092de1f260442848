import type { ChatPayload, HistoryMessage } from '../shared/protocol.ts';

/** What goes with the next question of a conversation at the prompt. */

const HISTORY_MESSAGES = 40;

/** The latest questions, each with its answer, that fit into the frame that asks the next one; oldest first. */
export function chooseHistory(
  history: readonly HistoryMessage[],
  request: ChatPayload & { messageId: string },
  mostFrameBytes: number,
): HistoryMessage[] {
  const chosen: HistoryMessage[] = [];
  let room = mostFrameBytes - bytesOf({ type: 'chat', ...request, history: [] });
  for (let index = history.length - 2; index >= 0; index -= 2) {
    const pair = history.slice(index, index + 2);
    room -= bytesOf(pair) - 1; // a comma in the place of its brackets
    if (room < 0 || chosen.length === HISTORY_MESSAGES) break;
    chosen.unshift(...pair);
  }
  return chosen;
}

function bytesOf(value: unknown): number {
  return Buffer.byteLength(JSON.stringify(value));
}
