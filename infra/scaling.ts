/**
 * How many workers there should be. Up at once; down only to the most that was wanted at any time within the
 * cool-down, so that a short pause ends nobody and a load that comes and goes does not make workers flap (the
 * stabilisation window of Kubernetes' autoscaler).
 */
export interface ScalingLimits {
  min: number;
  max: number;
  /** Requests that one worker runs at a time. */
  concurrency: number;
  coolDownMs: number;
}

/** Requests that need a worker now, counted exactly: see `read-demand.ts`. */
export function workersWanted(demand: number, { min, max, concurrency }: ScalingLimits): number {
  return Math.min(max, Math.max(min, Math.ceil(demand / concurrency)));
}

/** Keeps the window. Call it with rising times. */
export function createScaler(limits: ScalingLimits): (nowMs: number, demand: number) => number {
  /** Falling values, rising times: the first is the most of the window. */
  let window: { atMs: number; wanted: number }[] = [];
  return (nowMs, demand) => {
    const wanted = workersWanted(demand, limits);
    window = window.filter((past) => past.atMs > nowMs - limits.coolDownMs && past.wanted > wanted);
    window.push({ atMs: nowMs, wanted });
    return window[0]!.wanted;
  };
}

/** A worker process as the choice of whom to let go sees it. */
export interface Candidate {
  pid: number;
  /** Requests it runs; null = not in the registry: it is still starting, or hangs. */
  running: number | null;
  startedMs: number;
}

/** Whom to let go: those still starting or hanging, then idle ones, then the least busy; the youngest first among equals. */
export function chooseToRetire(candidates: Candidate[], count: number): Candidate[] {
  const weight = ({ running }: Candidate) => running ?? -1;
  return [...candidates]
    .sort((a, b) => weight(a) - weight(b) || b.startedMs - a.startedMs)
    .slice(0, Math.max(0, count));
}
