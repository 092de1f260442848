import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createDelivery, type Follower } from '../../gateway/delivery.ts';

test('an answer has a bounded number of followers on a node; who leaves makes room', () => {
  const parts = { node: 'n1', counters: { healed() {}, slow() {}, doubled() {} } };
  const delivery = createDelivery(parts as unknown as Parameters<typeof createDelivery>[0]);
  const follower = (): Follower => ({ sendText() {}, onEnded() {}, slow: false, open: true });
  const first = follower();
  const followed = delivery.hold(first, '20001', 'm1');
  for (let count = 1; count < 256; count++) delivery.hold(follower(), '20001', 'm1');
  assert.throws(() => delivery.hold(follower(), '20001', 'm1'), { code: 'too_many_active' });
  delivery.hold(follower(), '20001', 'm2');
  delivery.hold(first, '20001', 'm1'); // anew: it has its place
  delivery.drop(followed);
  assert.throws(() => delivery.hold(follower(), '20001', 'm1'), { code: 'too_many_active' });
  delivery.drop(delivery.hold(first, '20001', 'm1'));
  delivery.hold(follower(), '20001', 'm1');
});
