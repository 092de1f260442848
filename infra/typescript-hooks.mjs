import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { stop, transform } from 'esbuild';

/**
 * Strips types while a module loads. The processes run through this and not through tsx, because tsx keeps function
 * names by a call for each closure that is made: 35 % of a busy worker's time (156 → 98 µs a request, measured
 * under the same load). Tests run through tsx. Imports name their files with the extension.
 *
 * esbuild works in a process of its own; it ends when no module has come for a while, and starts again for the next.
 */
const IDLE_MS = 1_000;
let loading = 0;
let timer;

export async function load(url, context, nextLoad) {
  if (!url.startsWith('file:') || !url.endsWith('.ts')) return nextLoad(url, context);
  const file = fileURLToPath(url);
  clearTimeout(timer);
  loading++;
  try {
    const { code } = await transform(await readFile(file, 'utf8'), {
      loader: 'ts',
      format: 'esm',
      target: 'node20',
      sourcemap: 'inline',
      sourcefile: file,
    });
    return { format: 'module', source: code, shortCircuit: true };
  } finally {
    if (--loading === 0) timer = setTimeout(stop, IDLE_MS).unref();
  }
}
