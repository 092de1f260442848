import { REDIS } from './run.ts';
import { testShort } from './short.ts';

testShort('a Redis that dies, hangs, falls silent, fills up and fails over', REDIS);
