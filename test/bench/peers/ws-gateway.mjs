import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import { WebSocketServer } from 'ws';
import { announce } from '../announce.ts';
import { addJobs } from './add-jobs.mjs';
import { createLockedList } from './locked-list.mjs';

/**
 * `ws` in front, one pub/sub channel for this node. A published message is a frame or, batched, a list of
 * (socket, frame) pairs whose frames leave in one corked write a socket.
 */
const url = process.env.REDIS_URL;
const node = process.env.NODE_ID;
const connect = () => new Redis(url, { enableAutoPipelining: true, maxRetriesPerRequest: null });
const add =
  process.env.QUEUE === 'list'
    ? createLockedList(connect())
    : addJobs(new Queue('chat', { connection: connect() }));
const sockets = new Map();
let nextId = 0;

const server = new WebSocketServer(
  {
    host: '127.0.0.1',
    port: 0,
    perMessageDeflate: false,
    clientTracking: false,
    skipUTF8Validation: true,
    backlog: 4096,
  },
  () => announce(server.address().port),
);
server.on('connection', (socket) => {
  const id = String(nextId++);
  sockets.set(id, socket);
  socket.on('message', (data) => {
    const request = JSON.parse(data);
    if (request.type === 'init') socket.send('{"type":"ready"}');
    else add({ ...request, node, socket: id });
  });
  socket.on('close', () => sockets.delete(id));
  socket.on('error', () => {});
});

const subscriber = new Redis(url);
await subscriber.subscribe(`reply:${node}`);
subscriber.on('message', (_channel, message) => {
  if (message[0] !== '[') {
    const at = message.indexOf(' ');
    sockets.get(message.slice(0, at))?.send(message.slice(at + 1));
    return;
  }
  const corked = new Set();
  const pairs = JSON.parse(message);
  for (let index = 0; index < pairs.length; index += 2) {
    const socket = sockets.get(pairs[index]);
    if (!socket) continue;
    if (!corked.has(socket)) {
      socket._socket.cork();
      corked.add(socket);
    }
    socket.send(pairs[index + 1]);
  }
  for (const socket of corked) socket._socket.uncork();
});
