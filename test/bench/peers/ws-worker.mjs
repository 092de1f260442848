import { Worker } from 'bullmq';
import { Redis } from 'ioredis';
import { announce } from '../announce.ts';
import { mergeTokens } from '../merge-tokens.ts';
import { generate } from '../model.ts';
import { pollList } from './locked-list.mjs';

/** Publishes frames to the node of each socket: one PUBLISH a frame (auto-pipelined), or one a turn and node. */
const url = process.env.REDIS_URL;
const merge = process.env.MERGE !== 'none';
const connect = () => new Redis(url, { enableAutoPipelining: true, maxRetriesPerRequest: null });
const redis = connect();

const single = (node, socket, frame) => redis.publish(`reply:${node}`, `${socket} ${frame}`);

const turns = new Map();
/** Collects the frames of one event-loop turn for a node. */
function batched(node, socket, frame) {
  let turn = turns.get(node);
  if (!turn) {
    turn = { pairs: [] };
    turn.sent = new Promise((resolve) => {
      setImmediate(() => {
        turns.delete(node);
        redis.publish(`reply:${node}`, JSON.stringify(turn.pairs)).then(resolve, resolve);
      });
    });
    turns.set(node, turn);
  }
  turn.pairs.push(socket, frame);
  return turn.sent;
}

const publish = process.env.BATCH === 'turn' ? batched : single;

async function answer(data) {
  const { messageId, node, socket } = data;
  const head = `{"type":"token","messageId":"${messageId}","text":`;
  const merger = mergeTokens(merge, (text) => publish(node, socket, `${head}${JSON.stringify(text)}}`));
  await generate({ ...data, userId: socket }, merger.push);
  await merger.flushed();
  void publish(node, socket, `{"type":"done","messageId":"${messageId}"}`);
}

const concurrency = Number(process.env.CONCURRENCY);
if (process.env.QUEUE === 'list') {
  void pollList(connect(), concurrency, answer);
  announce(0);
} else {
  await new Worker('chat', ({ data }) => answer(data), {
    connection: connect(),
    concurrency,
    removeOnComplete: { count: 0 },
    removeOnFail: { count: 0 },
  }).waitUntilReady();
  announce(0);
}
