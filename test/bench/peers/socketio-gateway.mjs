import { createServer } from 'node:http';
import { createAdapter } from '@socket.io/redis-streams-adapter';
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import { Server } from 'socket.io';
import { announce } from '../announce.ts';
import { addJobs } from './add-jobs.mjs';

/** Socket.IO in front, WebSocket transport only, no compression; the streams adapter brings what workers emit. */
const url = process.env.REDIS_URL;
const http = createServer();
const io = new Server(http, {
  transports: ['websocket'],
  perMessageDeflate: false,
  httpCompression: false,
  serveClient: false,
  adapter: createAdapter(new Redis(url, { enableAutoPipelining: true }), {
    onlyPlaintext: true,
    maxLen: 200_000, // the default of 10,000 is a seventh of a second of tokens at full speed: some would be lost
    readCount: 1_000,
  }),
  ...(process.env.RECOVERY ? { connectionStateRecovery: { maxDisconnectionDuration: 120_000 } } : {}),
});
const queue = new Queue('chat', {
  connection: new Redis(url, { enableAutoPipelining: true, maxRetriesPerRequest: null }),
});
const add = addJobs(queue);

io.on('connection', (socket) => {
  socket.on('chat', (request) => add({ ...request, room: socket.id }));
});
http.listen(0, '127.0.0.1', 4096, () => announce(http.address().port));
