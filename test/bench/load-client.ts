import { Histogram } from './histogram.ts';
import {
  CONTENTS,
  type FromClient,
  type LoadPlan,
  type LoadResult,
  SEEDS,
  type ToClient,
} from './load-plan.ts';
import { expectedText } from './model.ts';
import { openRawSocket, type RawSocket } from './raw-socket.ts';

/**
 * The load client, a process of its own. It reads frames from raw bytes: a frame's kind is one letter at a fixed
 * place, its tokens are counted as the spaces in it (every token of an answer but the first begins with one, and
 * nothing else in a token frame has any). Times are arrival times on the monotonic clock.
 *
 * A socket has one answer under way. In an open loop an ask that finds no free socket waits, and its latency counts
 * from when it was due.
 */

const SPACE = 32;
/** Ephemeral ports are 28,000 for each pair of addresses; below that the kernel finds one faster without a bind. */
const SOCKETS_PER_ADDRESS = 20_000;

interface Client {
  index: number;
  socket: RawSocket;
  busy: boolean;
  messageId: string;
  seed: number;
  dueAt: number;
  askedAt: number;
  lastTokenAt: number;
  tokens: number;
  text: string | null;
  onReady: (() => void) | null;
  // For recovery only:
  lastId: string;
  lostAt: number;
  recoveredMs: number;
}

function sourceAddress(index: number): string | undefined {
  const part = Math.floor(index / SOCKETS_PER_ADDRESS);
  return part === 0 ? undefined : `127.0.0.${1 + part}`;
}

const say = (message: FromClient) => process.send!(message);

process.on('message', (message: ToClient) => {
  if (message.type === 'plan')
    run(message.plan).then(
      (result) => {
        say({ type: 'result', result });
        process.disconnect();
        setTimeout(() => process.exit(0), 50);
      },
      (error: Error) => {
        say({ type: 'error', message: error.stack ?? String(error) });
        process.exit(1);
      },
    );
  else finish?.();
});
process.on('disconnect', () => setTimeout(() => process.exit(0), 200).unref());

let finish: (() => void) | null = null;
const wait = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

