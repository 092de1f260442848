import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { type TestContext, test } from 'node:test';
import { AgreedMaster, judge, readView } from '../../shared/sentinel.ts';

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

async function listen(t: TestContext, onConnect: Parameters<typeof createServer>[1]): Promise<number> {
  const server = createServer(onConnect).listen(0, '127.0.0.1');
  t.after(() => server.close());
  await once(server, 'listening');
  return (server.address() as AddressInfo).port;
}

test('the sentinel with the latest failover dies before it is asked again: all are asked the next time', async (t) => {
  const master = await listen(t, (socket) => socket.on('error', () => {}).resume());
  const list = (...items: string[]) =>
    `*${items.length}\r\n${items.map((item) => `$${item.length}\r\n${item}\r\n`).join('')}`;
  const startSentinel = (state: { epoch: number; answers: number }) => {
    const answer = (command: string) => {
      if (command.includes('get-master-addr')) return list('127.0.0.1', `${master}`);
      if (!command.includes('sentinel')) return '+OK\r\n';
      const address = ['ip', '127.0.0.1', 'port', `${master}`];
      return list(...address, 'flags', 'master', 'config-epoch', `${state.epoch}`);
    };
    return listen(t, (socket) => {
      socket.on('error', () => {});
      if (state.answers-- <= 0) socket.destroy();
      else
        socket.on('data', (asked) => {
          for (const command of String(asked)
            .split(/\*\d+\r\n/)
            .slice(1))
            socket.write(answer(command));
        });
    });
  };
  const others = { epoch: 4, answers: 100 };
  const sentinels = [
    { host: '127.0.0.1', port: await startSentinel({ epoch: 5, answers: 1 }) },
    { host: '127.0.0.1', port: await startSentinel(others) },
    { host: '127.0.0.1', port: await startSentinel(others) },
  ];
  const connector = new AgreedMaster({ sentinels, name: 'chat', updateSentinels: false } as never);
  await assert.rejects(
    connector.connect(() => {}),
    /All sentinels are unreachable/,
  );
  others.epoch = 5; // they have heard of the failover now
  const stream = await connector.connect(() => {});
  t.after(() => stream.destroy());
  await once(stream, 'connect');
});
