import { Redis } from 'ioredis';
import { announce } from '../announce.ts';
import { mergeTokens } from '../merge-tokens.ts';
import { generate } from '../model.ts';

/** The control, worker side: reads requests without a group, runs them all, one XADD a flush for a whole node. */
const url = process.env.REDIS_URL!;
const nodes = process.env.NODES!.split(',');
const merge = process.env.MERGE !== 'none';
const redis = new Redis(url);
const reader = new Redis(url);

interface Outbox {
  fields: string[];
  writing: boolean;
  waiters: (() => void)[];
}
const outboxes = new Map<string, Outbox>(
  nodes.map((node) => [node, { fields: [], writing: false, waiters: [] }]),
);

const ENTRIES_KEPT = 10_000;

function publish(node: string, socket: string, frame: string): Promise<void> {
  const outbox = outboxes.get(node)!;
  if (outbox.fields.length === 0 && !outbox.writing) setImmediate(flush, node, outbox);
  outbox.fields.push(socket, frame);
  return new Promise((resolve) => outbox.waiters.push(resolve));
}

function flush(node: string, outbox: Outbox): void {
  if (outbox.writing || outbox.fields.length === 0) return;
  const { fields, waiters } = outbox;
  outbox.writing = true;
  outbox.fields = [];
  outbox.waiters = [];
  const done = () => {
    outbox.writing = false;
    for (const resolve of waiters) resolve();
    flush(node, outbox);
  };
  redis.call('xadd', `c:rep:${node}`, 'MAXLEN', '~', ENTRIES_KEPT, '*', ...fields).then(done, done);
}

async function answer(node: string, socket: string, text: string): Promise<void> {
  const request = JSON.parse(text);
  const head = `{"type":"token","messageId":"${request.messageId}","text":`;
  const merger = mergeTokens(merge, (part) => publish(node, socket, `${head}${JSON.stringify(part)}}`));
  await generate({ ...request, userId: socket }, merger.push);
  await merger.flushed();
  void publish(node, socket, `{"type":"done","messageId":"${request.messageId}"}`);
}

async function read() {
  const cursors = nodes.map(() => '0');
  const keys = nodes.map((node) => `c:req:${node}`);
  for (;;) {
    const reply = (await reader.call('xread', 'COUNT', 100, 'BLOCK', 0, 'STREAMS', ...keys, ...cursors)) as
      | [string, [string, string[]][]][]
      | null;
    for (const [key, entries] of reply ?? []) {
      const index = keys.indexOf(key);
      for (const [id, fields] of entries) {
        cursors[index] = id;
        for (let field = 0; field < fields.length; field += 2)
          void answer(nodes[index]!, fields[field]!, fields[field + 1]!);
      }
    }
  }
}

void read();
announce(0);