async function run(plan: LoadPlan): Promise<LoadResult> {
  const isSocketIo = plan.protocol === 'socketio';
  const recovering = plan.drive.kind === 'once' && plan.drive.recovery;
  const texts = await Promise.all(
    Array.from({ length: SEEDS }, (_, seed) => expectedText(CONTENTS, plan.tokens, seed)),
  );
  const clients: Client[] = [];
  const free: Client[] = [];
  const waitingAsks: number[] = [];
  const firstToken = new Histogram();
  const interToken = new Histogram();
  const refused = new Set<string>();
  let inWindow = false;
  let stopping = false;
  let asked = 0;
  let finished = 0;
  let wrongCount = 0;
  let wrongText = 0;
  let compared = 0;
  let failed = 0;
  let closed = 0;
  let late = 0;
  let tokens = 0;
  let frames = 0;
  let answers = 0;
  let unserved = 0;
  let bytes = 0;
  let wakeDrain: (() => void) | null = null;

  const batch = `${plan.tag}${Date.now().toString(36)}`;
  const chatHead = isSocketIo ? '42["chat",{' : '{"type":"chat",';
  const chatTail = isSocketIo ? '}]' : '}';
  const perTurn = plan.tokenPerTurn ? ',"tokenPerTurn":true' : '';

  function ask(client: Client, dueAt: number): void {
    const number = asked++;
    client.busy = true;
    client.seed = number % SEEDS;
    client.messageId = `${batch}-${number}`; // never the id of an earlier load's answer, which would be joined
    client.tokens = 0;
    client.lastId = '';
    client.text = number % plan.verifyEvery === 0 ? '' : null;
    client.dueAt = dueAt;
    client.askedAt = performance.now();
    client.socket.send(
      `${chatHead}"messageId":"${client.messageId}","contents":"${CONTENTS}","parameters":{"tokens":${plan.tokens},"intervalMs":${plan.intervalMs},"seed":${client.seed}${perTurn}}${chatTail}`,
    );
  }

  function ended(client: Client): void {
    client.busy = false;
    finished++;
    if (inWindow) answers++;
    if (client.tokens !== plan.tokens) wrongCount++;
    if (client.text !== null) {
      compared++;
      if (client.text !== texts[client.seed]) wrongText++;
    }
    if (plan.drive.kind === 'closed') {
      if (!stopping) ask(client, performance.now());
    } else if (plan.drive.kind === 'open') {
      const due = waitingAsks.shift();
      if (due !== undefined) ask(client, due);
      else free.push(client);
    }
    if (stopping && wakeDrain && finished + failed === asked) wakeDrain();
  }

  function tokenFrame(client: Client, data: Buffer, from: number, to: number): void {
    let count = 0;
    for (let at = from; at < to; at++) if (data[at] === SPACE) count++;
    const now = performance.now();
    if (client.tokens === 0) {
      count++;
      if (inWindow) firstToken.add(now - client.dueAt);
    } else if (plan.intervalMs > 0 && client.lostAt === 0) {
      const beyond = now - client.lastTokenAt - plan.intervalMs;
      if (beyond > 1_000) late++;
      if (inWindow) {
        interToken.add(beyond);
        if (count > 1) interToken.add(0, count - 1);
      }
    }
    client.tokens += count;
    client.lastTokenAt = now;
    if (inWindow) {
      tokens += count;
      frames++;
      bytes += to - from;
    }
    if (client.text !== null) {
      const json = data.toString('utf8', from, to);
      client.text += isSocketIo ? JSON.parse(json.slice(2))[1].text : JSON.parse(json).text;
    }
    if (recovering) {
      const at = data.indexOf('"id":"', from);
      if (at > 0 && at < to) client.lastId = data.toString('latin1', at + 6, data.indexOf(0x22, at + 6));
      if (client.lostAt > 0) {
        client.recoveredMs = now - client.lostAt;
        client.lostAt = 0;
      }
    }
  }

  /** A frame by the letter that tells its kind. */
  function onFrame(client: Client, data: Buffer, from: number, to: number): void {
    if (isSocketIo) {
      switch (data[from]) {
        case 0x30: // 0: engine.io open
          client.socket.send('40');
          return;
        case 0x32: // 2: ping
          client.socket.send('3');
          return;
        case 0x34: // 4: message
          if (data[from + 1] === 0x30) client.onReady?.();
          else if (data[from + 4] === 0x74) tokenFrame(client, data, from, to);
          else if (data[from + 4] === 0x64) ended(client);
          return;
        default:
          return;
      }
    }
    switch (data[from + 9]) {
      case 0x74: // token
        tokenFrame(client, data, from, to);
        return;
      case 0x64: // done
        ended(client);
        return;
      case 0x73: // start: discard what came
        if (client.tokens > 0 && !recovering) client.tokens = 0;
        return;
      case 0x72: {
        // ready, resumed, rejected
        const third = data[from + 11];
        if (third === 0x61) client.onReady?.();
        else if (third === 0x6a) fail(client, data.toString('utf8', from, to));
        return;
      }
      case 0x65: // error
        refused.add(data.toString('utf8', from, to).slice(0, 200));
        return;
      case 0x66: // failed
        fail(client, data.toString('utf8', from, to));
        return;
      default:
        return;
    }
  }

  function fail(client: Client, reason: string): void {
    failed++;
    client.busy = false;
    if (refused.size < 5) refused.add(reason.slice(0, 200));
    if (stopping && wakeDrain && finished + failed === asked) wakeDrain();
  }

  function connect(client: Client, attempt: number): Promise<void> {
    return new Promise((resolve, reject) => {
      const target = plan.targets[(client.index + attempt) % plan.targets.length]!;
      let ready = false;
      client.onReady = () => {
        ready = true;
        client.onReady = null;
        resolve();
      };
      client.socket = openRawSocket(
        {
          port: target.port,
          path: isSocketIo ? target.path : `${target.path}?userId=${plan.tag}${client.index}`,
          localAddress: sourceAddress(client.index),
        },
        {
          open() {
            if (!isSocketIo) client.socket.send(`{"type":"init","userId":"${plan.tag}${client.index}"}`);
          },
          frame: (data, from, to) => onFrame(client, data, from, to),
          close(reason) {
            if (!ready) reject(new Error(reason));
            else if (!stopping || recovering) {
              closed++;
              if (recovering) reconnect(client, attempt + 1);
              else if (refused.size < 5) refused.add(reason);
            }
          },
        },
      );
    });
  }

  function reconnect(client: Client, attempt: number): void {
    if (client.lostAt === 0) client.lostAt = performance.now();
    connect(client, attempt).then(
      () => {
        if (client.busy)
          client.socket.send(
            `{"type":"resume","messageId":"${client.messageId}"${client.lastId ? `,"after":"${client.lastId}"` : ''}}`,
          );
      },
      () => setTimeout(reconnect, 20 + Math.random() * 50, client, attempt + 1),
    );
  }

  // --- connect ---
  const connectStart = performance.now();
  let next = 0;
  await Promise.all(
    Array.from({ length: Math.min(plan.connecting, plan.sockets) }, async () => {
      while (next < plan.sockets) {
        const client: Client = {
          index: next++,
          socket: null as unknown as RawSocket,
          busy: false,
          messageId: '',
          seed: 0,
          dueAt: 0,
          askedAt: 0,
          lastTokenAt: 0,
          tokens: 0,
          text: null,
          onReady: null,
          lastId: '',
          lostAt: 0,
          recoveredMs: -1,
        };
        clients.push(client);
        for (let attempt = 1; ; attempt++) {
          try {
            await connect(client, 0);
            break;
          } catch (error) {
            if (attempt === 5) throw error;
            await wait(100 * attempt);
          }
        }
      }
    }),
  );
  const connectMs = performance.now() - connectStart;
  say({ type: 'connected', ms: connectMs });

  // --- drive ---
  let seconds = 0;
  let clientCores = 0;
  if (plan.drive.kind === 'idle') {
    await new Promise<void>((resolve) => {
      finish = resolve;
    });
  } else {
    const begin = performance.now();
    let asking: NodeJS.Timeout | undefined;
    if (plan.drive.kind === 'closed') for (const client of clients) ask(client, performance.now());
    else if (plan.drive.kind === 'open') {
      free.push(...clients);
      const { perSecond } = plan.drive;
      let sent = 0;
      asking = setInterval(() => {
        const due = ((performance.now() - begin) / 1000) * perSecond;
        for (; sent < due; sent++) {
          const dueAt = begin + (sent / perSecond) * 1000;
          const client = free.shift();
          if (client) ask(client, dueAt);
          else waitingAsks.push(dueAt);
        }
      }, 1);
    } else {
      const { rampMs } = plan.drive;
      let sent = 0;
      asking = setInterval(() => {
        const due = rampMs > 0 ? ((performance.now() - begin) / rampMs) * clients.length : clients.length;
        for (; sent < Math.min(due, clients.length); sent++) ask(clients[sent]!, performance.now());
        if (sent >= clients.length) clearInterval(asking);
      }, 5);
    }
    await wait(plan.warmUpMs);
    say({ type: 'window-start' });
    inWindow = true;
    const start = performance.now();
    const cpu = process.cpuUsage();
    await wait(plan.measureMs);
    // A short window on a machine that stands still for a second can hold no answer, and is then no measurement.
    for (let late = 0; answers === 0 && plan.drive.kind !== 'once' && late < plan.drainMs; late += 50)
      await wait(50);
    inWindow = false;
    seconds = (performance.now() - start) / 1000;
    const used = process.cpuUsage(cpu);
    clientCores = (used.user + used.system) / 1e6 / seconds;
    say({ type: 'window-end' });
    stopping = true;
    if (plan.drive.kind === 'open') clearInterval(asking);
    unserved = waitingAsks.splice(0).length;
    if (finished + failed < asked)
      await Promise.race([
        new Promise<void>((resolve) => {
          wakeDrain = resolve;
        }),
        wait(plan.drainMs),
      ]);
  }
  const result: LoadResult = {
    connectMs,
    seconds,
    tokens,
    frames,
    answers,
    bytes,
    firstToken: firstToken.summary(),
    interToken: interToken.summary(),
    asked,
    finished,
    wrongCount,
    wrongText,
    compared,
    failed,
    refused: [...refused],
    unfinished: asked - finished - failed,
    unserved,
    closed,
    late,
    clientCores,
  };
  if (recovering) {
    const times = clients
      .filter((client) => client.recoveredMs >= 0)
      .map((client) => client.recoveredMs)
      .sort((a, b) => a - b);
    result.recovery = {
      sockets: times.length,
      lastMs: times.at(-1) ?? Number.NaN,
      p50Ms: times[times.length >> 1] ?? Number.NaN,
    };
  }
  stopping = true;
  for (const client of clients) client.socket.destroy();
  return result;
}
