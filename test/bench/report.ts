import { type Spread, spread } from './statistics.ts';
import { SYSTEMS, type SystemName } from './systems.ts';
import type { Metric, Numbers, Workload } from './workloads.ts';

/** Turns the rounds of a run into a table for people and a plot. */

export interface WorkloadResult {
  workload: Workload;
  rounds: Map<SystemName, Numbers[]>;
  failures: Map<SystemName, string[]>;
}

export function summarize(rounds: Numbers[], key: string): Spread {
  return spread(rounds.map((numbers) => numbers[key] ?? Number.NaN));
}

export function format(value: number, digits = 0): string {
  if (!Number.isFinite(value)) return '–';
  return value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function formatSpread({ median, min, max, rounds }: Spread, digits = 0): string {
  if (rounds === 0) return '–';
  const range = rounds > 1 && max > min ? ` (${format(min, digits)}–${format(max, digits)})` : '';
  return `${format(median, digits)}${range}`;
}

/** How many times better the first system is than another one; NaN where there is nothing to compare. */
export function advantage(ours: number, theirs: number, better: Metric['better']): number {
  return better === 'less' ? theirs / ours : ours / theirs;
}

export function formatTable({ workload, rounds, failures }: WorkloadResult): string {
  const main = workload.metrics.find((metric) => metric.better)!;
  const ours = rounds.get('rivulet');
  const header = ['', ...workload.metrics.map((metric) => metric.title), 'Rivulet is'];
  const rows = [...rounds].map(([name, list]) => [
    SYSTEMS[name].title,
    ...workload.metrics.map((metric) => formatSpread(summarize(list, metric.key), metric.digits)),
    name === 'rivulet' || !ours
      ? ''
      : `${format(
          advantage(summarize(ours, main.key).median, summarize(list, main.key).median, main.better),
          2,
        )}×`,
  ]);
  return [
    `(${workload.letter}) ${workload.id}: ${workload.title}`,
    ...alignColumns([header, ...rows]),
    ...noise(rounds),
    ...[...failures].flatMap(([name, reasons]) =>
      reasons.map((reason) => `  ! ${SYSTEMS[name].title}: ${reason.split('\n')[0]}`),
    ),
  ].join('\n');
}

/** Lines of a table: the first column to the left, the others to the right. */
export function alignColumns(rows: string[][]): string[] {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => [...row[column]!].length)));
  return rows.map((row) =>
    row
      .map((cell, column) => {
        const space = ' '.repeat(widths[column]! - [...cell].length);
        return column === 0 ? cell + space : space + cell;
      })
      .join('  ')
      .trimEnd(),
  );
}

const NOISE_CORES = 0.2;

function noise(rounds: Map<SystemName, Numbers[]>): string[] {
  const others = spread([...rounds.values()].flat().map((numbers) => numbers.otherCores ?? 0));
  return others.max > NOISE_CORES
    ? [
        `  ! noisy: something else on this machine used ${format(others.median, 2)} cores, up to ${format(others.max, 2)}`,
      ]
    : [];
}

const COLOURS: Record<SystemName, string> = {
  rivulet: '#1668dc',
  control: '#8c8c8c',
  'bullmq-socketio': '#d4380d',
  'bullmq-pubsub': '#d48806',
  'bullmq-pubsub-batched': '#389e0d',
  'locked-list': '#722ed1',
};
const BAR = 16;
const LEFT = 290;
const WIDTH = 900;

/** Bars of the main number of each workload, with whiskers from the least to the most. */
export function drawSvg(results: WorkloadResult[], caption: string): string {
  const parts: string[] = [];
  let y = 56;
  for (const { workload, rounds } of results) {
    const metric = workload.metrics.find(({ better }) => better);
    if (!metric || rounds.size === 0) continue;
    const spreads = [...rounds].map(([name, list]) => ({ name, ...summarize(list, metric.key) }));
    const most = Math.max(...spreads.map(({ max }) => (Number.isFinite(max) ? max : 0)), 1e-9);
    const scale = (value: number) => (Math.max(0, value) / most) * (WIDTH - LEFT - 130);
    parts.push(
      `<text x="16" y="${y}" class="title">${escapeXml(`${workload.id}: ${workload.title}`)}</text>`,
      `<text x="16" y="${y + 15}" class="small">${escapeXml(metric.title)}, ${metric.better === 'less' ? 'less' : 'more'} is better</text>`,
    );
    y += 24;
    for (const { name, median, min, max, rounds: count } of spreads) {
      const middle = y + BAR / 2;
      parts.push(
        `<text x="${LEFT - 8}" y="${y + 12}" class="label">${escapeXml(SYSTEMS[name].title)}</text>`,
      );
      if (count > 0)
        parts.push(
          `<rect x="${LEFT}" y="${y}" width="${scale(median).toFixed(1)}" height="${BAR - 3}" fill="${COLOURS[name]}"/>`,
          `<path d="M${(LEFT + scale(min)).toFixed(1)} ${middle}H${(LEFT + scale(max)).toFixed(1)}" stroke="#000" stroke-width="1.5"/>`,
        );
      parts.push(
        `<text x="${(LEFT + scale(Number.isFinite(max) ? max : 0) + 6).toFixed(1)}" y="${y + 12}" class="small">${format(median, metric.digits)}</text>`,
      );
      y += BAR;
    }
    y += 30;
  }
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${y}" viewBox="0 0 ${WIDTH} ${y}">`,
    '<style>text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600;font-size:13px}.small{font-size:11px;fill:#555}.label{text-anchor:end}</style>',
    `<rect width="${WIDTH}" height="${y}" fill="#fff"/>`,
    `<text x="16" y="24" class="small">${escapeXml(caption)}</text>`,
    ...parts,
    '</svg>',
    '',
  ].join('\n');
}

function escapeXml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}
