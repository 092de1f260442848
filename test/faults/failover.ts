import { setTimeout as delay } from 'node:timers/promises';
import { Redis } from 'ioredis';
import { compareFrameIds } from '../../shared/frame-id.ts';
import type { Keys } from '../../shared/keys.ts';
import type { Answer } from './crowd.ts';
import { backToReady } from './redis.ts';
import { type SentinelSet, startSentinelSet } from './sentinel.ts';
import {
  type FaultClass,
  type FaultContext,
  QUICK,
  type Stage,
  startStage,
  underLoad,
  until,
} from './stage.ts';
import { isClean, record } from './tally.ts';

/** Sentinel failovers while answers stream. */

async function withSentinel(
  context: FaultContext,
  body: (set: SentinelSet, stage: Stage) => Promise<void>,
): Promise<void> {
  const set = await startSentinelSet();
  let stage: Stage | undefined;
  try {
    stage = await startStage({ ...QUICK, redisUrl: set.url });
    context.say('a master, a replica, three sentinels');
    await body(set, stage);
  } catch (error) {
    record(context.tally, 'errors', `the class itself failed: ${(error as Error).stack}`);
  } finally {
    if (stage) await context.explain(stage);
    if (!isClean(context.tally)) context.tally.notes.push(...set.decisions());
    await stage?.stop();
    await set.stop();
  }
}

/** Kills or freezes the master and waits for the other one to be it. */
async function failOver(
  context: FaultContext,
  set: SentinelSet,
  stage: Stage,
  freeze: boolean,
): Promise<void> {
  const old = await set.master();
  const began = Date.now();
  await set.servers[old].kill(freeze ? 'SIGSTOP' : 'SIGKILL');
  await until('a new master', 30_000, async () => (await set.master()) !== old);
  context.tally.notes.push(`new master after ${Date.now() - began} ms`);
  // At once: sentinels that have not heard of the failover yet still name it.
  if (!freeze) await set.restartAsReplica(old);
  await backToReady(context, stage);
  if (!freeze) return;
  await set.servers[old].kill('SIGCONT'); // wakes believing that it is the master
  await set.waitForReplica(); // or the audit, which looks at the same Redis, might believe it too
}

/** The master dies or freezes; the replica has all but the last moments. */
export const sentinelFailover: FaultClass = {
  name: 'sentinel-failover',
  async run(context) {
    await withSentinel(context, (set, stage) =>
      underLoad(context, stage, {
        async inject(round) {
          if (round > 1) await set.waitForReplica();
          await failOver(context, set, stage, round % 2 === 0);
        },
        rounds: context.short ? 1 : 3,
        pauseMs: 2_000,
        settleMs: 60_000,
      }).then(() => {}),
    );
  },
};

/**
 * The replica is frozen first, so that it lacks a second or more of everything, and the failover goes to it. Answers
 * that stream then are put back by their workers. What was accepted or finished in that window may be unknown to
 * the new master: the client is told (`unknown_message`, `failed`) or, when it had seen the end, has its text.
 */
export const failoverBehind: FaultClass = {
  name: 'failover-behind',
  async run(context) {
    await withSentinel(context, async (set, stage) => {
      let behind = 0;
      await underLoad(context, stage, {
        async inject(round, crowd) {
          if (round > 1) await set.waitForReplica();
          const master = await set.master();
          const replica = set.servers[master === 0 ? 1 : 0];
          await replica.kill('SIGSTOP');
          await delay(context.short ? 600 : 900); // below down-after, or it could not be promoted
          const old = set.servers[master];
          await old.kill('SIGKILL'); // dead before the replica wakes
          const seen = crowd.clients
            .flatMap((client) => [...client.open.values()])
            .map((one) => [one, one.last] as const);
          await replica.kill('SIGCONT');
          behind += await countBehind(replica.port, stage.stack.keys, seen);
          await until('a new master', 30_000, async () => (await set.master()) !== master);
          await backToReady(context, stage);
          await old.restart();
        },
        rounds: context.short ? 1 : 3,
        pauseMs: 2_000,
        answerMs: 5_000,
        settleMs: 60_000,
        crowd: { mayTell: true },
        audit: false,
      });
      context.tally.notes.push(`${behind} logs on the new master lacked frames that their clients had seen`);
    });
  },
};

/** In how many logs the replica lacks frames that clients saw. */
async function countBehind(port: number, keys: Keys, seen: (readonly [Answer, string])[]): Promise<number> {
  const client = new Redis(port, { maxRetriesPerRequest: 3 });
  client.on('error', () => {});
  let behind = 0;
  try {
    for (const [answer, last] of seen) {
      if (last === '') continue;
      const [top] = await client.xrevrange(keys.log(answer.user, answer.messageId), '+', '-', 'COUNT', 1);
      if (!top || compareFrameIds(top[0], last) < 0) behind++;
    }
  } finally {
    client.disconnect();
  }
  return behind;
}
