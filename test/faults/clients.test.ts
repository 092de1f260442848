import { CLIENTS, MODELS, PEOPLE } from './run.ts';
import { testShort } from './short.ts';

testShort('clients, models and people', [...CLIENTS, ...MODELS, ...PEOPLE]);
