/** The plot of `npm run autoscaler -- --plot`: three panels over one time axis, as an SVG without scripts. */
export interface ScalingSample {
  atMs: number;
  /** Requests ever appended; its rise is the load. */
  appended: number;
  /** Waiting, running and due. */
  open: number;
  running: number;
  target: number;
  workers: number;
}

interface Line {
  name: string;
  colour: string;
  values: number[];
}

const WIDTH = 900;
const PANEL = 150;
const LEFT = 56;
const GAP = 46;
const TOP = 34;
const RATE_WINDOW_MS = 1_000; // shorter ones show the poll, not the load

/** Halves old samples; the newest stays. */
export function thin(samples: ScalingSample[]): ScalingSample[] {
  return samples.filter((_, index) => (samples.length - 1 - index) % 2 === 0);
}

/** Requests per second over the last second before each sample. */
export function loadOf(samples: ScalingSample[]): number[] {
  let from = 0;
  return samples.map((sample) => {
    while (from + 1 < samples.length && samples[from + 1]!.atMs <= sample.atMs - RATE_WINDOW_MS) from++;
    const past = samples[from]!;
    const ms = Math.max(RATE_WINDOW_MS, sample.atMs - past.atMs);
    return Math.max(0, ((sample.appended - past.appended) * 1000) / ms);
  });
}

export function drawScaling(samples: ScalingSample[]): string {
  const height = TOP + 3 * (PANEL + GAP);
  const firstMs = samples[0]?.atMs ?? 0;
  const spanMs = Math.max(1_000, (samples.at(-1)?.atMs ?? 0) - firstMs);
  const x = (index: number) => LEFT + ((samples[index]!.atMs - firstMs) / spanMs) * (WIDTH - LEFT - 16);
  const panels: { title: string; lines: Line[]; steps: boolean }[] = [
    {
      title: 'Load: requests appended per second',
      lines: [{ name: 'load', colour: '#8250df', values: loadOf(samples) }],
      steps: false,
    },
    {
      title: 'Queue: requests',
      lines: [
        {
          name: 'open (waiting + running + due)',
          colour: '#cf222e',
          values: samples.map(({ open }) => open),
        },
        {
          name: 'running (as workers tell it, about 1 s late)',
          colour: '#1a7f37',
          values: samples.map(({ running }) => running),
        },
      ],
      steps: false,
    },
    {
      title: 'Workers: processes',
      lines: [
        { name: 'target', colour: '#9a6700', values: samples.map(({ target }) => target) },
        { name: 'alive', colour: '#0969da', values: samples.map(({ workers }) => workers) },
      ],
      steps: true,
    },
  ];
  const body = panels.map(({ title, lines, steps }, row) => {
    const top = TOP + row * (PANEL + GAP);
    const most = niceTop(lines.reduce((max, line) => line.values.reduce((a, b) => Math.max(a, b), max), 0));
    const y = (value: number) => top + PANEL - (value / most) * PANEL;
    const paths = lines.map(({ colour, values }) => {
      const points = values.map((value, index) => {
        const to = `${x(index).toFixed(1)},${y(value).toFixed(1)}`;
        return steps && index > 0 ? `${x(index).toFixed(1)},${y(values[index - 1]!).toFixed(1)} ${to}` : to;
      });
      return `<polyline fill="none" stroke="${colour}" stroke-width="1.5" points="${points.join(' ')}"/>`;
    });
    // Beside the title, where no line can cross it.
    const legend = lines
      .map(({ name, colour }) => `<tspan dx="14" fill="${colour}">${name}</tspan>`)
      .join('');
    return [
      `<text x="${LEFT}" y="${top - 8}"><tspan font-weight="bold">${title}</tspan>${legend}</text>`,
      `<path d="M${LEFT} ${top}V${top + PANEL}H${WIDTH - 16}" fill="none" stroke="#57606a"/>`,
      `<text x="${LEFT - 6}" y="${top + 5}" text-anchor="end">${most}</text>`,
      `<text x="${LEFT - 6}" y="${top + PANEL + 4}" text-anchor="end">0</text>`,
      ...paths,
    ].join('\n');
  });
  const seconds = spanMs / 1000;
  const step = niceTop(seconds / 8);
  const ticks = [];
  for (let at = 0; at <= seconds; at += step)
    ticks.push(
      `<text x="${(LEFT + (at / seconds) * (WIDTH - LEFT - 16)).toFixed(1)}" y="${height - 22}" text-anchor="middle">${at} s</text>`,
    );
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${height}" viewBox="0 0 ${WIDTH} ${height}" font-family="sans-serif" font-size="12" fill="#24292f">`,
    `<rect width="${WIDTH}" height="${height}" fill="#ffffff"/>`,
    ...body,
    ...ticks,
    '</svg>',
    '',
  ].join('\n');
}

/** The next of 1, 2, 5, 10, 20, 50, … at or above a value. */
function niceTop(value: number): number {
  for (let power = 1; ; power *= 10)
    for (const digit of [1, 2, 5]) if (digit * power >= value) return digit * power;
}
