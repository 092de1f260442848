import type { Latency } from './load-plan.ts';

/** Latencies in fixed memory: steps of 10 µs up to 100 ms, then of 1 ms up to 100 s. */
const FINE = 10_000;
const COARSE = 100_000;

export class Histogram {
  private readonly counts = new Uint32Array(FINE + COARSE);
  private total = 0;
  private highest = 0;

  add(ms: number, times = 1): void {
    const value = Math.max(ms, 0);
    const index = value < 100 ? (value * 100) | 0 : Math.min(FINE + COARSE - 1, FINE + ((value - 100) | 0));
    this.counts[index] = this.counts[index]! + times;
    this.total += times;
    if (value > this.highest) this.highest = value;
  }

  percentile(share: number): number {
    let left = Math.ceil(this.total * share);
    if (left === 0) return Number.NaN;
    for (let index = 0; index < this.counts.length; index++) {
      left -= this.counts[index]!;
      if (left <= 0) return index < FINE ? (index + 1) / 100 : 100 + index - FINE + 1;
    }
    return this.highest;
  }

  summary(): Latency {
    return {
      count: this.total,
      p50: this.percentile(0.5),
      p99: this.percentile(0.99),
      max: this.total ? this.highest : Number.NaN,
    };
  }
}
