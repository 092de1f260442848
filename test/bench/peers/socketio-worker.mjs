import { createAdapter } from '@socket.io/redis-streams-adapter';
import { Worker } from 'bullmq';
import { Redis } from 'ioredis';
import { Server } from 'socket.io';
import { announce } from '../announce.ts';
import { mergeTokens } from '../merge-tokens.ts';
import { generate } from '../model.ts';

/** BullMQ worker that emits through a Socket.IO server without sockets, over the streams adapter. */
const url = process.env.REDIS_URL;
const merge = process.env.MERGE !== 'none';
const redis = new Redis(url, { enableAutoPipelining: true });
// The adapter keeps the promise of its XADD to itself; the merging rule needs it.
let lastAppend = Promise.resolve();
const append = redis.xadd;
redis.xadd = (...args) => {
  lastAppend = append.apply(redis, args);
  return lastAppend;
};
const io = new Server({
  adapter: createAdapter(redis, { onlyPlaintext: true, maxLen: 200_000, readCount: 1_000 }),
});

new Worker(
  'chat',
  async ({ data }) => {
    const { messageId, room } = data;
    const to = io.to(room);
    const merger = mergeTokens(merge, (text) => {
      to.emit('token', { messageId, text });
      return lastAppend;
    });
    await generate({ ...data, userId: room }, merger.push);
    await merger.flushed();
    to.emit('done', { messageId });
  },
  {
    connection: new Redis(url, { enableAutoPipelining: true, maxRetriesPerRequest: null }),
    concurrency: Number(process.env.CONCURRENCY),
    removeOnComplete: { count: 0 },
    removeOnFail: { count: 0 },
  },
)
  .waitUntilReady()
  .then(() => announce(0));
