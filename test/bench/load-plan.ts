/** What the bench asks of its load client, and what it gets back. One process each, messages over IPC. */

export interface LoadPlan {
  protocol: 'json' | 'socketio';
  /** Sockets are spread over these in turn. */
  targets: { port: number; path: string }[];
  sockets: number;
  /** Tells users of several load clients apart. */
  tag: string;
  /** Sockets that may be connecting at the same time. */
  connecting: number;
  tokens: number;
  intervalMs: number;
  /** Only one token an event-loop turn of the worker (see model.ts). */
  tokenPerTurn?: boolean;
  drive:
    | { kind: 'closed' } // every socket asks again when it has its answer
    | { kind: 'open'; perSecond: number } // asks come at this rate, whatever the system does
    | { kind: 'idle' } // sockets bind and wait for the bench to say `finish`
    | { kind: 'once'; rampMs: number; recovery: boolean }; // every socket asks once, spread over `rampMs`
  /** Before the measured window, ms: not counted. */
  warmUpMs: number;
  measureMs: number;
  /** After the window: how long answers may take to end. */
  drainMs: number;
  /** The text of one in so many answers is compared word by word; the number of tokens of every answer is. */
  verifyEvery: number;
}

/** Percentiles in ms. */
export interface Latency {
  count: number;
  p50: number;
  p99: number;
  max: number;
}

export interface LoadResult {
  connectMs: number;
  /** In the measured window. */
  seconds: number;
  tokens: number;
  frames: number;
  answers: number;
  firstToken: Latency;
  /** Time between tokens beyond the model's pace; only for paced answers. */
  interToken: Latency;
  /** Over the whole run. */
  asked: number;
  finished: number;
  wrongCount: number;
  wrongText: number;
  compared: number;
  failed: number;
  refused: string[];
  unfinished: number;
  /** Asks of an open loop that were due and never found a free socket. */
  unserved: number;
  closed: number;
  /** Tokens that came more than 1 s late. */
  late: number;
  /** CPU of this client over the measured window, in cores. */
  clientCores: number;
  recovery?: { sockets: number; lastMs: number; p50Ms: number };
  bytes: number;
}

export type ToClient = { type: 'plan'; plan: LoadPlan } | { type: 'finish' };
export type FromClient =
  | { type: 'connected'; ms: number }
  | { type: 'window-start' }
  | { type: 'window-end' }
  | { type: 'result'; result: LoadResult }
  | { type: 'error'; message: string };

/** How requests look; every system gets the same. */
export const CONTENTS = 'bench';
export const SEEDS = 16;
