import { spawnSync } from 'node:child_process';
import { conversationOf, parseAiFrame, parseAiPost, readQuestion } from '../../gateway/ai/questions.ts';
import { compareFrameIds, parseFrameId } from '../../shared/frame-id.ts';
import { parseClientFrame } from '../../shared/protocol.ts';
import { openChat } from '../helpers/chat-client.ts';
import { type Logged, type Stack, startStack } from '../helpers/stack.ts';
import { createPools, createRandom, frameOf, mutate, type Pools, type Random, requestOf } from './inputs.ts';
import { encodeFrame, OPCODE, openRaw, openRawWebSocket, type RawSocket } from './raw-socket.ts';

/**
 * Throws inputs at a real gateway, with Redis and a worker behind it, and looks at what is left of it: the same
 * process, ready, still answering, no error in its log, and no more memory than after the first part.
 *
 * Of the inputs, 60 % are frames on the native socket, 15 % on /ai, 10 % whole HTTP requests and handshakes on a
 * connection of their own; 15 % go through the parsers in this process.
 */

export interface FuzzOptions {
  inputs: number;
  seed: number;
  /** Called now and then. */
  onProgress?(line: FuzzSample): void;
}

export interface FuzzSample {
  inputs: number;
  seconds: number;
  rssMb: number;
  redisMb: number;
}

export interface FuzzReport {
  inputs: { native: number; ai: number; http: number; parsed: number };
  connections: number;
  seconds: number;
  samples: FuzzSample[];
  /** Mean RSS of the second quarter of the run (the first one warms up), and of the last. */
  settledMb: number;
  endMb: number;
  errors: Logged[];
  /** Why it failed; empty = it did not. */
  failures: string[];
}

const LANES = 12; // connections at a time
const BATCH = 64; // frames between two looks at whether the server is still with us
const SAMPLES = 40;
/** Garbage is collected instead of kept, so that RSS shows what is held; holding more than this ends the process. */
const OLD_SPACE_MB = 96;
const GROWTH_MB = 20; // of the last quarter's mean above the second quarter's: the allocator's slack

export async function fuzz(options: FuzzOptions): Promise<FuzzReport> {
  const stack = await startStack(null, {
    workers: 1,
    gatewayEnv: {
      CONNECTION_FRAMES_PER_SECOND: '0',
      USER_FRAMES_PER_SECOND: '0',
      NODE_OPTIONS: `--max-old-space-size=${OLD_SPACE_MB}`,
    },
    env: { RETENTION_MS: '2000', RETRY_BASE_MS: '5', LOG_LEVEL: 'info' },
  });
  try {
    return await run(stack, options);
  } finally {
    await stack.stop();
  }
}

