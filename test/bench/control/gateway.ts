import uws, { type WebSocket } from 'uWebSockets.js';
import { Redis } from 'ioredis';
import { announce } from '../announce.ts';

/**
 * The control, gateway side: the thinnest pipe that the parts allow. Requests of one event-loop turn go in one XADD,
 * frames of one turn to one socket in one corked write. No record, no log, no acknowledgement, no limits.
 */
interface UserData {
  id: string;
  outbox: string[] | null;
}

const url = process.env.REDIS_URL!;
const node = process.env.NODE_ID!;
const redis = new Redis(url);
const tail = new Redis(url);
const sockets = new Map<string, WebSocket<UserData>>();
const app = uws.App();
const decoder = new TextDecoder();
let nextId = 0;

let requests: string[] = [];
let writing = false;
/** One append on its way at a time: what comes meanwhile shares the next one. */
function writeRequests() {
  if (writing || requests.length === 0) return;
  writing = true;
  const batch = requests;
  requests = [];
  const done = () => {
    writing = false;
    writeRequests();
  };
  redis.call('xadd', `c:req:${node}`, 'MAXLEN', '~', '100000', '*', ...batch).then(done, done);
}

app.ws<UserData>('/*', {
  maxBackpressure: 64 * 1024 * 1024,
  idleTimeout: 0,
  sendPingsAutomatically: false,
  compression: uws.DISABLED,
  upgrade(response, request, context) {
    response.upgrade(
      { id: String(nextId++), outbox: null },
      request.getHeader('sec-websocket-key'),
      request.getHeader('sec-websocket-protocol'),
      request.getHeader('sec-websocket-extensions'),
      context,
    );
  },
  open(socket) {
    sockets.set(socket.getUserData().id, socket);
  },
  message(socket, message) {
    const text = decoder.decode(message);
    if (text.startsWith('{"type":"init"')) {
      socket.send('{"type":"ready"}');
      return;
    }
    if (requests.length === 0 && !writing) setImmediate(writeRequests);
    requests.push(socket.getUserData().id, text);
  },
  close(socket) {
    sockets.delete(socket.getUserData().id);
  },
});

async function readReplies() {
  const key = `c:rep:${node}`;
  let cursor = '$';
  for (;;) {
    const reply = (await tail.call('xread', 'COUNT', 100, 'BLOCK', 0, 'STREAMS', key, cursor)) as
      | [string, [string, string[]][]][]
      | null;
    if (!reply) continue;
    const dirty: WebSocket<UserData>[] = [];
    for (const [id, fields] of reply[0]![1]) {
      cursor = id;
      for (let index = 0; index < fields.length; index += 2) {
        const socket = sockets.get(fields[index]!);
        if (!socket) continue;
        const data = socket.getUserData();
        if (data.outbox) data.outbox.push(fields[index + 1]!);
        else {
          data.outbox = [fields[index + 1]!];
          dirty.push(socket);
        }
      }
    }
    for (const socket of dirty) {
      const data = socket.getUserData();
      const outbox = data.outbox!;
      data.outbox = null;
      if (outbox.length === 1) socket.send(outbox[0]!);
      else
        socket.cork(() => {
          for (const text of outbox) socket.send(text);
        });
    }
  }
}

void readReplies();
app.listen('127.0.0.1', 0, uws.LIBUS_LISTEN_EXCLUSIVE_PORT, (socket) => {
  if (!socket) throw new Error('cannot listen');
  announce((uws.us_socket_local_port ?? uws.getSocketPort)!(socket));
});
