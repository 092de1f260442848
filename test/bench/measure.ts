import { type ChildProcess, fork } from 'node:child_process';
import { createRedis } from '../../shared/redis.ts';
import type { FromClient, LoadPlan, LoadResult, ToClient } from './load-plan.ts';
import { ROOT, readCpuSeconds, readMachineCpuSeconds, readRssBytes } from './processes.ts';
import type { RunningSystem } from './systems.ts';

/** Drives one load against one system and reads what it cost: CPU by role, Redis commands and bytes. */

export interface Costs {
  gatewayCpu: number;
  workerCpu: number;
  redisCpu: number;
  /** Of the whole machine. */
  machineCpu: number;
  gatewayRss: number;
  workerRss: number;
  redisCommands: number;
  redisBytesIn: number;
  redisBytesOut: number;
  /** Calls by command name. */
  commands: Record<string, number>;
}

export interface Measured extends LoadResult {
  costs: Costs;
  /** Cores that something else used meanwhile: a noisy measurement. */
  otherCores: number;
}

export interface LoadHandle {
  connected: Promise<number>;
  windowStart: Promise<void>;
  result: Promise<LoadResult>;
  finish(): void;
  kill(): void;
}

/** Starts a load client. */
export function startLoad(plan: LoadPlan): LoadHandle {
  const child: ChildProcess = fork(`${ROOT}test/bench/load-client.ts`, [], {
    cwd: ROOT,
    execArgv: ['--import', 'tsx'],
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    env: { PATH: process.env.PATH, HOME: process.env.HOME },
  });
  const marks = new Map<string, (value: number) => void>();
  const rejects: ((error: Error) => void)[] = [];
  const mark = (name: string) => {
    const promise = new Promise<number>((resolve, reject) => {
      marks.set(name, resolve);
      rejects.push(reject);
    });
    promise.catch(() => {});
    return promise;
  };
  const connected = mark('connected');
  const windowStart = mark('window-start').then(() => {});
  windowStart.catch(() => {});
  let settle: (result: LoadResult) => void;
  const result = new Promise<LoadResult>((resolve, reject) => {
    settle = resolve;
    rejects.push(reject);
  });
  result.catch(() => {});
  const fail = (error: Error) => {
    for (const reject of rejects) reject(error);
  };
  child.on('message', (message: FromClient) => {
    if (message.type === 'connected') marks.get('connected')!(message.ms);
    else if (message.type === 'window-start') marks.get('window-start')!(0);
    else if (message.type === 'window-end') onWindowEnd?.();
    else if (message.type === 'error') fail(new Error(message.message));
    else if (message.type === 'result') settle(message.result);
  });
  child.on('exit', (code) => fail(new Error(`the load client ended with ${code}`)));
  let onWindowEnd: (() => void) | undefined;
  child.send({ type: 'plan', plan } satisfies ToClient);
  return {
    connected,
    windowStart,
    result,
    set windowEnd(listener: () => void) {
      onWindowEnd = listener;
    },
    finish: () => child.send({ type: 'finish' } satisfies ToClient),
    kill: () => child.kill('SIGKILL'),
  } as LoadHandle & { windowEnd: () => void };
}

/** The whole of it: load with a measured window, costs of that window. */
export async function measure(
  system: RunningSystem,
  plan: Omit<LoadPlan, 'protocol' | 'targets' | 'tag'>,
): Promise<Measured> {
  const load = startLoad({ ...plan, protocol: system.protocol, targets: system.targets, tag: 'u' });
  const look = createRedis({ url: system.redisUrl, name: 'bench' });
  try {
    await look.connected();
    await load.windowStart;
    const before = await readCosts(system, look.client.info.bind(look.client));
    const ended = new Promise<Costs>((resolve, reject) => {
      (load as LoadHandle & { windowEnd: () => void }).windowEnd = () => {
        readCosts(system, look.client.info.bind(look.client)).then(resolve, reject);
      };
      load.result.catch(reject);
    });
    const after = await ended;
    const result = await load.result;
    const costs = difference(before, after);
    const { machineCpu, gatewayCpu, workerCpu, redisCpu } = costs;
    const others = (machineCpu - gatewayCpu - workerCpu - redisCpu) / result.seconds - result.clientCores;
    return { ...result, costs, otherCores: Math.max(0, others) };
  } finally {
    load.kill();
    await look.close();
  }
}

async function readCosts(system: RunningSystem, info: (section: string) => Promise<string>): Promise<Costs> {
  const sum = (list: { pid: number }[], read: (pid: number) => number) =>
    list.reduce((total, { pid }) => total + read(pid), 0);
  const cpu = {
    gatewayCpu: sum(system.gateways, readCpuSeconds),
    workerCpu: sum(system.workers, readCpuSeconds),
    redisCpu: readCpuSeconds(system.redisPid),
    machineCpu: readMachineCpuSeconds(),
    gatewayRss: sum(system.gateways, readRssBytes),
    workerRss: sum(system.workers, readRssBytes),
  };
  const [stats, commandStats] = await Promise.all([info('stats'), info('commandstats')]);
  const number = (name: string) => Number(new RegExp(`^${name}:(\\d+)`, 'm').exec(stats)?.[1] ?? 0);
  const commands: Record<string, number> = {};
  for (const [, name, calls] of commandStats.matchAll(/^cmdstat_([^:]+):calls=(\d+)/gm))
    commands[name!] = Number(calls);
  return {
    ...cpu,
    redisCommands: number('total_commands_processed'),
    redisBytesIn: number('total_net_input_bytes'),
    redisBytesOut: number('total_net_output_bytes'),
    commands,
  };
}

function difference(before: Costs, after: Costs): Costs {
  const commands: Record<string, number> = {};
  for (const [name, calls] of Object.entries(after.commands)) {
    const more = calls - (before.commands[name] ?? 0);
    if (more > 0 && name !== 'info') commands[name] = more;
  }
  return {
    gatewayCpu: after.gatewayCpu - before.gatewayCpu,
    workerCpu: after.workerCpu - before.workerCpu,
    redisCpu: after.redisCpu - before.redisCpu,
    machineCpu: after.machineCpu - before.machineCpu,
    gatewayRss: after.gatewayRss,
    workerRss: after.workerRss,
    redisCommands: after.redisCommands - before.redisCommands,
    redisBytesIn: after.redisBytesIn - before.redisBytesIn,
    redisBytesOut: after.redisBytesOut - before.redisBytesOut,
    commands,
  };
}
