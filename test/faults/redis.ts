import { setTimeout as delay } from 'node:timers/promises';
import type { StackProcess } from '../helpers/stack.ts';
import { type SilentProxy, startProxy } from './proxy.ts';
import {
  type FaultClass,
  type FaultContext,
  isReady,
  QUICK,
  type Stage,
  startStage,
  underLoad,
  until,
} from './stage.ts';
import { record } from './tally.ts';

/** Redis that dies, hangs, and falls silent. */

/** SIGKILL of Redis, and a restart from its append-only file. */
export const redisKilled: FaultClass = {
  name: 'redis-killed',
  async run(context) {
    const stage = await context.stage(QUICK);
    const before = [...stage.gateways(), ...stage.workers()];
    await underLoad(context, stage, {
      async inject() {
        await stage.stack.redis.kill('SIGKILL');
        await delay(300);
        await stage.stack.redis.restart();
        await backToReady(context, stage);
      },
      pauseMs: 1_500,
    });
    sameProcesses(context, stage, before);
  },
};

/** SIGSTOP of Redis: connections stay, nothing answers. */
export const redisFrozen: FaultClass = {
  name: 'redis-frozen',
  async run(context) {
    const stage = await context.stage(QUICK);
    const before = [...stage.gateways(), ...stage.workers()];
    await underLoad(context, stage, {
      async inject() {
        await stage.stack.redis.kill('SIGSTOP');
        await quiet(context, stage, context.short ? 6_000 : 20_000);
        await stage.stack.redis.kill('SIGCONT');
        await backToReady(context, stage);
      },
      rounds: context.short ? 1 : 2,
      pauseMs: 2_000,
      settleMs: 60_000,
    });
    sameProcesses(context, stage, before);
  },
};

/** A network between the processes and Redis that stops forwarding without closing anything. */
export const redisSilent: FaultClass = {
  name: 'redis-silent',
  async run(context) {
    let proxy: SilentProxy | undefined;
    const stage = await startStage({ ...QUICK, gateways: 0, workers: 0 });
    try {
      proxy = await startProxy(() => stage.stack.redis.port);
      const env = { REDIS_URL: proxy.url };
      await Promise.all([
        stage.addGateway('n1', env),
        stage.addGateway('n2', env),
        stage.addWorker(env),
        stage.addWorker(env),
      ]);
      const before = [...stage.gateways(), ...stage.workers()];
      await underLoad(context, stage, {
        async inject(round) {
          if (round % 2 === 1) {
            // The whole network is silent for a while.
            proxy!.silence();
            await quiet(context, stage, context.short ? 6_000 : 20_000);
            proxy!.speak();
          } else {
            // Only the flows that exist now are forgotten; new connections work at once.
            proxy!.forgetConnections();
            await delay(500);
          }
          await backToReady(context, stage);
        },
        leastRounds: 2, // one of each
        rounds: context.short ? 2 : 4,
        pauseMs: 2_000,
        settleMs: 60_000,
      });
      sameProcesses(context, stage, before);
    } finally {
      await context.explain(stage);
      await stage.stop();
      await proxy?.stop();
    }
  },
};

/** Nothing answers for so long: every gateway must say that it is not ready, and none that it is. */
async function quiet(context: FaultContext, stage: Stage, ms: number): Promise<void> {
  const began = Date.now();
  try {
    const noticed = await until('/readyz false', 6_000, async () =>
      (await Promise.all(stage.gateways().map(isReady))).every((ready) => !ready),
    );
    context.tally.notes.push(`/readyz was false after ${noticed} ms`);
  } catch {
    record(context.tally, 'errors', '/readyz did not become false while Redis was silent');
  }
  await delay(Math.max(0, ms - (Date.now() - began)));
  if ((await Promise.all(stage.gateways().map(isReady))).some(Boolean))
    record(context.tally, 'errors', '/readyz was true while Redis was silent');
}

export async function backToReady(context: FaultContext, stage: Stage): Promise<void> {
  try {
    const ms = await until('/readyz true', 15_000, async () =>
      (await Promise.all(stage.gateways().map(isReady))).every(Boolean),
    );
    context.tally.notes.push(`ready again after ${ms} ms`);
  } catch {
    record(context.tally, 'errors', '/readyz stayed false after Redis was back');
  }
}

/** Nobody was restarted by hand, and nobody gave up. */
function sameProcesses(context: FaultContext, stage: Stage, before: StackProcess[]): void {
  const now = [...stage.gateways(), ...stage.workers()];
  if (now.length !== before.length || before.some((one) => !now.includes(one)))
    record(context.tally, 'errors', 'a process ended while Redis was away');
}

/** Redis has no memory left for a while: it refuses every write, and says so. */
export const redisFull: FaultClass = {
  name: 'redis-full',
  async run(context) {
    const stage = await context.stage(QUICK);
    const before = [...stage.gateways(), ...stage.workers()];
    await underLoad(context, stage, {
      async inject() {
        const { client } = stage.stack.look;
        await client.config('SET', 'maxmemory', '1mb'); // below what it holds already
        await delay(2_000);
        await client.config('SET', 'maxmemory', '0');
      },
      pauseMs: 2_000,
    });
    sameProcesses(context, stage, before);
  },
};
