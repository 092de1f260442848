import assert from 'node:assert/strict';
import { test } from 'node:test';
import { openChat } from '../helpers/chat-client.ts';
import { startRedisCluster } from '../helpers/redis-cluster.ts';
import { startStack } from '../helpers/stack.ts';

/** On Redis Cluster every step about people stays in one slot: the recipient's, the sender's, the group's or the node's. */
test('people on Redis Cluster: inbox, groups, presence, notices, devices, over two gateways', async (t) => {
  const cluster = await startRedisCluster();
  t.after(() => cluster.stop());
  const stack = await startStack(t, {
    redisUrl: cluster.url,
    gateways: 2,
    workers: 0,
    gatewayEnv: { API_KEYS: 'key', DEVICE_POLICY: 'newest', INBOX_MESSAGES: '20', QUOTA_PER_DAY: '1' },
  });
  const [n1, n2] = stack.gateways as [(typeof stack.gateways)[0], (typeof stack.gateways)[0]];
  const names = Array.from({ length: 12 }, (_, index) => `member-${index}`); // in many slots
  const clients = await Promise.all(names.map((name, index) => openChat((index % 2 ? n1 : n2).url, name)));
  t.after(() => clients.forEach((client) => void client.close()));
  for (const client of clients) {
    client.send({ type: 'join', group: 'g' });
    await client.next('joined');
  }
  const [first] = clients as [(typeof clients)[0]];
  first.send({ type: 'send', messageId: 'm1', to: { group: 'g' }, contents: 'to all' });
  assert.equal((await first.next('sent', 'm1')).online, 11);
  for (const client of clients.slice(1)) assert.equal((await client.next('message', 'm1')).group, 'g');
  first.send({ type: 'presence', userIds: names });
  assert.equal(Object.keys((await first.next('presence')).online).length, 12);

  const post = async (body: object) => {
    const answer = await fetch(`${n1.http}/v1/messages`, {
      method: 'POST',
      headers: { authorization: 'Bearer key' },
      body: JSON.stringify(body),
    });
    assert.equal(answer.status, 202);
    return (await answer.json()) as { online: number; offline: number };
  };
  for (let index = 0; index < 25; index++) await post({ to: { user: 'away' }, contents: `${index}` });
  await post({ to: { all: true }, contents: 'notice' });
  for (const client of clients) assert.equal((await client.next('notice')).contents, 'notice');
  const away = await openChat(n2.url, 'away', { device: 'phone' });
  assert.equal((await away.next('inbox')).dropped, true);
  const got: string[] = [];
  while (got.length < 20) got.push((await away.next('message')).contents);
  assert.deepEqual(
    got,
    Array.from({ length: 20 }, (_, index) => String(index + 5)),
  );
  const newer = await openChat(n1.url, 'away');
  t.after(() => newer.close());
  assert.equal((await away.closed).code, 4010);

  first.send({ type: 'chat', messageId: 'q1', contents: 'hi' });
  await first.next('accepted', 'q1');
  first.send({ type: 'chat', messageId: 'q2', contents: 'hi' });
  assert.equal((await first.next('rejected', 'q2')).code, 'quota_exhausted');
  first.send({ type: 'leave', group: 'g' });
  await first.next('left');
});
