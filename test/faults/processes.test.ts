import { LOSS, PROCESSES } from './run.ts';
import { testShort } from './short.ts';

testShort('processes that die, freeze and leave, and keys that are deleted', [...PROCESSES, ...LOSS]);
