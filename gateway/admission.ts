import type { Logger } from 'pino';
import { ERRORS, type ErrorCode } from '../shared/errors.ts';
import type { GenerationStore } from '../shared/generation-store.ts';
import {
  type ChatPayload,
  type ClientFrameOf,
  type GenerationStatus,
  isOpenStatus,
} from '../shared/protocol.ts';
import { isConnectionError, retrying } from '../shared/redis.ts';
import type { RequestQueue } from '../shared/request-queue.ts';
import { checkPolicies, type Policy, type Refusal } from './policy/policy.ts';
import type { QueuePlaces } from './queue-places.ts';

/**
 * Admission: policies, the record, the request stream, in that order. The record is the truth: whoever finds one
 * joins it, and has its request doubted: it is appended again if neither stream nor retry set holds it (a crash came
 * between the two steps, or the stream was lost). What was accepted before is joined although a policy refuses it now.
 */

export type Admission =
  | { state: 'created'; position: number; home: string }
  | { state: 'joined'; status: GenerationStatus; position: number; home: string }
  | {
      state: 'rejected';
      code: ErrorCode;
      message: string;
      temporary: boolean;
      retryAfterMs?: number;
      position?: number;
    };

const FULL_RETRY_MS = 2_000; // when the queue is full; grows with its length below
const FULL_RETRY_MAX_MS = 30_000;
const LOOK_MS = 1_000; // for what a refused question may have been before

export function createAdmission(parts: {
  node: string;
  store: GenerationStore;
  queue: RequestQueue;
  places: QueuePlaces;
  policies: Policy[];
  queueLimit: number;
  userActiveLimit: number;
  quotaPerDay: number;
  isDraining: () => boolean;
  log: Logger;
}) {
  const { node, store, queue, places, log } = parts;

  function reject(
    code: ErrorCode,
    extra: { message?: string; temporary?: boolean; retryAfterMs?: number; position?: number } = {},
  ): Admission {
    return {
      state: 'rejected',
      code,
      message: ERRORS[code].message,
      temporary: ERRORS[code].temporary,
      ...extra,
    };
  }

  /** Where the request is in its queue; appended again, on this node, if it is nowhere and its generation still open. */
  async function locate(
    user: string,
    messageId: string,
    home: string,
  ): Promise<{ position: number; home: string }> {
    const position = await queue.find(home, user, messageId);
    if (position >= 0) return { position, home };
    if (!(await store.moveHome(user, messageId, node))) return { position: 0, home }; // it has ended meanwhile
    log.warn({ user, messageId, home }, 'request was not in its stream; appending it again');
    const appended = await retrying(() => queue.enqueue(node, user, messageId, Number.MAX_SAFE_INTEGER));
    return { position: appended.position, home: node };
  }

  async function join(
    user: string,
    messageId: string,
    { status, node: home }: { status: GenerationStatus; node: string },
  ): Promise<Admission> {
    if (!isOpenStatus(status)) return { state: 'joined', status, position: 0, home: '' };
    places.doubt(home, user, messageId);
    const position = status === 'running' ? 0 : await places.find(home, user, messageId);
    return { state: 'joined', status, position, home };
  }

  return {
    async admit(user: string, frame: ClientFrameOf<'chat'>, trace = ''): Promise<Admission> {
      const { messageId } = frame;
      const refusal: Refusal | null = parts.isDraining()
        ? { code: 'shutting_down' }
        : await checkPolicies(parts.policies, { userId: user, frame });
      if (refusal) {
        const asked = retrying(() => store.inspect({ user, messageId }), { deadlineMs: LOOK_MS });
        const record = await asked.catch(() => null);
        if (record) return join(user, messageId, record);
        const { code, ...extra } = refusal;
        return reject(code, extra);
      }
      const payload: ChatPayload = {
        contents: frame.contents,
        ...(frame.history ? { history: frame.history } : {}),
        ...(frame.conversationId ? { conversationId: frame.conversationId } : {}),
        ...(frame.model ? { model: frame.model } : {}),
        ...(frame.parameters ? { parameters: frame.parameters } : {}),
      };
      // `admit` is repeated on a lost connection: the second time it may find what the first one made.
      let repeated = false;
      const admitted = await retrying(async () => {
        const again = repeated;
        repeated = true;
        const result = await store.admit({
          user,
          messageId,
          node,
          payload,
          userActiveLimit: parts.userActiveLimit,
          quotaPerDay: parts.quotaPerDay,
          queueLimit: parts.queueLimit,
          trace,
        });
        return again && result.state === 'joined' && result.status === 'queued' && result.node === node
          ? { state: 'uncertain' as const }
          : result;
      });
      switch (admitted.state) {
        case 'refused':
          return reject(admitted.code, admitted.retryAfterMs ? { retryAfterMs: admitted.retryAfterMs } : {});
        case 'joined':
          return join(user, messageId, admitted);
        case 'uncertain':
        case 'created': {
          try {
            if (admitted.state === 'created') {
              const { position, full } =
                admitted.queued ??
                (await queue.enqueue(
                  node,
                  user,
                  messageId,
                  parts.queueLimit,
                  trace,
                  JSON.stringify(payload),
                ));
              if (!full) return { state: 'created', position, home: node };
              if (!admitted.queued) await store.forget(user, messageId);
              return reject('queue_full', {
                position,
                retryAfterMs: Math.min(FULL_RETRY_MAX_MS, FULL_RETRY_MS + 50 * position),
              });
            }
          } catch (error) {
            if (!isConnectionError(error)) throw error;
          }
          // The answer was lost: it may or may not be in the stream.
          const place = await locate(user, messageId, node);
          return { state: 'created', ...place };
        }
        default:
          return admitted satisfies never;
      }
    },
    locate,
  };
}

export type AdmissionDesk = ReturnType<typeof createAdmission>;
