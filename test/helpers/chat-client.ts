import { WebSocket } from 'ws';
import type { ServerFrame, ServerFrameOf } from '../../shared/protocol.ts';

/**
 * A client for tests that reads as a conversation: send a frame, wait for the next one. It is raw on purpose: no
 * reconnects, no resumes, every frame visible.
 */
export interface TestClient {
  readonly frames: ServerFrame[];
  /** Settles with the close code. */
  readonly closed: Promise<{ code: number; reason: string }>;
  readonly socket: WebSocket;
  send(frame: object | string): void;
  /** The next frame that was not taken yet; of a type and message id, if given (others are passed over). */
  next<T extends ServerFrame['type']>(
    type: T,
    messageId?: string,
    timeoutMs?: number,
  ): Promise<ServerFrameOf<T>>;
  /** Waits for the terminal frame of a message and returns its text after the last start, with all its ids. */
  answer(messageId: string, timeoutMs?: number): Promise<Answer>;
  close(): void;
}

export interface Answer {
  text: string;
  ids: string[];
  starts: number;
  end: ServerFrameOf<'done'> | ServerFrameOf<'failed'>;
}

const TIMEOUT_MS = 20_000; // a bound for a hang, not a measure

/** Opens a socket and, with a user id, binds it (waits for `ready`). */
export async function openChat(
  url: string,
  userId?: string | number,
  init: object = {},
): Promise<TestClient> {
  const socket = new WebSocket(
    userId === undefined ? url : `${url}?userId=${encodeURIComponent(String(userId))}`,
  );
  const frames: ServerFrame[] = [];
  let taken = 0;
  const waiting = new Set<() => void>();
  const wake = () => {
    for (const look of [...waiting]) look();
  };
  let isClosed = false;
  const closed = new Promise<{ code: number; reason: string }>((resolve) => {
    socket.on('close', (code, reason) => {
      isClosed = true;
      resolve({ code, reason: reason.toString() });
      wake();
    });
  });
  socket.on('message', (data) => {
    frames.push(JSON.parse(data.toString()) as ServerFrame);
    wake();
  });
  await new Promise<void>((resolve, reject) => {
    socket.on('open', resolve);
    socket.on('error', reject);
  });

  function until<T>(what: string, timeoutMs: number, find: () => T | undefined): Promise<T> {
    return new Promise((resolve, reject) => {
      const done = (error: Error | null, value?: T) => {
        clearTimeout(timer);
        waiting.delete(look);
        if (error) reject(error);
        else resolve(value as T);
      };
      const timer = setTimeout(
        () =>
          done(
            new Error(
              `no ${what} within ${timeoutMs} ms; the last frames: ${JSON.stringify(frames.slice(-5))}`,
            ),
          ),
        timeoutMs,
      );
      const look = () => {
        const value = find();
        if (value !== undefined) done(null, value);
        else if (isClosed)
          done(new Error(`closed while waiting for ${what}: ${JSON.stringify(frames.slice(-5))}`));
      };
      waiting.add(look);
      look();
    });
  }

  const client: TestClient = {
    frames,
    closed,
    socket,
    send(frame) {
      socket.send(typeof frame === 'string' ? frame : JSON.stringify(frame));
    },
    next(type, messageId, timeoutMs = TIMEOUT_MS) {
      return until(`${type} ${messageId ?? ''}`, timeoutMs, () => {
        for (let index = taken; index < frames.length; index++) {
          const frame = frames[index]!;
          if (
            frame.type !== type ||
            (messageId !== undefined && (frame as { messageId?: string }).messageId !== messageId)
          )
            continue;
          taken = index + 1;
          return frame as ServerFrameOf<typeof type>;
        }
        return undefined;
      });
    },
    async answer(messageId, timeoutMs = TIMEOUT_MS) {
      const end = await until(`end of ${messageId}`, timeoutMs, () =>
        frames.find(
          (frame): frame is Answer['end'] =>
            (frame.type === 'done' || frame.type === 'failed') && frame.messageId === messageId,
        ),
      );
      return readAnswer(frames, messageId, end);
    },
    close() {
      socket.terminate();
    },
  };
  if (userId !== undefined) {
    client.send({ type: 'init', userId, ...init });
    await client.next('ready');
  }
  return client;
}

/** Puts an answer together from frames, as a user interface would. */
export function readAnswer(frames: ServerFrame[], messageId: string, end: Answer['end']): Answer {
  const answer: Answer = { text: '', ids: [], starts: 0, end };
  for (const frame of frames) {
    if (!('messageId' in frame) || frame.messageId !== messageId) continue;
    switch (frame.type) {
      case 'start':
        answer.text = '';
        answer.starts++;
        answer.ids.push(frame.id);
        break;
      case 'token':
        answer.text += frame.text;
        answer.ids.push(frame.id);
        break;
      case 'done':
      case 'failed':
        answer.ids.push(frame.id);
        break;
      default:
    }
  }
  return answer;
}
