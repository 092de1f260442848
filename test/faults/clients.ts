import { setTimeout as delay } from 'node:timers/promises';
import { createGenerationStore } from '../../shared/generation-store.ts';
import { longAnswer } from '../fixtures/long-answer-handler.ts';
import { type Answer, CheckedClient, Crowd, demoText, type Question } from './crowd.ts';
import {
  audit,
  demoQuestion,
  demoQuestions,
  type FaultClass,
  QUICK,
  residentBytes,
  underLoad,
  until,
} from './stage.ts';
import { percentile, record } from './tally.ts';

/** Clients that drop, storm, repeat themselves, change their mind, and read slowly. */

/** A third of all connections end without a close, again and again. */
export const clientsDropped: FaultClass = {
  name: 'clients-dropped',
  async run(context) {
    const stage = await context.stage(QUICK);
    await underLoad(context, stage, {
      async inject(_, crowd) {
        for (const client of crowd.clients) if (context.random() < 0.33) client.vanish();
      },
      pauseMs: 500,
    });
  },
};

/** A thousand connections are lost at once, come back with jitter, and resume. */
export const reconnectStorm: FaultClass = {
  name: 'reconnect-storm',
  async run(context) {
    const stage = await context.stage({
      ...QUICK,
      workerEnv: { ...QUICK.workerEnv, WORKER_CONCURRENCY: '2000' },
    });
    await underLoad(context, stage, {
      users: context.short ? 200 : 1_000,
      intervalMs: 400,
      answerMs: 6_000,
      async inject(_, crowd) {
        for (const client of crowd.clients) client.vanish();
        const back = await until(
          'everyone is back',
          30_000,
          () => crowd.clients.filter((client) => client.ready).length === crowd.clients.length,
        );
        context.tally.notes.push(`${crowd.clients.length} connections were back after ${back} ms`);
      },
      rounds: context.short ? 1 : 4,
      pauseMs: 2_000,
      settleMs: 60_000,
    });
  },
};

/**
 * The same message, many times, over both nodes. In odd rounds its record is there and its request is not, as when
 * a gateway dies between the two steps; in even rounds that gateway is killed while it takes them.
 */
export const resubmitted: FaultClass = {
  name: 'resubmitted',
  async run(context) {
    const { tally, random } = context;
    const stage = await context.stage(QUICK);
    const { look, keys } = stage.stack;
    const store = createGenerationStore({ redis: look, keys, retentionMs: 60_000 });
    /** As a gateway leaves it that dies between the two steps: a record, and its request in no stream. */
    const recordOnly = async (user: string, { contents, parameters }: Question) => {
      await look.client.hset(keys.generation(user, 'same'), {
        status: 'queued',
        attempt: 0,
        tries: 0,
        node: 'gone',
        routes: 'gone',
        payload: JSON.stringify({ contents, parameters }),
        admitted: Date.now(),
      });
      await look.client.hset(keys.active(user), 'same', '');
    };
    const end = Date.now() + context.seconds * 1_000;
    for (let round = 1; round === 1 || round === 2 || Date.now() < end; round++) {
      const victim = stage.gateways()[0]!;
      const rivals: CheckedClient[] = [];
      const answers: Answer[] = [];
      const people = Math.max(2, Math.floor(context.users / 8));
      for (let person = 0; person < people; person++) {
        const user = `again${round}p${person}-${Math.floor(random() * 1e9)}`;
        const question = { ...(await demoQuestion(random, 1_000)), messageId: 'same' };
        if (round % 2 === 1) await recordOnly(user, question);
        for (let copy = 0; copy < 6; copy++) {
          // Copies start on each node in turn; whoever loses its node goes to any other.
          const first = stage.gateways()[copy % 2]!.url;
          let used = false;
          const urls = () => {
            if (used) return stage.urls();
            used = true;
            return [first];
          };
          const client = new CheckedClient(user, { urls, tally, random });
          rivals.push(client);
          answers.push(client.ask(question));
        }
      }
      tally.faults++;
      let restarted: Promise<unknown> = Promise.resolve();
      if (round % 2 === 0) {
        await delay(30 + random() * 120);
        await victim.kill('SIGKILL');
        restarted = delay(1_000).then(() => stage.restartGateway(victim));
      }
      await Promise.race([Promise.all(answers.map((answer) => answer.ended)), delay(30_000)]);
      for (const answer of answers)
        if (!answer.end)
          record(tally, 'neverEnded', `${answer.user} copy stands at ${answer.last || 'nothing'}`);
      const users = [...new Set(answers.map((answer) => answer.user))];
      const records = await Promise.all(users.map((user) => store.inspect({ user, messageId: 'same' })));
      records.forEach((one, index) => {
        if (one?.attempt !== 1)
          record(
            tally,
            'doubled',
            `${users[index]}: the handler ran ${one?.attempt ?? 'never'} times for one message`,
          );
      });
      await Promise.all(rivals.map((client) => client.stop()));
      await restarted;
    }
  },
};

