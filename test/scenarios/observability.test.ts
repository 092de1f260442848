import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { parse } from 'yaml';
import type { PipelineSnapshot } from '../../shared/pipeline.ts';
import { eventually } from '../helpers/eventually.ts';
import { startStack } from '../helpers/stack.ts';

/** Metrics that dashboards and alerts name exist in a live scrape; a trace reaches from the socket to the model. */

const read = (path: string) => readFileSync(new URL(`../../infra/${path}`, import.meta.url), 'utf8');

function namesIn(expression: string): string[] {
  return [...expression.matchAll(/\b(?:rivulet|nodejs|process)_[a-z0-9_]+/g)].map(([name]) => name);
}

/** An answer that is still open whenever somebody looks. */
const SLOW = {
  type: 'chat',
  messageId: 'slow',
  contents: 'x',
  parameters: { tokens: 900, intervalMs: 50, seed: 1 },
} as const;

test('every metric that a panel or an alert names is scraped from a running stack', async (t) => {
  const stack = await startStack(t, {
    gateways: 2,
    workers: 1,
    env: { RETRY_BASE_MS: '5' },
    workerEnv: { METRICS_PORT: '0' },
  });
  const client = await stack.client(20001);
  client.send({
    type: 'chat',
    messageId: 'a',
    contents: 'x',
    parameters: { tokens: 5, intervalMs: 1, seed: 1 },
  });
  await client.answer('a');
  client.send({
    type: 'chat',
    messageId: 'b',
    contents: 'x',
    parameters: { tokens: 2, intervalMs: 1, failAttempts: 99 },
  });
  await client.answer('b');
  client.send({ type: 'chat', messageId: 'c', contents: '' });
  await client.next('rejected', 'c');
  client.send(SLOW);
  await client.next('token', 'slow');

  const port = (await stack.workers[0]!.logged((line) => line.msg === 'metrics')).port;
  const worker = `http://127.0.0.1:${port}`;
  const [one, two, three] = (await Promise.all(
    [`${stack.gateways[0]!.http}/metrics`, `${stack.gateways[1]!.http}/metrics`, `${worker}/metrics`].map(
      async (url) => (await fetch(url)).text(),
    ),
  )) as [string, string, string];
  const all = `${one}\n${two}\n${three}`;
  assert.match(one, /rivulet_admitted_total 3/);
  assert.match(one, /rivulet_first_token_seconds_count [23]/); // the failing one may show a token, or not
  assert.match(one, /rivulet_answer_seconds_count 2/);
  assert.match(three, /rivulet_attempts_total\{outcome="done"\} 1/);
  assert.match(three, /rivulet_attempts_total\{outcome="retry"\} 4/);
  assert.match(three, /rivulet_dead_letters_total 1/);
  assert.match(three, /rivulet_worker_running 1/);
  assert.ok(Number(/rivulet_tokens_total (\d+)/.exec(three)![1]) > 5);
  // One gateway tells the queues of all.
  const queue = (text: string): string[] => text.match(/^rivulet_queue_requests\{.*$/gm) ?? [];
  assert.equal(queue(one).length, 8, 'two nodes in four states');
  assert.equal(queue(two).length, 0);
  assert.ok(queue(one).includes('rivulet_queue_requests{node="n1",state="running"} 1'));
  assert.ok(queue(one).includes('rivulet_queue_requests{node="n1",state="dead"} 1'));

  assert.match(one, /^rivulet_workers 1$/m);
  assert.doesNotMatch(two, /^rivulet_workers /m);

  assert.equal((await fetch(`${worker}/healthz`)).status, 200);
  assert.equal((await fetch(`${worker}/readyz`)).status, 200);
  assert.equal((await fetch(`${worker}/else`)).status, 404);

  const series = new Set([...all.matchAll(/^([a-z_0-9]+)(?:\{| )/gm)].map((match) => match[1]!));
  const declared = new Set([...all.matchAll(/^# TYPE (\S+)/gm)].map((match) => match[1]!));
  const dashboard = JSON.parse(read('grafana/rivulet.json')) as {
    panels: { title: string; targets: { expr: string }[] }[];
  };
  const rules = parse(read('alerts.yml')) as {
    groups: { rules: { alert: string; expr: string; annotations: { summary: string } }[] }[];
  };
  const expressions = [
    ...dashboard.panels.flatMap(({ title, targets }) => targets.map(({ expr }) => ({ where: title, expr }))),
    ...rules.groups.flatMap((group) => group.rules.map(({ alert, expr }) => ({ where: alert, expr }))),
  ];
  assert.ok(expressions.length > 40);
  for (const { where, expr } of expressions)
    for (const name of namesIn(expr))
      assert.ok(series.has(name) || declared.has(name), `${where} names ${name}`);
  // And the other way round: what we count is shown somewhere.
  const shown = new Set(expressions.flatMap(({ expr }) => namesIn(expr)));
  for (const name of declared)
    if (name.startsWith('rivulet_'))
      assert.ok(
        [name, `${name}_bucket`].some((form) => shown.has(form)) || UNSHOWN.has(name),
        `no panel shows ${name}`,
      );
  const runbook = read('RUNBOOK.md');
  for (const { alert, annotations } of rules.groups.flatMap((group) => group.rules)) {
    const [, section] = /See "([^"]+)"/.exec(annotations.summary) ?? [];
    assert.ok(
      section && new RegExp(`^## ${section}`, 'm').test(runbook),
      `${alert}: the runbook has no "${section}"`,
    );
  }
});

test('all workers dead with requests in their hands: what is open counts on, and no worker does', async (t) => {
  const stack = await startStack(t, { workers: 1 });
  const client = await stack.client(20001);
  client.send(SLOW);
  await client.next('token', 'slow');
  await stack.workers[0]!.kill('SIGKILL');
  const scrape = async () => (await fetch(`${stack.gateways[0]!.http}/metrics`)).text();
  await eventually('no live worker', async () => /^rivulet_workers 0$/m.test(await scrape()));
  // What NobodyWorks once took for work.
  assert.match(await scrape(), /^rivulet_queue_requests\{node="n1",state="running"\} 1$/m);
});

/** For people who look closer. */
const UNSHOWN = new Set(['rivulet_attempt_seconds', 'rivulet_logs_compared_total']);

interface OtlpSpan {
  name: string;
  traceId: string;
  spanId: string;
  parentSpanId?: string;
  attributes: { key: string; value: { stringValue?: string } }[];
  events: { name: string }[];
}

test('one trace from the socket to the model; contents are not in it', async (t) => {
  const spans: OtlpSpan[] = [];
  let bodies = '';
  const collector = createServer((request, response) => {
    let body = '';
    request.on('data', (chunk) => {
      body += chunk;
    });
    request.on('end', () => {
      bodies += body;
      const sent = JSON.parse(body) as { resourceSpans: { scopeSpans: { spans: OtlpSpan[] }[] }[] };
      for (const resource of sent.resourceSpans)
        for (const scope of resource.scopeSpans) spans.push(...scope.spans);
      response.end('{}');
    });
  });
  await new Promise<void>((resolve) => collector.listen(0, '127.0.0.1', resolve));
  t.after(() => collector.close());
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-traces-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const handler = join(dir, 'handler.mjs');
  writeFileSync(
    handler,
    `export default async function* (request, { trace, attempt }) {
      if (request.contents === 'fails at first' && attempt === 1) throw new Error('not yet');
      yield String(trace);
    }\n`,
  );

  const stack = await startStack(t, {
    env: { OTEL_EXPORTER_OTLP_ENDPOINT: `http://127.0.0.1:${(collector.address() as AddressInfo).port}` },
    workerEnv: { HANDLER: handler, RETRY_BASE_MS: '50' },
  });
  const client = await stack.client(20001);
  client.send({ type: 'chat', messageId: 'm1', contents: 'a secret' });
  const { text } = await client.answer('m1');
  const [, traceId, spanId] = /^00-([0-9a-f]{32})-([0-9a-f]{16})-01$/.exec(text)!;
  const find = (name: string) => spans.find((span) => span.name === name);
  await eventually('both spans', () => find('chat') && find('generate'));
  const chat = find('chat')!;
  const generate = find('generate')!;
  assert.equal(chat.traceId, traceId);
  assert.equal(generate.traceId, traceId);
  assert.equal(generate.spanId, spanId);
  assert.equal(generate.parentSpanId, chat.spanId);
  assert.ok(chat.events.some(({ name }) => name === 'first token'));
  assert.ok(
    generate.attributes.some(({ key, value }) => key === 'rivulet.outcome' && value.stringValue === 'done'),
  );
  client.send({ type: 'chat', messageId: 'm2', contents: 'fails at first' });
  await client.answer('m2');
  const spansOf = (messageId: string, wanted: string) =>
    spans.filter(
      ({ name, attributes }) =>
        name === wanted && attributes.some(({ value }) => value.stringValue === messageId),
    );
  await eventually(
    'the spans of the question and of each attempt',
    () => spansOf('m2', 'chat').length === 1 && spansOf('m2', 'generate').length === 2,
  );
  const [asked] = spansOf('m2', 'chat');
  for (const { parentSpanId } of spansOf('m2', 'generate')) assert.equal(parentSpanId, asked!.spanId);

  const body = {
    id: 'c1',
    messages: [{ id: 'u1', role: 'user', parts: [{ type: 'text', text: 'a secret' }] }],
  };
  const { http } = stack.gateways[0]!;
  const answer = await fetch(`${http}/api/chat?userId=20002`, { method: 'POST', body: JSON.stringify(body) });
  const [, itsTrace] = /00-([0-9a-f]{32})-[0-9a-f]{16}-01/.exec(await answer.text())!;
  await eventually('the span of the AI SDK’s question', () =>
    spans.some(({ name, traceId }) => name === 'chat' && traceId === itsTrace),
  );
  assert.match(await (await fetch(`${http}/metrics`)).text(), /rivulet_first_token_seconds_count 3/);
  assert.doesNotMatch(bodies, /secret/);
});

test('leases are measured with the clock of Redis, whatever that of a gateway says', async (t) => {
  const ahead = `const { now } = Date; Date.now = () => now() + 3_600_000;`;
  const stack = await startStack(t, {
    workers: 0,
    gatewayEnv: { NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(ahead)}` },
  });
  const { http } = stack.gateways[0]!;
  const { time, nodes } = (await (await fetch(`${http}/pipeline`)).json()) as PipelineSnapshot;
  assert.ok(Math.abs(time - Date.now()) < 60_000);
  assert.deepEqual(
    nodes.map(({ node, alive }) => ({ node, alive })),
    [{ node: 'n1', alive: true }],
  );
  assert.match(await (await fetch(`${http}/metrics`)).text(), /^rivulet_queue_requests\{node="n1"/m);
});

test('traces that are off load nothing', async () => {
  assert.doesNotMatch(readFileSync(new URL('../../shared/tracing.ts', import.meta.url), 'utf8'), /^import /m);
});
