import { createRequire, register } from 'node:module';

// `node --import ./infra/typescript.mjs worker/main.ts` runs TypeScript as it is: see typescript-hooks.mjs.
try {
  createRequire(import.meta.url).resolve('esbuild'); // the hooks could only fail with a stack
} catch {
  process.stderr.write('The dependencies are not installed: run npm ci\n');
  process.exit(1);
}
register('./typescript-hooks.mjs', import.meta.url);
process.setSourceMapsEnabled(true);
