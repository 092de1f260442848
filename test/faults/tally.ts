/**
 * What a fault class found. `lost`, `doubled`, `gaps`, `wrong`, `neverEnded` and `errors` must stay zero; `told`
 * counts answers whose loss the server said itself (a terminal `failed`, or `unknown_message`), which only the
 * classes that destroy data may have.
 */
export interface Tally {
  faults: number;
  generations: number;
  lost: number;
  told: number;
  doubled: number;
  gaps: number;
  wrong: number;
  neverEnded: number;
  errors: number;
  reconnects: number;
  /** How long each disturbed answer stood still, ms. */
  recoveries: number[];
  problems: string[];
  /** Facts of the class, for people. */
  notes: string[];
}

const PROBLEMS_KEPT = 10; // of each kind

export function createTally(): Tally {
  return {
    faults: 0,
    generations: 0,
    lost: 0,
    told: 0,
    doubled: 0,
    gaps: 0,
    wrong: 0,
    neverEnded: 0,
    errors: 0,
    reconnects: 0,
    recoveries: [],
    problems: [],
    notes: [],
  };
}

export type Verdict = 'lost' | 'told' | 'doubled' | 'gaps' | 'wrong' | 'neverEnded' | 'errors';

export function record(tally: Tally, verdict: Verdict, what: string): void {
  tally[verdict]++;
  const same = tally.problems.filter((problem) => problem.startsWith(`${verdict}:`)).length;
  if (verdict !== 'told' && same < PROBLEMS_KEPT) tally.problems.push(`${verdict}: ${what}`);
}

export function isClean(tally: Tally): boolean {
  const { lost, doubled, gaps, wrong, neverEnded, errors } = tally;
  return lost + doubled + gaps + wrong + neverEnded + errors === 0;
}

export function percentile(values: number[], share: number): number | null {
  if (values.length === 0) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)]!;
}

export interface Row {
  class: string;
  seconds: number;
  tally: Tally;
}

/** The table that people read. */
export function formatTable(rows: Row[]): string {
  const head = [
    'class',
    'faults',
    'generations',
    'lost',
    'told',
    'doubled',
    'gaps',
    'wrong',
    'never ended',
    'errors',
    'recovery p50',
    'p99',
    's',
  ];
  const ms = (value: number | null) => (value === null ? '–' : `${(value / 1000).toFixed(2)} s`);
  const lines = rows.map(({ class: name, seconds, tally }) => [
    name,
    ...[tally.faults, tally.generations, tally.lost, tally.told, tally.doubled, tally.gaps, tally.wrong].map(
      String,
    ),
    String(tally.neverEnded),
    String(tally.errors),
    ms(percentile(tally.recoveries, 0.5)),
    ms(percentile(tally.recoveries, 0.99)),
    seconds.toFixed(0),
  ]);
  const widths = head.map((title, column) =>
    Math.max(title.length, ...lines.map((line) => line[column]!.length)),
  );
  const format = (cells: string[]) =>
    `| ${cells.map((cell, column) => (column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!))).join(' | ')} |`;
  const rule = `|${widths.map((width, column) => (column === 0 ? `:${'-'.repeat(width + 1)}` : `${'-'.repeat(width + 1)}:`)).join('|')}|`;
  return [format(head), rule, ...lines.map(format)].join('\n');
}
