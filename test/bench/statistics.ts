export interface Spread {
  median: number;
  min: number;
  max: number;
  rounds: number;
}

/** Median with the least and the most of some rounds; rounds without a number are left out. */
export function spread(values: number[]): Spread {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const half = sorted.length >> 1;
  const median =
    sorted.length === 0
      ? Number.NaN
      : sorted.length % 2
        ? sorted[half]!
        : (sorted[half - 1]! + sorted[half]!) / 2;
  return {
    median,
    min: sorted[0] ?? Number.NaN,
    max: sorted.at(-1) ?? Number.NaN,
    rounds: sorted.length,
  };
}
