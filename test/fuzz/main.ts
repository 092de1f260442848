import { parseArgs } from 'node:util';
import { fuzz } from './fuzz.ts';

/** `node --import tsx test/fuzz/main.ts --inputs 1000000 [--seed 7]`: throws that many inputs at a real gateway. */
const { values } = parseArgs({
  options: { inputs: { type: 'string', default: '1000000' }, seed: { type: 'string', default: '1' } },
});

console.log('  inputs   seconds  gateway RSS  Redis');
const report = await fuzz({
  inputs: Number(values.inputs),
  seed: Number(values.seed),
  onProgress: ({ inputs, seconds, rssMb, redisMb }) =>
    console.log(
      `${String(inputs).padStart(8)}  ${seconds.toFixed(1).padStart(7)}  ${`${rssMb} MB`.padStart(11)}  ${redisMb} MB`,
    ),
});
const { native, ai, http, parsed } = report.inputs;
console.log(
  `\n${native + ai + http + parsed} inputs (${native} frames on /ws, ${ai} on /ai, ${http} HTTP requests and handshakes, ` +
    `${parsed} through the parsers) over ${report.connections} connections in ${report.seconds} s.\n` +
    `Gateway memory: ${report.settledMb} MB in the second quarter, ${report.endMb} MB in the last. ` +
    `Errors in its log: ${report.errors.length}.`,
);
for (const failure of report.failures) console.log(`FAILED: ${failure}`);
console.log(report.failures.length === 0 ? 'PASSED' : 'FAILED');
process.exitCode = report.failures.length === 0 ? 0 : 1;
