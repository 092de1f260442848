import { register } from 'node:module';

// `node --import ./infra/typescript.mjs worker/main.ts` runs TypeScript as it is: see typescript-hooks.mjs.
register('./typescript-hooks.mjs', import.meta.url);
process.setSourceMapsEnabled(true);
