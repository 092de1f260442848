import type { ErrorCode } from '../../shared/errors.ts';
import type { ClientFrameOf } from '../../shared/protocol.ts';

/**
 * Why a policy refuses. `message` is shown to the user; `message` and `temporary` are the table's when absent. A policy
 * that cannot decide now refuses as `UNAVAILABLE`, so that clients may try again.
 */
export interface Refusal {
  code: ErrorCode;
  message?: string;
  temporary?: boolean;
  retryAfterMs?: number;
}

export const UNAVAILABLE: Refusal = {
  code: 'content_refused',
  message: 'Moderation is not available; try again later.',
  temporary: true,
  retryAfterMs: 5_000,
};

export interface PolicyRequest {
  userId: string;
  /** A question for the assistant, or a message to people. */
  frame: ClientFrameOf<'chat'> | ClientFrameOf<'send'>;
}

/**
 * A check at the door. `check` runs before anything is written, in the order of the list; the first refusal wins.
 * It MUST NOT count or change anything: the same message may be submitted again. It MAY be slow within its own
 * timeout; the client's other frames wait.
 */
export interface Policy {
  readonly name: string;
  check(request: PolicyRequest): Promise<Refusal | null> | Refusal | null;
}

/** The first refusal, or null. */
export async function checkPolicies(policies: Policy[], request: PolicyRequest): Promise<Refusal | null> {
  for (const policy of policies) {
    const refusal = await policy.check(request);
    if (refusal) return refusal;
  }
  return null;
}
