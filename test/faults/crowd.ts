import { setTimeout as delay } from 'node:timers/promises';
import { WebSocket } from 'ws';
import { compareFrameIds, parseFrameId } from '../../shared/frame-id.ts';
import type { ServerFrame, ServerFrameOf } from '../../shared/protocol.ts';
import type { HandlerContext } from '../../worker/handler.ts';
import { demoHandler } from '../../worker/models/demo.ts';
import { record, type Tally } from './tally.ts';

/**
 * The checking client: raw sockets that reconnect with jitter, over all gateways, and resume after the last id they
 * saw, as PROTOCOL.md tells clients to. It believes nothing: every id must be the next in line, every accepted
 * message must end exactly once, and the text must equal that of an undisturbed run.
 */

const RETRY_MS = 50; // first reconnect; doubles with jitter
const RETRY_MAX_MS = 1_000;
const ANSWER_MS = 20_000; // a chat or resume that stays unanswered for so long: hang up and try elsewhere
const STILL_MS = 400; // an answer that stands still for longer was disturbed

export interface Question {
  contents: string;
  parameters?: Record<string, unknown>;
  conversationId?: string;
  /** What the answer must be; null when it is not known beforehand. */
  expected: string | null;
  /** Whether this `failed` frame is what should come (then it counts as the end, not as a loss). */
  mayFail?: (frame: ServerFrameOf<'failed'>) => boolean;
  messageId?: string;
}

export type End = 'done' | 'failed' | 'cancelled' | 'told' | 'lost';

export interface CrowdOptions {
  urls: () => string[];
  tally: Tally;
  random: () => number;
  /** The class destroys data: an answer may be lost, if the client is told. It is then asked anew. */
  mayTell?: boolean;
}

let crowds = 0;

/** One generation, as a client sees it. */
export class Answer {
  readonly user: string;
  readonly messageId: string;
  readonly question: Question;
  accepted = false;
  last = '';
  text = '';
  starts = 0;
  end: End | null = null;
  cancelSent = false;
  lastFrameMs = Date.now();
  askedMs = Date.now();
  /** Frames from the start of a compacted log skip ids. */
  replaying = false;
  sentMs = 0;
  private readonly tally: Tally;
  readonly ended: Promise<End>;
  private settle: (end: End) => void = () => {};
  private readonly hooks: ((answer: Answer) => void)[] = [];

  constructor(user: string, messageId: string, question: Question, tally: Tally) {
    this.user = user;
    this.messageId = messageId;
    this.question = question;
    this.tally = tally;
    this.ended = new Promise((resolve) => {
      this.settle = resolve;
    });
  }

  /** Called at every frame of it. */
  onProgress(hook: (answer: Answer) => void): void {
    this.hooks.push(hook);
  }

  reset(): void {
    this.last = '';
    this.text = '';
    this.replaying = false;
  }

  finish(end: End): void {
    if (this.end) return;
    this.end = end;
    this.settle(end);
  }

  onFrame(frame: ServerFrameOf<'start' | 'token' | 'done' | 'failed'>): void {
    const where = `${this.user}/${this.messageId} ${frame.type} ${frame.id} after ${this.last || 'nothing'}`;
    if (this.end) {
      record(this.tally, 'doubled', `${where}: a frame after the end (${this.end})`);
      return;
    }
    const now = Date.now();
    const stillMs = now - this.lastFrameMs;
    this.lastFrameMs = now;
    if (stillMs > STILL_MS && this.accepted) this.tally.recoveries.push(stillMs);
    const id = parseFrameId(frame.id)!;
    const last = this.last === '' ? null : parseFrameId(this.last)!;
    if (last && compareFrameIds(frame.id, this.last) <= 0) {
      record(this.tally, 'doubled', where);
      return;
    }
    if (!this.replaying) {
      const opens = frame.type === 'start' || frame.type === 'failed' || frame.type === 'done';
      if (last && id.attempt === last.attempt ? id.seq !== last.seq + 1 : id.seq !== 0 || !opens)
        record(this.tally, 'gaps', where);
    }
    this.last = frame.id;
    switch (frame.type) {
      case 'start':
        this.text = '';
        this.starts++;
        break;
      case 'token':
        this.text += frame.text;
        break;
      case 'done':
        if (frame.length !== this.text.length)
          record(this.tally, 'wrong', `${where}: length ${frame.length}, text has ${this.text.length}`);
        else if (frame.finishReason === 'cancelled') {
          if (!this.cancelSent)
            record(this.tally, 'wrong', `${where}: cancelled, and nobody had asked for it`);
          else if (this.question.expected !== null && !this.question.expected.startsWith(this.text))
            record(this.tally, 'wrong', `${where}: cancelled text is not a beginning of the right one`);
        } else if (this.question.expected !== null && this.text !== this.question.expected)
          record(
            this.tally,
            'wrong',
            `${where}: got ${JSON.stringify(this.text.slice(0, 80))} (${this.text.length}), wanted ${JSON.stringify(this.question.expected.slice(0, 80))} (${this.question.expected.length})`,
          );
        this.finish(frame.finishReason === 'cancelled' ? 'cancelled' : 'done');
        break;
      case 'failed':
        if (this.question.mayFail?.(frame)) this.finish('failed');
        else this.finish('lost'); // whoever asked says whether it was told
        break;
      default:
        frame satisfies never;
    }
    for (const hook of this.hooks) hook(this);
  }
}

