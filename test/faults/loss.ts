import { setTimeout as delay } from 'node:timers/promises';
import { GROUP } from '../../shared/request-queue.ts';
import { type FaultClass, QUICK, underLoad } from './stage.ts';

/** Keys that somebody deletes under a running system. */

/**
 * FLUSHALL: everything is gone. What a worker has at hand it puts back, whoever waits for anything else is told, and new
 * questions work at once.
 */
export const flushed: FaultClass = {
  name: 'flushall',
  async run(context) {
    const stage = await context.stage(QUICK);
    await underLoad(context, stage, {
      async inject() {
        await stage.stack.look.client.flushall();
        await delay(3_000);
      },
      rounds: context.short ? 1 : 3,
      crowd: { mayTell: true },
      audit: false,
    });
  },
};

/** The consumer group is destroyed: claims are gone, entries are not. */
export const groupDestroyed: FaultClass = {
  name: 'group-destroyed',
  async run(context) {
    const stage = await context.stage(QUICK);
    await underLoad(context, stage, {
      async inject() {
        for (const { node } of stage.gateways())
          await stage.stack.look.client.xgroup('DESTROY', stage.stack.keys.requests(node), GROUP);
      },
      pauseMs: 1_500,
    });
  },
};

/** The request streams are deleted, with workers killed right after: requests are in no stream at all. */
export const requestsDeleted: FaultClass = {
  name: 'requests-deleted',
  async run(context) {
    const stage = await context.stage(QUICK);
    const stopSupervisor = stage.supervise();
    try {
      await underLoad(context, stage, {
        async inject(round) {
          const { look, keys } = stage.stack;
          for (const { node } of stage.gateways()) await look.client.del(keys.requests(node));
          if (round % 2 === 0) await stage.workers()[0]?.kill('SIGKILL');
        },
        rounds: context.short ? 2 : Number.POSITIVE_INFINITY,
        pauseMs: 2_500,
        settleMs: 60_000,
      });
    } finally {
      await stopSupervisor();
    }
  },
};

/** The reply streams are deleted, and trimmed below the cursor, while frames flow through them. */
export const repliesLost: FaultClass = {
  name: 'replies-lost',
  async run(context) {
    const stage = await context.stage(QUICK);
    await underLoad(context, stage, {
      async inject(round) {
        const { look, keys } = stage.stack;
        for (const { node } of stage.gateways()) {
          if (round % 2 === 1) await look.client.del(keys.replies(node));
        }
        if (round % 2 === 1) return;
        // What comes while the gateways are frozen is trimmed before they can read it.
        for (const gateway of stage.gateways()) await gateway.kill('SIGSTOP');
        await delay(400);
        for (const { node } of stage.gateways()) await look.client.xtrim(keys.replies(node), 'MAXLEN', 0);
        for (const gateway of stage.gateways()) await gateway.kill('SIGCONT');
      },
      rounds: context.short ? 4 : Number.POSITIVE_INFINITY,
      pauseMs: 700,
    });
  },
};

/** Logs of running answers are deleted: their workers put them back. */
export const logsDeleted: FaultClass = {
  name: 'logs-deleted',
  async run(context) {
    const stage = await context.stage(QUICK);
    await underLoad(context, stage, {
      async inject(_, crowd) {
        const { look, keys } = stage.stack;
        const open = crowd.clients
          .flatMap((client) => [...client.open.values()])
          .filter((one) => one.last !== '');
        for (const answer of open.filter(() => context.random() < 0.5))
          await look.client.eval(
            // Only while it runs: the log of a finished answer is nobody's to put back.
            `if redis.call('HGET', KEYS[1], 'status') == 'running' then redis.call('DEL', KEYS[2]) end`,
            2,
            keys.generation(answer.user, answer.messageId),
            keys.log(answer.user, answer.messageId),
          );
      },
      pauseMs: 1_000,
    });
  },
};

/** Records of running answers are deleted, of every second one the log too: their workers make them again. */
export const recordsDeleted: FaultClass = {
  name: 'records-deleted',
  async run(context) {
    const stage = await context.stage(QUICK);
    await underLoad(context, stage, {
      async inject(_, crowd) {
        const { look, keys } = stage.stack;
        const open = crowd.clients
          .flatMap((client) => [...client.open.values()])
          .filter((one) => one.last !== '');
        for (const [index, answer] of open.slice(0, 20).entries())
          await look.client.eval(
            // Only while it runs: nobody has a finished answer to make again.
            `if redis.call('HGET', KEYS[1], 'status') == 'running' then
               redis.call('DEL', KEYS[1])
               if ARGV[1] == '1' then redis.call('DEL', KEYS[2]) end
             end`,
            2,
            keys.generation(answer.user, answer.messageId),
            keys.log(answer.user, answer.messageId),
            index % 2,
          );
      },
      rounds: context.short ? 2 : Number.POSITIVE_INFINITY,
      pauseMs: 1_500,
    });
  },
};
