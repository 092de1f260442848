import { setTimeout as delay } from 'node:timers/promises';
import { type FaultClass, isReady, QUICK, underLoad, until } from './stage.ts';
import { record } from './tally.ts';

/** Processes that die, freeze and leave. */

/** SIGKILL of a worker while it streams; another is started, as a supervisor would. */
export const workerKilled: FaultClass = {
  name: 'worker-killed',
  async run(context) {
    const stage = await context.stage(QUICK);
    const stopSupervisor = stage.supervise();
    try {
      await underLoad(context, stage, {
        async inject() {
          const workers = stage.workers();
          const victim = workers[Math.floor(context.random() * workers.length)];
          await victim?.kill('SIGKILL');
          await until('two workers', 20_000, () => stage.workers().length >= 2);
        },
        pauseMs: 1_500,
      });
    } finally {
      await stopSupervisor();
    }
  },
};

/** A worker frozen beyond its lease and thawed: what it still wants to write must be refused. */
export const workerFrozen: FaultClass = {
  name: 'worker-frozen',
  async run(context) {
    const stage = await context.stage(QUICK);
    let fenced = 0;
    await underLoad(context, stage, {
      async inject() {
        const workers = stage.workers();
        const victim = workers[Math.floor(context.random() * workers.length)]!;
        await victim.kill('SIGSTOP');
        await delay(2_500 + context.random() * 1_000); // the lease is 1.5 s
        const before = victim.logs.length;
        await victim.kill('SIGCONT');
        await delay(700);
        fenced += victim.logs.slice(before).filter((line) => line.msg === 'attempt replaced').length;
      },
      pauseMs: 600,
    });
    context.tally.notes.push(`${fenced} attempts of thawed workers were refused by the log`);
  },
};

/** SIGKILL of a gateway with its sockets; clients move to the other node and resume. It comes back later. */
export const gatewayKilled: FaultClass = {
  name: 'gateway-killed',
  async run(context) {
    const stage = await context.stage(QUICK);
    await underLoad(context, stage, {
      async inject() {
        const gateways = stage.gateways();
        const victim = gateways[Math.floor(context.random() * gateways.length)]!;
        await victim.kill('SIGKILL');
        await delay(1_500);
        await stage.restartGateway(victim);
      },
    });
  },
};

/** A gateway that dies and is started at once under the same id: it waits out its own old lease. */
export const gatewayRestarted: FaultClass = {
  name: 'gateway-restarted',
  async run(context) {
    const stage = await context.stage({ ...QUICK, gateways: 1 });
    await underLoad(context, stage, {
      async inject() {
        const [victim] = stage.gateways();
        await victim!.kill('SIGKILL');
        const gateway = await stage.restartGateway(victim!);
        await until('ready again', 10_000, () => isReady(gateway));
      },
      rounds: context.short ? 1 : 3,
      pauseMs: 1_500,
    });
  },
};

/** Everything restarted in turn with SIGTERM under load: nobody sees an error, only a reconnect. */
export const rollingRestart: FaultClass = {
  name: 'rolling-restart',
  async run(context) {
    // Workers leave before their answers end: they hand them back, and others start them over.
    const stage = await context.stage({ ...QUICK, workerEnv: { ...QUICK.workerEnv, DRAIN_MS: '500' } });
    let handedBack = 0;
    await underLoad(context, stage, {
      async inject(_, crowd) {
        for (const worker of stage.workers()) {
          await stage.addWorker();
          await worker.kill('SIGTERM');
          handedBack += worker.logs.filter((line) => line.msg === 'handed back').length;
          if ((await worker.exited) !== 0) record(context.tally, 'errors', 'a worker did not leave with 0');
        }
        for (const gateway of stage.gateways()) {
          await gateway.kill('SIGTERM');
          if ((await gateway.exited) !== 0) record(context.tally, 'errors', 'a gateway did not leave with 0');
          await stage.restartGateway(gateway);
          await crowd.flowing(0.2);
        }
      },
      rounds: context.short ? 1 : 3,
    });
    context.tally.notes.push(`${handedBack} answers were handed back by leaving workers`);
  },
};

/** A gateway frozen beyond its own lease and thawed: what its clients missed comes from the logs. */
export const gatewayFrozen: FaultClass = {
  name: 'gateway-frozen',
  async run(context) {
    const stage = await context.stage(QUICK);
    await underLoad(context, stage, {
      async inject() {
        const gateways = stage.gateways();
        const victim = gateways[Math.floor(context.random() * gateways.length)]!;
        await victim.kill('SIGSTOP');
        await delay(7_000 + context.random() * 1_000); // its lease is 6 s
        await victim.kill('SIGCONT');
      },
      rounds: context.short ? 1 : 3,
      pauseMs: 1_500,
    });
  },
};