/** Cancels: while streaming, at once, after the end; and of requests that wait in a queue. */
export const cancelStorm: FaultClass = {
  name: 'cancel-storm',
  async run(context) {
    const { tally, random } = context;
    const stage = await context.stage(QUICK);
    const crowd = new Crowd(context.users, { urls: stage.urls, tally, random });
    try {
      const next = await demoQuestions(random, 200, 800, 20);
      const before = new Map<CheckedClient, Answer>();
      const outcomes = { cancelled: 0, done: 0 };
      crowd.stream((client) => {
        const question = next();
        const old = before.get(client);
        // A stale cancel, right before and right after the newer question: it must hit nothing.
        if (old && random() < 0.5) client.send({ type: 'cancel', messageId: old.messageId });
        setImmediate(() => {
          const answer = [...client.open.values()].at(-1);
          if (old) client.send({ type: 'cancel', messageId: old.messageId });
          if (!answer) return;
          before.set(client, answer);
          void answer.ended.then((end) => {
            if (end === 'cancelled' || end === 'done') outcomes[end]++;
          });
          const kind = random();
          if (kind < 0.25)
            client.cancel(answer); // with its chat still on the way
          else if (kind < 0.5) answer.onProgress((one) => random() < 0.1 && !one.end && client.cancel(one));
          else if (kind < 0.75) {
            // Races with the end: sent when all but the last few words are there.
            const nearly = question.expected!.length - 15;
            answer.onProgress((one) => {
              if (one.text.length > nearly && !one.cancelSent && !one.end) client.cancel(one);
            });
          }
          if (kind < 0.75) tally.faults++;
        });
        return question;
      });
      await delay(context.seconds * 1_000);
      await crowd.settle(30_000);
      await audit(context, stage, crowd);
      tally.notes.push(`${outcomes.cancelled} ended cancelled, ${outcomes.done} done`);
    } finally {
      await crowd.stop();
    }
    await cancelQueued(context);
  },
};

/** One worker with two places, a longer line: who cancels in line never reaches a model. */
async function cancelQueued(context: Parameters<FaultClass['run']>[0]): Promise<void> {
  const { tally, random } = context;
  const stage = await context.stage({
    ...QUICK,
    workers: 1,
    workerEnv: { ...QUICK.workerEnv, WORKER_CONCURRENCY: '2' },
  });
  const before = tally.recoveries.length;
  const crowd = new Crowd(12, { urls: stage.urls, tally, random });
  try {
    const contents = 'queued';
    const parameters = { tokens: 40, intervalMs: 40, seed: 7 };
    const expected = await demoText(contents, parameters);
    await until('connected', 10_000, () => crowd.clients.every((client) => client.ready));
    for (const client of crowd.clients) crowd.answers.push(client.ask({ contents, parameters, expected }));
    await until('two stream', 10_000, () => crowd.answers.filter((one) => one.starts > 0).length === 2);
    await until('all accepted', 10_000, () => crowd.answers.every((one) => one.accepted));
    const waiting = crowd.clients.filter((client) => [...client.open.values()][0]?.starts === 0);
    const cancelled = waiting.slice(0, 8).map((client) => {
      const answer = [...client.open.values()][0]!;
      client.cancel(answer);
      tally.faults++;
      return answer;
    });
    await Promise.race([Promise.all(cancelled.map((one) => one.ended)), delay(1_000)]);
    for (const answer of cancelled)
      if (answer.end !== 'cancelled' || answer.starts > 0)
        record(
          tally,
          'wrong',
          `${answer.user}: cancelled in line, but ${answer.end ?? 'still open'} with ${answer.starts} starts`,
        );
    await crowd.settle(30_000);
    tally.recoveries.splice(before); // waiting in line is no fault
    await audit(context, stage, crowd);
  } finally {
    await crowd.stop();
  }
}

