import { readFileSync } from 'node:fs';
import { basename } from 'node:path';

/**
 * Where the CPU time of a `.cpuprofile` went: `node --import tsx test/bench/read-profile.ts FILE… [--top N]`.
 * Self time by function and by package, and time below our own functions (each counted once a stack).
 */
interface ProfileNode {
  id: number;
  callFrame: { functionName: string; url: string; lineNumber: number };
  children?: number[];
}
interface Profile {
  nodes: ProfileNode[];
  samples: number[];
  timeDeltas: number[];
}

const args = process.argv.slice(2);
const topAt = args.indexOf('--top');
const top = topAt >= 0 ? Number(args.splice(topAt, 2)[1]) : 30;

for (const path of args) {
  const profile = JSON.parse(readFileSync(path, 'utf8')) as Profile;
  const nodes = new Map(profile.nodes.map((node) => [node.id, node]));
  const parents = new Map<number, number>();
  for (const node of profile.nodes) for (const child of node.children ?? []) parents.set(child, node.id);

  const self = new Map<string, number>();
  const packages = new Map<string, number>();
  const below = new Map<string, number>();
  const add = (map: Map<string, number>, key: string, value: number) =>
    map.set(key, (map.get(key) ?? 0) + value);
  let busy = 0;
  for (let index = 0; index < profile.samples.length; index++) {
    const node = nodes.get(profile.samples[index]!)!;
    const time = profile.timeDeltas[index]!;
    if (node.callFrame.functionName === '(idle)') continue;
    busy += time;
    add(self, nameOf(node), time);
    add(packages, packageOf(node.callFrame.url, node.callFrame.functionName), time);
    const seen = new Set<string>();
    for (let id: number | undefined = node.id; id !== undefined; id = parents.get(id)) {
      const name = nameOf(nodes.get(id)!);
      if (seen.has(name)) continue;
      seen.add(name);
      add(below, name, time);
    }
  }
  console.log(`\n${basename(path)}: ${(busy / 1e6).toFixed(2)} s busy`);
  const list = (title: string, map: Map<string, number>, keep: (key: string) => boolean) => {
    console.log(`-- ${title}`);
    const sorted = [...map].filter(([key]) => keep(key)).sort((a, b) => b[1] - a[1]);
    for (const [key, time] of sorted.slice(0, top))
      console.log(`${((time / busy) * 100).toFixed(1).padStart(6)} %  ${key}`);
  };
  list('by package', packages, () => true);
  list('self', self, () => true);
  list('with what it calls', below, (key) => !/^\((?:root|program)\)/.test(key));
}

function nameOf({ callFrame }: ProfileNode): string {
  const name = callFrame.functionName || '(anonymous)';
  const place = callFrame.url
    .replace(/^.*node_modules\//, '')
    .replace(/^file:\/\/.*?\/(?=(?:gateway|worker|shared|test|infra)\/)/, '');
  return place ? `${name} ${place}` : name;
}

function packageOf(url: string, name: string): string {
  if (url === '') return name.startsWith('(') ? name : 'native';
  const inside = /node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(url);
  if (inside) return inside[1]!;
  if (url.startsWith('node:')) return url.split('/')[0]!;
  return /\/((?:gateway|worker|shared|test)\/.*)$/.exec(url)?.[1] ?? url;
}
