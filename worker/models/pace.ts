/**
 * Waits of the demo model: all that end in the same millisecond share one timer. A worker has hundreds of paced answers
 * at once, and a timer for each word of each of them is what its time would go into, and not the words.
 */
export interface Waiter {
  /** The wait is over. */
  wake(): void;
}

/** A millisecond at which somebody is to be woken. */
export interface Slot {
  readonly dueMs: number;
  readonly timer: NodeJS.Timeout;
  readonly waiters: (Waiter | null)[];
  left: number;
}

const slots = new Map<number, Slot>();

/**
 * Wakes it at `dueMs` of `performance.now()`, to the millisecond, in a later event-loop turn.
 * @returns what `cancelWait` takes
 */
export function waitUntil(dueMs: number, waiter: Waiter): Slot {
  const due = Math.ceil(dueMs);
  let slot = slots.get(due);
  if (!slot) {
    slot = {
      dueMs: due,
      timer: setTimeout(wakeAll, due - performance.now(), due),
      waiters: [],
      left: 0,
    };
    slots.set(due, slot);
  }
  slot.waiters.push(waiter);
  slot.left++;
  return slot;
}

/** Does not wake this waiter any more, if it still waits there. */
export function cancelWait(slot: Slot, waiter: Waiter): void {
  const place = slot.waiters.indexOf(waiter);
  if (place < 0) return;
  slot.waiters[place] = null;
  if (--slot.left > 0 || slots.get(slot.dueMs) !== slot) return;
  clearTimeout(slot.timer);
  slots.delete(slot.dueMs);
}

function wakeAll(due: number): void {
  const slot = slots.get(due)!;
  slots.delete(due);
  for (const waiter of slot.waiters) waiter?.wake();
}
