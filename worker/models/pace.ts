/**
 * Waits of the demo model: all that end in the same millisecond share one timer. A worker has hundreds of paced answers
 * at once, and a timer for each word of each of them is what its time would go into, and not the words.
 */
export interface Sleeper {
  /** The wait is over. */
  wake(): void;
}

/** A millisecond at which somebody is to be woken. */
export interface Bed {
  readonly dueMs: number;
  readonly timer: NodeJS.Timeout;
  readonly sleepers: (Sleeper | null)[];
  left: number;
}

const beds = new Map<number, Bed>();

/**
 * Wakes the sleeper at `dueMs` of `performance.now()`, to the millisecond, in a later event-loop turn.
 * @returns what `leaveBed` takes
 */
export function sleepUntil(dueMs: number, sleeper: Sleeper): Bed {
  const due = Math.ceil(dueMs);
  let bed = beds.get(due);
  if (!bed) {
    bed = {
      dueMs: due,
      timer: setTimeout(wakeAll, due - performance.now(), due),
      sleepers: [],
      left: 0,
    };
    beds.set(due, bed);
  }
  bed.sleepers.push(sleeper);
  bed.left++;
  return bed;
}

/** Does not wake this sleeper any more, if it still sleeps there. */
export function leaveBed(bed: Bed, sleeper: Sleeper): void {
  const place = bed.sleepers.indexOf(sleeper);
  if (place < 0) return;
  bed.sleepers[place] = null;
  if (--bed.left > 0 || beds.get(bed.dueMs) !== bed) return;
  clearTimeout(bed.timer);
  beds.delete(bed.dueMs);
}

function wakeAll(due: number): void {
  const bed = beds.get(due)!;
  beds.delete(due);
  for (const sleeper of bed.sleepers) sleeper?.wake();
}
