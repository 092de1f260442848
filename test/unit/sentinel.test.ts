import assert from 'node:assert/strict';
import { test } from 'node:test';
import { judge, readView } from '../../shared/sentinel.ts';

const facts = (flags: string, epoch: number) => [
  ...['name', 'chat', 'ip', '10.0.0.1', 'port', '6379', 'flags', flags, 'config-epoch', String(epoch)],
];
const view = (host: string, address: string[], flags = 'master', epoch = 0) =>
  readView({ host, port: 26379 }, address, facts(flags, epoch));
const OLD = ['10.0.0.1', '6379'];
const NEW = ['10.0.0.2', '6379'];

test('what a sentinel says of the master', () => {
  assert.deepEqual(view('a', OLD, 'master', 3), {
    sentinel: { host: 'a', port: 26379 },
    epoch: 3,
    settled: true,
  });
  assert.equal(view('a', OLD, 'master,s_down').settled, true, 'one opinion is none');
  assert.equal(view('a', OLD, 'master,s_down,o_down').settled, false);
  assert.equal(view('a', OLD, 'master,failover_in_progress').settled, false);
  assert.equal(view('a', NEW, 'master,o_down,failover_in_progress').settled, true, 'promoted already');
});

test('the sentinel with the latest failover is believed, a failover under way waited for', () => {
  const names = (...views: ReturnType<typeof view>[]) => {
    const { latest, settled } = judge(views, 0);
    return [latest.map(({ sentinel }) => sentinel.host).join(), settled];
  };
  assert.deepEqual(names(view('a', OLD), view('b', OLD)), ['a,b', true]);
  assert.deepEqual(names(view('a', OLD), view('b', NEW, 'master,failover_in_progress', 1)), ['b', true]);
  assert.deepEqual(names(view('a', OLD), view('b', OLD, 'master,o_down')), ['a,b', false]);
  assert.deepEqual(names(view('a', OLD, 'master,o_down'), view('b', NEW, 'master', 1)), ['b', true]);
  assert.deepEqual(judge([], 0), { latest: [], settled: true });
  assert.equal(judge([view('a', OLD)], 1).settled, false, 'a later failover was heard of before');
});
