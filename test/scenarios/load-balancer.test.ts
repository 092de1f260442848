import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, type TestContext, test } from 'node:test';
import { WebSocket } from 'ws';
import { type Answer, type Client, createClient } from '../../shared/client.ts';
import { type Certificate, makeCertificate } from '../helpers/certificate.ts';
import { eventually } from '../helpers/eventually.ts';
import { freePort } from '../helpers/free-port.ts';
import {
  INFRA,
  type LoadBalancer,
  startHaproxy,
  startNginx,
  untilItServes,
} from '../helpers/load-balancer.ts';
import { type GatewayProcess, type Stack, startStack } from '../helpers/stack.ts';

/** The shipped HAProxy and nginx configurations in front of three gateways, with the real programs. */

const USERS = 900;
const STREAMING = 24;
const SPREAD = 0.15;
const MOST_MOVED = 0.4;

let stack: Stack;
let certificate: Certificate;
const dir = mkdtempSync(join(tmpdir(), 'rivulet-balancer-'));

before(async () => {
  certificate = makeCertificate(dir);
  stack = await startStack(null, { gateways: 0, workers: 1, workerEnv: { WORKER_CONCURRENCY: '64' } });
  // A revived gateway needs its port again.
  for (const node of ['n1', 'n2', 'n3']) await stack.addGateway({ node, port: await freePort() });
});
after(async () => {
  await stack.stop();
  rmSync(dir, { recursive: true, force: true });
});

/** Bound sockets by user id, held open. */
interface Held {
  user: number;
  node: string;
  socket: WebSocket;
}

async function bind(url: string, user: number): Promise<Held> {
  const socket = new WebSocket(`${url}?userId=${user}`);
  await new Promise((resolve, reject) => {
    socket.on('open', resolve);
    socket.on('error', reject);
  });
  socket.send(JSON.stringify({ type: 'init', userId: user }));
  const node = await new Promise<string>((resolve) =>
    socket.once('message', (data) => resolve((JSON.parse(data.toString()) as { node: string }).node)),
  );
  return { user, node, socket };
}

async function bindAll(url: string, users: number[]): Promise<Map<number, Held>> {
  const held = new Map<number, Held>();
  for (let from = 0; from < users.length; from += 50)
    for (const one of await Promise.all(users.slice(from, from + 50).map((user) => bind(url, user))))
      held.set(one.user, one);
  return held;
}

function closeAll(held: Iterable<Held>): void {
  for (const { socket } of held) socket.terminate();
}

const count = (held: Iterable<Held>, node: string) => [...held].filter((one) => one.node === node).length;

async function check(t: TestContext, balancer: LoadBalancer, firstUser: number): Promise<void> {
  const users = Array.from({ length: USERS }, (_, index) => firstUser + index);
  await untilItServes(balancer);

  // Spread, and the same user lands on the same node.
  const held = await bindAll(balancer.url, users);
  for (const { node } of stack.gateways) {
    const share = (count(held.values(), node) * 3) / USERS;
    assert.ok(
      Math.abs(share - 1) <= SPREAD,
      `${balancer.name}: ${node} has ${share.toFixed(2)} of its share`,
    );
  }
  const spread = stack.gateways.map(({ node }) => `${node} ${count(held.values(), node)}`).join(', ');
  t.diagnostic(`${balancer.name} spreads ${USERS} users: ${spread}`);
  const again = await bindAll(balancer.url, users.slice(0, 100));
  for (const [user, { node }] of again) assert.equal(node, held.get(user)!.node);
  closeAll(again.values());

  // Clients in the middle of an answer, on all three gateways.
  const clients: Client[] = [];
  const answers: Answer[] = [];
  for (const user of users.slice(0, STREAMING)) {
    const client = createClient({
      url: balancer.url,
      userId: user,
      reconnectBaseMs: 50,
      reconnectMaxMs: 1_000,
    });
    clients.push(client);
    await client.connect();
    answers.push(
      client.chat('tell me', { messageId: 'm1', parameters: { tokens: 200, intervalMs: 20, seed: user } }),
    );
  }
  const nodeOf = (client: Client) => client.session?.node;
  const before = clients.map(nodeOf);
  await eventually('streaming everywhere', () => answers.every((answer) => answer.text.length > 20));

  // One of three is taken away: only its users move, and every answer goes on where it was.
  const victim = stack.gateways[2]!;
  const gone = new Set<number>();
  for (const one of held.values()) one.socket.on('close', () => gone.add(one.user));
  await victim.kill('SIGKILL');
  const results = await Promise.all(answers.map(({ done }) => done));
  for (const [index, result] of results.entries()) {
    const user = users[index]!;
    assert.equal(result.attempt, 1, 'no answer began anew');
    assert.equal(result.text, answers[index]!.text);
    assert.equal(result.text.split(' ').length, 200, `user ${user} lost or doubled words`);
    if (before[index] === victim.node) assert.notEqual(nodeOf(clients[index]!), victim.node);
    else assert.equal(nodeOf(clients[index]!), before[index]);
  }
  await Promise.all(clients.map((client) => client.close()));
  const lost = [...held.values()].filter(({ node }) => node === victim.node);
  assert.ok(lost.length > 0 && lost.length <= MOST_MOVED * USERS, `${lost.length} of ${USERS} moved`);
  assert.equal(gone.size, lost.length, 'the users of the others kept their sockets');
  const moved = await bindAll(balancer.url, users);
  for (const [user, { node }] of moved)
    if (held.get(user)!.node !== victim.node) assert.equal(node, held.get(user)!.node, `user ${user} moved`);
  closeAll(held.values());
  closeAll(moved.values());

  // It comes back: so do its users.
  stack.gateways.splice(2, 1);
  const revived = await stack.addGateway({ node: victim.node, port: victim.port });
  await eventually('its users back', async () => {
    const one = await bind(balancer.url, lost[0]!.user);
    one.socket.terminate();
    return one.node === revived.node;
  });
  const back = await bindAll(
    balancer.url,
    lost.slice(0, 50).map(({ user }) => user),
  );
  for (const { node } of back.values()) assert.equal(node, revived.node);
  closeAll(back.values());
}