async function run(stack: Stack, { inputs, seed, onProgress }: FuzzOptions): Promise<FuzzReport> {
  const gateway = stack.gateways[0]!;
  const pools = createPools(seed, Math.min(4_000, Math.max(500, inputs / 20)));
  const plan = { native: 0.6, ai: 0.15, http: 0.1, parsed: 0.15 };
  const done = { native: 0, ai: 0, http: 0, parsed: 0 };
  const samples: FuzzSample[] = [];
  const failures: string[] = [];
  let connections = 0;
  const started = Date.now();
  let hasExited = false;
  let isOver = false;
  void gateway.exited.then((code) => {
    if (isOver) return;
    hasExited = true;
    const last = gateway.logs.slice(-30).map((line) => JSON.stringify(line));
    failures.push(`the gateway ended with ${code ?? gateway.child.signalCode}:\n${last.join('\n')}`);
  });
  const total = () => done.native + done.ai + done.http + done.parsed;
  const isDone = (kind: keyof typeof plan) => hasExited || done[kind] >= inputs * plan[kind];

  async function sample(): Promise<void> {
    const memory = await stack.look.client.info('memory');
    const line: FuzzSample = {
      inputs: total(),
      seconds: Math.round((Date.now() - started) / 100) / 10,
      rssMb: rssMb(gateway.pid),
      redisMb: Math.round(Number(/used_memory:(\d+)/.exec(memory)![1]) / 2 ** 20),
    };
    samples.push(line);
    onProgress?.(line);
  }

  /** One connection's life: frames until it is cut off, or has had enough. */
  async function socketLane(kind: 'native' | 'ai', random: Random): Promise<void> {
    const pool = pools[kind];
    while (!isDone(kind)) {
      const user = 20_000 + random.below(50);
      const raw = await openRawWebSocket(gateway.port, kind === 'ai' ? `/ai?userId=${user}` : '/ws');
      connections++;
      if (kind === 'native' && random.chance(0.9))
        raw.write(encodeFrame(OPCODE.text, JSON.stringify({ type: 'init', userId: user })));
      for (let batches = random.below(8) + 1; batches > 0 && !raw.isClosed && !isDone(kind); batches--) {
        const parts: Buffer[] = [];
        for (let count = 0; count < BATCH; count++) {
          const { bytes, ends } = frameOf(random, mutate(random, pool));
          parts.push(bytes);
          done[kind]++;
          if (ends && random.chance(0.7)) break;
        }
        raw.write(Buffer.concat(parts));
        if (!(await isAnswering(raw))) break;
      }
      raw.destroy();
    }
  }

  async function httpLane(random: Random): Promise<void> {
    while (!isDone('http')) {
      const raw = await openRaw(gateway.port);
      connections++;
      for (let count = random.below(4) + 1; count > 0; count--) {
        raw.write(requestOf(random, pools));
        done.http++;
      }
      if (random.chance(0.5)) raw.socket.end();
      await raw.until((received) => (received.length > 0 ? true : undefined), 20).catch(() => {});
      raw.destroy();
    }
  }

  async function parserLane(random: Random): Promise<void> {
    while (!isDone('parsed')) {
      for (let count = 0; count < 500; count++) {
        const problem = parse(random, pools);
        done.parsed++;
        if (problem) failures.push(problem);
      }
      await new Promise((resolve) => setImmediate(resolve));
    }
  }

  async function samplingLane(): Promise<void> {
    let next = 0;
    while (!hasExited && total() < inputs) {
      if (total() >= next) {
        await sample();
        next += inputs / SAMPLES;
      }
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  const lanes: Promise<void>[] = [samplingLane(), parserLane(createRandom(seed))];
  for (let lane = 0; lane < LANES; lane++) {
    const random = createRandom(seed * 1_000 + lane);
    if (lane % 4 === 0) lanes.push(httpLane(random));
    else lanes.push(socketLane(lane % 4 === 1 && lane > 1 ? 'ai' : 'native', random));
  }
  await Promise.all(
    lanes.map((lane) => lane.catch((error: Error) => void failures.push(`a lane ended: ${error.message}`))),
  );

  if (!hasExited) {
    await new Promise((resolve) => setTimeout(resolve, 500)); // what was cut off is noticed
    await sample();
    const ready = await fetch(`${gateway.http}/readyz`);
    if (ready.status !== 200) failures.push(`not ready afterwards: ${await ready.text()}`);
    const client = await openChat(gateway.url, 'after-the-storm');
    client.send({
      type: 'chat',
      messageId: 'm1',
      contents: 'hello',
      parameters: { tokens: 5, intervalMs: 0, seed: 1 },
    });
    const answer = await client.answer('m1', 60_000);
    if (answer.end.type !== 'done' || answer.text.split(' ').length !== 5)
      failures.push(`the last answer was wrong: ${JSON.stringify(answer)}`);
    client.close();
  }
  isOver = true;
  const errors = gateway.logs.filter(
    ({ level }) => level === 'error' || level === 'fatal' || level === 'stderr',
  );
  for (const line of errors.slice(0, 5)) failures.push(`in the log: ${JSON.stringify(line)}`);
  const mean = (from: number, to: number) => {
    const part = samples.filter((line) => line.inputs >= inputs * from && line.inputs <= inputs * to);
    return Math.round(part.reduce((sum, line) => sum + line.rssMb, 0) / part.length);
  };
  const settledMb = mean(0.25, 0.5);
  const endMb = mean(0.75, 2);
  if (inputs >= 100_000 && endMb > settledMb + GROWTH_MB)
    failures.push(`memory grew from ${settledMb} MB to ${endMb} MB`);
  return {
    inputs: done,
    connections,
    seconds: Math.round((Date.now() - started) / 1000),
    samples,
    settledMb,
    endMb,
    errors,
    failures,
  };
}

/** True when the server answers a ping; false when it has hung up. A broken frame may hide the ping: that is its end. */
async function isAnswering(raw: RawSocket): Promise<boolean> {
  raw.write(encodeFrame(OPCODE.ping, 'fuzz'));
  const pong = Buffer.concat([Buffer.from([0x8a, 4]), Buffer.from('fuzz')]);
  const found = await raw
    .until((received) => (received.indexOf(pong) >= 0 ? true : undefined), 2_000)
    .catch(() => undefined);
  raw.received = Buffer.alloc(0);
  return found === true;
}

/** One input through every parser. What is wrong with what they said, or null. */
export function parse(random: Random, pools: Pools): string | null {
  const text = mutate(random, random.pick([pools.native, pools.ai])).toString();
  try {
    const native = parseClientFrame(text);
    if ('reason' in native && native.reason === '') return `no reason for ${text}`;
    const ai = parseAiFrame(text);
    if ('reason' in ai && ai.reason === '') return `no reason for ${text}`;
    const post = parseAiPost(text);
    if ('post' in post) {
      const read = readQuestion(post.post, 262_144);
      if ('question' in read && !('frame' in parseClientFrame(JSON.stringify(read.question))))
        return `no question of ours: ${text}`;
      if (!/^[A-Za-z0-9._:@-]{1,128}$/.test(conversationOf(post.post.id))) return `no conversation: ${text}`;
    }
    const id = text.slice(0, 30);
    const parsed = parseFrameId(id);
    if (parsed && compareFrameIds(id, `${parsed.attempt}-${parsed.seq}`) !== 0)
      return `not its own id: ${id}`;
    return null;
  } catch (error) {
    return `thrown for ${JSON.stringify(text.slice(0, 500))}: ${(error as Error).stack}`;
  }
}

function rssMb(pid: number): number {
  const { stdout } = spawnSync('ps', ['-o', 'rss=', '-p', String(pid)], { encoding: 'utf8' });
  return Math.round(Number(stdout) / 1024);
}