/** Clients that stop to read while megabytes come for them: bounded memory, nobody else delayed, nothing lost. */
export const slowReaders: FaultClass = {
  name: 'slow-readers',
  async run(context) {
    const { tally, random } = context;
    const count = context.short ? 10 : 25;
    const contents = 'LONG 1000'; // 8 MB
    const expected = longAnswer(contents)!.join('');
    const allMb = (count * expected.length) / 1e6;
    const stage = await context.stage({
      ...QUICK,
      gateways: 1,
      // A small heap: without it the collector lets garbage pile up, which looks like memory that is held.
      gatewayEnv: { ...QUICK.gatewayEnv, NODE_OPTIONS: '--max-old-space-size=128' },
      workerEnv: {
        ...QUICK.workerEnv,
        HANDLER: 'test/fixtures/long-answer-handler.ts',
        MAX_ANSWER_BYTES: '16000000',
      },
    });
    const { look, keys } = stage.stack;
    const store = createGenerationStore({ redis: look, keys, retentionMs: 60_000 });
    const { pid } = stage.gateways()[0]!;
    const others = new Crowd(context.users, { urls: stage.urls, tally, random });
    const slow = new Crowd(count, { urls: stage.urls, tally, random });
    let peak = 0;
    const sampling = setInterval(() => {
      residentBytes(pid).then(
        (bytes) => {
          peak = Math.max(peak, bytes);
        },
        () => {}, // it has died: its clients tell
      );
    }, 50);
    try {
      const next = await demoQuestions(random, 100, 1_500);
      others.stream(() => next());
      await others.flowing();
      await until('connected', 10_000, () => slow.clients.every((client) => client.ready));
      // The same with readers who keep up: the heap grows to what such traffic takes anyway.
      for (const client of slow.clients) slow.answers.push(client.ask({ contents, expected }));
      await until('the readers have it', 90_000, () => slow.answers.every((answer) => answer.end !== null));
      const before = peak;
      const read = slow.answers.length;
      for (const client of slow.clients) {
        const answer = client.ask({ contents, expected });
        slow.answers.push(answer);
        let paused = false;
        answer.onProgress(() => {
          if (paused) return;
          paused = true;
          client.socket!.pause();
        });
        tally.faults++;
      }
      // The others are watched once the long answers are written: until then the worker itself is busy.
      await until('the long answers are written', 60_000, async () => {
        const records = await Promise.all(slow.answers.slice(read).map((answer) => store.inspect(answer)));
        return records.every((one) => one?.status === 'done');
      });
      tally.recoveries.length = 0;
      await delay(Math.max(3_000, context.seconds * 500));
      const delayed = tally.recoveries.splice(0);
      const growth = (peak - before) / 1e6;
      tally.notes.push(
        `${count} clients stopped reading ${allMb.toFixed(0)} MB in all; the gateway grew by ${growth.toFixed(0)} MB more than for clients that read`,
        `others: ${delayed.length} stood still for over 0.4 s meanwhile (p99 ${percentile(delayed, 0.99) ?? 0} ms)`,
      );
      // For each: 256 KB of ours, what uWS holds, a page of the log under way. Not the answer.
      if (growth > allMb / 3)
        record(tally, 'errors', `the gateway grew by ${growth.toFixed(0)} MB for ${allMb.toFixed(0)} MB`);
      const resumed = Date.now();
      for (const client of slow.clients) client.socket!.resume();
      await slow.settle(60_000);
      tally.notes.push(
        `they had all of it ${Date.now() - resumed} ms after they read again; the gateway's peak was ${(peak / 1e6).toFixed(0)} MB (${((peak - before) / 1e6).toFixed(0)} MB more)`,
      );
      await others.settle(30_000);
      tally.recoveries.length = 0; // standing still was the fault itself
      await audit(context, stage, slow);
      await audit(context, stage, others);
    } finally {
      clearInterval(sampling);
      await slow.stop();
      await others.stop();
    }
  },
};
