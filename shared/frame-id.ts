/**
 * Frame ids, `<attempt>-<seq>`: the entry id in the log, on the wire and in `redis-cli`. They sort first by
 * attempt, then by sequence, as Redis sorts stream ids; attempt and seq are safe integers here.
 */
export interface FrameId {
  attempt: number;
  seq: number;
}

const PATTERN = /^(0|[1-9]\d{0,14})-(0|[1-9]\d{0,14})$/;

/** Parses an id; null when the text is not one. */
export function parseFrameId(text: string): FrameId | null {
  const match = PATTERN.exec(text);
  return match ? { attempt: Number(match[1]), seq: Number(match[2]) } : null;
}

export function formatFrameId(attempt: number, seq: number): string {
  return `${attempt}-${seq}`;
}

/**
 * Negative, zero or positive as `a` is below, equal to or above `b`. The empty string stands for "nothing yet"
 * and is below every id.
 */
export function compareFrameIds(a: string, b: string): number {
  if (a === b) return 0;
  if (a === '') return -1;
  if (b === '') return 1;
  const left = parseFrameId(a);
  const right = parseFrameId(b);
  if (!left || !right) throw new TypeError(`not a frame id: ${left ? b : a}`);
  return left.attempt - right.attempt || left.seq - right.seq;
}
