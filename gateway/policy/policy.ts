import type { ErrorCode } from '../../shared/errors.ts';
import type { ClientFrameOf } from '../../shared/protocol.ts';

/** Why a policy refuses. `message` is shown to the user; the table's text when absent. */
export interface Refusal {
  code: ErrorCode;
  message?: string;
  retryAfterMs?: number;
}

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