/** One user's client: at most one socket at a time, any number of open answers. */
export class CheckedClient {
  readonly user: string;
  private readonly options: CrowdOptions;
  readonly open = new Map<string, Answer>();
  /** Ended ones too, while the socket lives: a frame for one of them is a double. */
  private readonly known = new Map<string, Answer>();
  socket: WebSocket | null = null;
  ready = false;
  private stopped = false;
  private loop: Promise<void>;
  private drop: () => void = () => {};
  /** Frames other than of answers, for classes that look. */
  onFrame: (frame: ServerFrame) => void = () => {};
  url = '';

  constructor(user: string, options: CrowdOptions) {
    this.user = user;
    this.options = options;
    this.loop = this.run();
  }

  ask(question: Question): Answer {
    const answer = new Answer(
      this.user,
      question.messageId ?? `m${Math.floor(this.options.random() * 2 ** 40).toString(36)}`,
      question,
      this.options.tally,
    );
    this.options.tally.generations++;
    this.open.set(answer.messageId, answer);
    this.known.set(answer.messageId, answer);
    void answer.ended.then(() => this.open.delete(answer.messageId));
    this.pursue(answer);
    return answer;
  }

  send(frame: object): void {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(frame));
  }

  cancel(answer: Answer): void {
    answer.cancelSent = true;
    this.send({ type: 'cancel', messageId: answer.messageId });
  }

  /** Lets the connection go without a close. */
  vanish(): void {
    this.ready = false;
    this.socket?.terminate();
  }

  async stop(): Promise<void> {
    this.stopped = true;
    this.drop();
    this.socket?.terminate();
    await this.loop;
  }

  private pursue(answer: Answer): void {
    if (!this.ready || answer.end) return;
    answer.sentMs = Date.now();
    if (answer.accepted)
      this.send({
        type: 'resume',
        messageId: answer.messageId,
        ...(answer.last === '' ? {} : { after: answer.last }),
      });
    else
      this.send({
        type: 'chat',
        messageId: answer.messageId,
        contents: answer.question.contents,
        ...(answer.question.parameters ? { parameters: answer.question.parameters } : {}),
        ...(answer.question.conversationId ? { conversationId: answer.question.conversationId } : {}),
      });
  }

  private async run(): Promise<void> {
    const { random, tally } = this.options;
    for (let failures = 0; !this.stopped; ) {
      const urls = this.options.urls();
      this.url = urls[Math.floor(random() * urls.length)] ?? '';
      if (this.url && (await this.connect(this.url))) failures = 0;
      if (this.stopped) return;
      failures++;
      tally.reconnects++;
      const ceiling = Math.min(RETRY_MAX_MS, RETRY_MS * 2 ** failures);
      await delay(ceiling / 2 + (random() * ceiling) / 2);
    }
  }

  /** One connection, until it ends. True when it had been ready. */
  private connect(url: string): Promise<boolean> {
    return new Promise((resolve) => {
      const socket = new WebSocket(`${url}?userId=${this.user}`, { handshakeTimeout: 5_000 });
      this.socket = socket;
      let wasReady = false;
      const watch = setInterval(() => {
        const silentFor = (answer: Answer) => answer.sentMs > 0 && Date.now() - answer.sentMs > ANSWER_MS;
        if ([...this.open.values()].some(silentFor) || (!wasReady && Date.now() - began > ANSWER_MS))
          socket.terminate();
      }, 1_000);
      const began = Date.now();
      this.drop = () => socket.terminate();
      socket.on('open', () => socket.send(JSON.stringify({ type: 'init', userId: this.user })));
      socket.on('message', (data) => {
        const frame = JSON.parse(data.toString()) as ServerFrame;
        if (frame.type === 'ready') {
          wasReady = true;
          this.ready = true;
          for (const answer of this.open.values()) this.pursue(answer);
          return;
        }
        this.take(frame);
      });
      socket.on('error', () => {});
      socket.on('close', (code, reason) => {
        clearInterval(watch);
        this.ready = false;
        for (const answer of this.known.values())
          if (answer.end) this.known.delete(answer.messageId);
          else answer.sentMs = 0;
        if (code >= 4500)
          record(this.options.tally, 'errors', `${this.user} closed ${code} ${reason.toString()}`);
        resolve(wasReady);
      });
    });
  }

  private take(frame: ServerFrame): void {
    const { tally } = this.options;
    this.onFrame(frame);
    const answer = 'messageId' in frame ? this.known.get(String(frame.messageId)) : undefined;
    switch (frame.type) {
      case 'accepted':
        if (!answer) return;
        answer.sentMs = 0;
        answer.accepted = true;
        if (!answer.end && !frame.duplicate) answer.reset();
        if (frame.duplicate) answer.reset(); // `resumed` and all frames from the start follow
        return;
      case 'resumed':
        if (!answer) return;
        answer.sentMs = 0;
        if (!frame.recovered) answer.reset();
        answer.replaying = frame.compacted;
        return;
      case 'start':
      case 'token':
      case 'done':
      case 'failed':
        if (!answer) {
          record(
            tally,
            'doubled',
            `${this.user}: ${frame.type} ${frame.id} of ${frame.messageId}, which it does not follow`,
          );
          return;
        }
        answer.onFrame(frame);
        if (frame.type === 'failed' && answer.end === 'lost')
          this.blame(answer, `failed ${frame.code}: ${frame.message}`);
        return;
      case 'rejected':
        if (answer && !answer.end) this.onRejected(answer, frame);
        return;
      case 'error':
        record(tally, 'errors', `${this.user}: error ${frame.code} ${frame.message}`);
        return;
      default:
    }
  }

  private blame(answer: Answer, why: string): void {
    const { tally, mayTell } = this.options;
    record(tally, mayTell ? 'told' : 'lost', `${answer.user}/${answer.messageId} at ${answer.last}: ${why}`);
  }

  private onRejected(answer: Answer, frame: ServerFrameOf<'rejected'>): void {
    answer.sentMs = 0;
    if (frame.code === 'unknown_message' && answer.accepted) {
      this.blame(answer, 'accepted, and unknown now');
      answer.finish(this.options.mayTell ? 'told' : 'lost');
      return;
    }
    if (frame.code === 'unknown_message' && answer.cancelSent) return;
    if (!frame.temporary) {
      record(
        this.options.tally,
        'errors',
        `${answer.user}/${answer.messageId}: rejected ${frame.code} ${frame.message}`,
      );
      answer.finish('lost');
      return;
    }
    // Temporary: the same again, a little later, wherever we are connected then.
    const pauseMs = frame.retryAfterMs ?? 200;
    setTimeout(
      () => {
        if (!answer.end && answer.sentMs === 0) this.pursue(answer);
      },
      pauseMs * (0.5 + this.options.random()),
    ).unref();
  }
}

