/**
 * The clock that never jumps, in whole milliseconds. For times that an idle socket keeps: a fraction would make each of them
 * an object of its own.
 */
export const nowMs = (): number => Math.floor(performance.now());