/** A gateway that drains: nobody meets an error, everybody is moved. */
async function checkDrain(balancer: LoadBalancer, user: number, leaving: GatewayProcess): Promise<void> {
  const client = createClient({ url: balancer.url, userId: user, reconnectBaseMs: 20 });
  await client.connect();
  assert.equal(client.session?.node, leaving.node);
  const answer = client.chat('go on', { parameters: { tokens: 100, intervalMs: 20, seed: 1 } });
  await eventually('some text', () => answer.text.length > 20);
  leaving.child.kill('SIGTERM');
  const result = await answer.done;
  assert.equal(result.text.split(' ').length, 100);
  assert.notEqual(client.session?.node, leaving.node);
  await client.close();
  assert.equal(await leaving.exited, 0);
}

test('HAProxy', { timeout: 90_000 }, async (t) => {
  const balancer = await startHaproxy(stack.gateways, certificate);
  t.after(() => balancer.stop());
  await check(t, balancer, 40_000);
  await checkTls(balancer);
  assert.equal((await fetch(`${balancer.http}/metrics`)).status, 404, 'metrics stay inside');
  assert.match(await (await fetch(`${balancer.stats}/metrics`)).text(), /haproxy_server_status/);
});

test('HAProxy: a gateway stays whose name no DNS server knows', { timeout: 30_000 }, async (t) => {
  // What took such a gateway out of service after 30 s would do so after one.
  const config = join(dir, 'haproxy.cfg');
  const shipped = readFileSync(`${INFRA}haproxy.cfg`, 'utf8');
  writeFileSync(config, shipped.replace('parse-resolv-conf\n', 'parse-resolv-conf\n    hold nx 1s\n'));
  const [{ port } = { port: 0 }] = stack.gateways;
  const balancer = await startHaproxy([{ host: 'localhost', port }], certificate, config);
  t.after(() => balancer.stop());
  await untilItServes(balancer);
  for (const until = Date.now() + 4_000; Date.now() < until; await new Promise((go) => setTimeout(go, 200)))
    assert.equal((await fetch(`${balancer.http}/readyz`)).status, 200, balancer.output());
});

test('nginx', { timeout: 90_000 }, async (t) => {
  const balancer = await startNginx(stack.gateways, certificate, dir);
  t.after(() => balancer.stop());
  await check(t, balancer, 50_000);
  await checkTls(balancer);
  assert.equal((await fetch(`${balancer.http}/metrics`)).status, 404);
});

test('a draining gateway is left without an error, behind either', { timeout: 60_000 }, async (t) => {
  for (const start of [startHaproxy, startNginx]) {
    const balancer = await start(stack.gateways, certificate, dir);
    t.after(() => balancer.stop());
    await untilItServes(balancer);
    const first = await bind(balancer.url, 60_001);
    first.socket.terminate();
    const index = stack.gateways.findIndex(({ node }) => node === first.node);
    const [leaving] = stack.gateways.splice(index, 1);
    await checkDrain(balancer, 60_001, leaving!);
    const { node, port } = leaving!;
    const back = await stack.addGateway({ node, port });
    stack.gateways.splice(stack.gateways.indexOf(back), 1);
    stack.gateways.splice(index, 0, back); // the balancers name them by place
  }
});

async function checkTls(balancer: LoadBalancer): Promise<void> {
  const ca = readFileSync(certificate.cert);
  const socket = new WebSocket(`${balancer.tlsUrl}?userId=20001`, { ca });
  await new Promise((resolve, reject) => {
    socket.on('open', resolve);
    socket.on('error', reject);
  });
  socket.send('PING');
  const [data] = await new Promise<[Buffer]>((resolve) =>
    socket.once('message', (...args) => resolve(args as never)),
  );
  assert.match(data.toString(), /heartbeat/);
  socket.terminate();
}