/** A number of users, each asking one question after the other for as long as it is told to. */
export class Crowd {
  readonly clients: CheckedClient[];
  readonly answers: Answer[] = [];
  /** Keeps every answer for an audit; off for runs of hours. */
  remember = true;
  readonly options: CrowdOptions;
  private asking = true;
  private readonly running: Promise<void>[] = [];

  constructor(users: number, options: CrowdOptions) {
    this.options = options;
    const name = ++crowds;
    this.clients = Array.from(
      { length: users },
      (_, index) => new CheckedClient(`c${name}u${index + 1}`, options),
    );
  }

  /** Everyone asks, again and again, until `stopAsking`. */
  stream(next: (client: CheckedClient, round: number) => Question): void {
    this.clients.forEach((client) => {
      this.running.push(
        (async () => {
          await delay(this.options.random() * 500); // not all at once
          for (let round = 1; this.asking; round++) {
            const answer = client.ask(next(client, round));
            if (this.remember) this.answers.push(answer);
            await answer.ended;
          }
        })(),
      );
    });
  }

  /** Resolves when so many answers are on their way. */
  async flowing(share = 0.5, timeoutMs = 30_000): Promise<void> {
    const until = Date.now() + timeoutMs;
    const count = () =>
      this.clients.filter((client) => [...client.open.values()].some((one) => one.last)).length;
    while (count() < this.clients.length * share) {
      if (Date.now() > until) throw new Error(`only ${count()} of ${this.clients.length} users stream`);
      await delay(20);
    }
  }

  stopAsking(): void {
    this.asking = false;
  }

  /** Waits until every answer has ended; what has not by then never will. */
  async settle(timeoutMs: number): Promise<void> {
    this.stopAsking();
    const open = () => this.clients.flatMap((client) => [...client.open.values()]);
    const until = Date.now() + timeoutMs;
    while (open().length > 0 && Date.now() < until) await delay(50);
    for (const answer of open())
      record(
        this.options.tally,
        'neverEnded',
        `${answer.user}/${answer.messageId} stands at ${answer.last || 'nothing'}${answer.accepted ? '' : ', not accepted'}`,
      );
    await delay(100); // a frame after the end would come about now
    for (const answer of open()) answer.finish('lost');
    await Promise.all(this.running);
  }

  async stop(): Promise<void> {
    this.stopAsking();
    await Promise.all(this.clients.map((client) => client.stop()));
  }
}

/** What the demo model says, undisturbed. */
export async function demoText(contents: string, parameters: Record<string, unknown>): Promise<string> {
  let text = '';
  const generator = demoHandler(
    {
      contents,
      parameters: { ...parameters, intervalMs: 0, firstTokenMs: 0, failAttempts: 0 },
      userId: 'u',
      messageId: 'm',
    },
    { signal: new AbortController().signal, attempt: 1 } as HandlerContext, // all that the demo model looks at
  );
  for await (const piece of generator) text += piece;
  return text;
}
