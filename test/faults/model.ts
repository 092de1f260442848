import { setTimeout as delay } from 'node:timers/promises';
import { type ScriptedCall, startScriptedOpenAi } from '../helpers/scripted-openai.ts';
import { Crowd } from './crowd.ts';
import { audit, demoQuestions, type FaultClass, QUICK, until } from './stage.ts';
import { record } from './tally.ts';

/** Models that hang, cut, babble and refuse, and a request that kills its worker. */

const KINDS = ['hang-first', 'hang-middle', 'cut', 'garbage', '429', '500', '401', 'fine'] as const;
type Kind = (typeof KINDS)[number];
const WORDS = Array.from({ length: 20 }, (_, index) => `word${index} `);

export const modelFaults: FaultClass = {
  name: 'model-faults',
  async run(context) {
    const { tally, random } = context;
    const closers: (() => Promise<void>)[] = [];
    const server = await startScriptedOpenAi({ after: (close) => closers.push(close) });
    const tries = new Map<string, number>();
    let serving = true;
    const misbehave = async (call: ScriptedCall) => {
      const question = String(call.body.messages.at(-1).content);
      const kind = question.split(' ')[0] as Kind;
      const attempt = (tries.get(question) ?? 0) + 1;
      tries.set(question, attempt);
      if (attempt <= 2 && kind !== 'fine') tally.faults++;
      if (kind === '401') return call.respond(401, { error: { message: 'no such key' } });
      if (attempt <= 2) {
        switch (kind) {
          case 'hang-first':
            return call.open();
          case 'hang-middle':
            for (const word of WORDS.slice(0, 7)) call.token(word);
            return;
          case 'cut':
            for (const word of WORDS.slice(0, 7)) call.token(word);
            return call.cut();
          case 'garbage':
            call.token(WORDS[0]!);
            call.raw('data: {"choices":[{"delta":\n\ndata: <html>\u0000</html>\n\n');
            return call.cut();
          case '429':
            return call.respond(429, { error: { message: 'slow down' } }, { 'retry-after': '1' });
          case '500':
            return call.respond(500, 'oh no');
          default:
        }
      }
      for (const word of WORDS) {
        call.token(word);
        await delay(10);
      }
      call.finish('stop');
    };
    const serve = (async () => {
      while (serving) {
        const call = await server.next().catch(() => null);
        if (call) void misbehave(call);
      }
    })();
    const stage = await context.stage({
      ...QUICK,
      workerEnv: {
        ...QUICK.workerEnv,
        HANDLER: 'openai',
        OPENAI_BASE_URL: server.baseUrl,
        FIRST_TOKEN_TIMEOUT_MS: '700',
        TOKEN_TIMEOUT_MS: '700',
      },
    });
    const crowd = new Crowd(context.users, { urls: stage.urls, tally, random });
    try {
      let count = 0;
      crowd.stream(() => {
        const kind = KINDS[count++ % KINDS.length]!;
        return {
          contents: `${kind} ${count}`,
          expected: WORDS.join(''),
          mayFail: (frame) => kind === '401' && frame.code === 'model_error' && !frame.temporary,
        };
      });
      await delay(context.seconds * 1_000);
      await crowd.settle(30_000);
      tally.recoveries.length = 0; // how long the model was told to hang says nothing
      await audit(context, stage, crowd);
    } finally {
      await crowd.stop();
      serving = false;
      for (const close of closers) await close();
      await serve;
    }
  },
};

/** A request that kills its worker each time ends as a dead letter; its neighbours do not die with it. */
export const poison: FaultClass = {
  name: 'poison',
  async run(context) {
    const { tally, random } = context;
    const stage = await context.stage({
      ...QUICK,
      workerEnv: {
        ...QUICK.workerEnv,
        LEASE_MS: '1000',
        MAX_ATTEMPTS: '5',
        HANDLER: 'test/fixtures/poison-handler.ts',
      },
    });
    const stopSupervisor = stage.supervise();
    const crowd = new Crowd(Math.min(context.users, 40), { urls: stage.urls, tally, random });
    const poisoner = new Crowd(1, { urls: stage.urls, tally, random });
    try {
      const next = await demoQuestions(random, 100, 1_500);
      crowd.stream(() => next());
      await crowd.flowing();
      const [client] = poisoner.clients;
      await until('connected', 10_000, () => client!.ready);
      const answer = client!.ask({
        contents: 'POISON',
        expected: null,
        mayFail: (frame) => frame.code === 'attempts_exhausted',
      });
      const workersBefore = stage.stack.workers.length;
      await Promise.race([answer.ended, delay(60_000)]);
      tally.faults += stage.stack.workers.length - workersBefore;
      if (answer.end !== 'failed')
        record(tally, 'neverEnded', `poison: ${answer.end ?? `stands at ${answer.last}`}`);
      await crowd.settle(60_000);
      await audit(context, stage, crowd);
      const { look, keys } = stage.stack;
      let letters = 0;
      for (const { node } of stage.gateways())
        for (const [, fields] of await look.client.xrange(keys.dead(node), '-', '+'))
          if (fields.includes(client!.user)) letters++;
      if (letters !== 1) record(tally, 'errors', `poison: ${letters} dead letters`);
      tally.notes.push(`the poison ended as ${answer.end} after ${answer.starts} attempts`);
    } finally {
      await crowd.stop();
      await poisoner.stop();
      await stopSupervisor();
    }
  },
};
