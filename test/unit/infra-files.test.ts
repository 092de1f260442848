import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { builtinModules } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { ScaledObject, TriggerAuthentication } from '@kubernetes-models/keda/keda.sh/v1alpha1';
import { Deployment, StatefulSet } from 'kubernetes-models/apps/v1';
import { PodDisruptionBudget } from 'kubernetes-models/policy/v1';
import { Service } from 'kubernetes-models/v1';
import { parse, parseAllDocuments } from 'yaml';
import { gatewaySettings, readGatewayConfig } from '../../gateway/config.ts';
import { autoscalerSettings } from '../../infra/autoscaling.ts';
import { startRedisServer } from '../../infra/redis-server.ts';
import { readWorkerConfig, workerSettings } from '../../worker/config.ts';
import { spawnProcess } from '../helpers/stack.ts';

/** Files for machines that are not here: checked against schemas, and every command in them run as they run it. */

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const read = (path: string) => readFileSync(join(ROOT, path), 'utf8');

interface Manifest {
  kind: string;
  metadata: { name: string };
  // biome-ignore lint/suspicious/noExplicitAny: the schema is what is being checked
  spec: any;
}

const manifests = readdirSync(join(ROOT, 'infra/k8s'))
  .flatMap((file) => parseAllDocuments(read(`infra/k8s/${file}`)))
  .map((document) => {
    assert.deepEqual(document.errors, []);
    return document.toJS({ merge: true }) as Manifest;
  });
const manifest = (kind: string, name: string) =>
  manifests.find((one) => one.kind === kind && one.metadata.name === name)!;

test('Kubernetes manifests fit the published schemas', () => {
  const models = {
    StatefulSet,
    Deployment,
    Service,
    PodDisruptionBudget,
    ScaledObject,
    TriggerAuthentication,
  };
  for (const one of manifests) {
    const Model = models[one.kind as keyof typeof models] as unknown as new (
      data: Manifest,
    ) => { validate(): void };
    assert.ok(Model, one.kind);
    assert.doesNotThrow(() => new Model(one).validate(), `${one.kind} ${one.metadata.name}`);
  }
  const broken = { ...manifest('Deployment', 'worker'), spec: { template: {} } };
  assert.throws(() => new Deployment(broken as never).validate(), /selector/, 'the schemas do check');
});

const environment = (container: { env: { name: string; value?: string }[] }) =>
  Object.fromEntries(container.env.map(({ name, value }) => [name, value ?? SECRETS[name] ?? '']));
const SECRETS: Record<string, string> = {
  REDIS_URL: 'redis://redis:6379',
  JWT_SECRET: 'a'.repeat(32),
};

test('Kubernetes: ids, probes, drains and scaling fit what the processes do', () => {
  const gateway = manifest('StatefulSet', 'gateway').spec.template.spec;
  const [gatewayContainer] = gateway.containers;
  const nodeId = gatewayContainer.env.find(({ name }: { name: string }) => name === 'NODE_ID');
  assert.equal(nodeId.valueFrom.fieldRef.fieldPath, 'metadata.name');
  const gatewayEnv = readGatewayConfig({ ...environment(gatewayContainer), NODE_ID: 'gateway-0' });
  assert.equal(gatewayEnv.AUTH, 'jwt');
  assert.equal(gatewayContainer.livenessProbe.httpGet.path, '/healthz');
  assert.equal(gatewayContainer.readinessProbe.httpGet.path, '/readyz');
  const [, preStopSeconds] = gatewayContainer.lifecycle.preStop.exec.command;
  assert.ok(
    gateway.terminationGracePeriodSeconds * 1000 > Number(preStopSeconds) * 1000 + gatewayEnv.DRAIN_MS,
  );

  const worker = manifest('Deployment', 'worker').spec.template.spec;
  const [workerContainer] = worker.containers;
  const workerEnv = readWorkerConfig(environment(workerContainer));
  assert.ok(workerEnv.DRAIN_MS > workerEnv.GENERATION_TIMEOUT_MS, 'a drain outlasts the longest generation');
  assert.ok(worker.terminationGracePeriodSeconds * 1000 > workerEnv.DRAIN_MS);
  assert.equal(workerContainer.ports[0].containerPort, workerEnv.METRICS_PORT);
  assert.equal(manifest('Deployment', 'worker').spec.replicas, undefined);

  for (const { spec } of [gateway, worker].map((pod) => ({ spec: pod }))) {
    assert.equal(spec.securityContext.runAsNonRoot, true);
    for (const container of spec.containers) {
      assert.equal(container.securityContext.readOnlyRootFilesystem, true);
      assert.ok(container.resources.requests && container.resources.limits.memory);
    }
  }
  for (const name of ['gateway', 'worker']) {
    const budget = manifest('PodDisruptionBudget', name).spec;
    assert.deepEqual(budget.selector.matchLabels, { app: 'rivulet', part: name });
  }

  const scaled = manifest('ScaledObject', 'worker').spec;
  assert.equal(scaled.minReplicaCount, 0);
  const streams = scaled.triggers.filter(({ type }: { type: string }) => type === 'redis-streams');
  const replicas = manifest('StatefulSet', 'gateway').spec.replicas;
  assert.deepEqual(
    streams.map(({ metadata }: { metadata: { stream: string } }) => metadata.stream),
    Array.from({ length: replicas }, (_, index) => `chat:req:{gateway-${index}}`),
  );
  for (const { metadata } of streams) {
    assert.equal('lagCount' in metadata || 'consumerGroup' in metadata, false, 'the length, never the lag');
    assert.ok(Number(metadata.streamLength) <= workerEnv.WORKER_CONCURRENCY);
  }
});

// ---------------------------------------------------------------------------------------- image and compose

const instructions = read('infra/Dockerfile')
  .replaceAll(/\\\n\s*/g, '')
  .split('\n')
  .filter((line) => line && !line.startsWith('#'))
  .map((line) => /^(\w+) (.*)$/.exec(line)!.slice(1) as [string, string]);
const values = (name: string) => instructions.filter(([key]) => key === name).map(([, value]) => value);

test('the Dockerfile: stages, a fixed base on glibc, no root, exec forms, one process', () => {
  assert.equal(values('FROM').length, 2);
  for (const base of values('FROM')) {
    assert.match(base, /^node:20\.\d+-bookworm-slim/, 'pinned, Node 20, not musl');
    assert.doesNotMatch(base, /latest|alpine/);
  }
  const user = instructions.findLastIndex(([name]) => name === 'USER');
  assert.equal(instructions[user]![1], 'node');
  assert.ok(instructions.slice(user).every(([name]) => name !== 'COPY' && name !== 'RUN'));
  for (const name of ['ENTRYPOINT', 'CMD']) assert.doesNotThrow(() => JSON.parse(values(name).at(-1)!));
  assert.match(values('HEALTHCHECK')[0]!, /--interval=\S+ --timeout=\S+ .*CMD \[/);
  assert.ok(values('RUN').every((line) => !/sudo|curl .*\| *sh|npm install(?! )|apt-get/.test(line)));
  assert.ok(values('ADD').length === 0);
  const order = instructions.map(([, value]) => value);
  assert.ok(
    order.findIndex((value) => value.startsWith('package.json')) <
      order.findIndex((value) => value.includes('npm ci')),
    'dependencies are a layer of their own',
  );
});

test('what the image runs, run as it runs it, from only the files that it holds', {
  timeout: 60_000,
}, async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-image-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const finalStage = instructions.slice(instructions.findLastIndex(([name]) => name === 'FROM'));
  for (const [name, value] of finalStage) {
    if (name !== 'COPY' || value.startsWith('--from')) continue;
    const parts = value.split(/\s+/);
    const to = parts.pop()!;
    for (const from of parts)
      cpSync(join(ROOT, from), to.endsWith('/') ? join(dir, to, from.split('/').at(-1)!) : join(dir, to), {
        recursive: true,
      });
  }
  symlinkSync(join(ROOT, 'node_modules'), join(dir, 'node_modules'));
  const redis = await startRedisServer({ dir: join(dir, 'redis') });
  t.after(() => redis.stop());
  const entrypoint = JSON.parse(values('ENTRYPOINT')[0]!) as string[];
  const imageEnv = Object.fromEntries(
    values('ENV').flatMap((line) => line.split(' ').map((pair) => pair.split('=') as [string, string])),
  );
  const run = (args: string[], env: Record<string, string>) => {
    const [program, ...rest] = [...entrypoint, ...args];
    const child = spawn(program === 'node' ? process.execPath : program!, rest, {
      cwd: dir,
      env: { PATH: process.env.PATH, ...imageEnv, HOST: '127.0.0.1', METRICS_HOST: '127.0.0.1', ...env },
    });
    t.after(() => child.kill('SIGKILL'));
    let output = '';
    for (const stream of [child.stdout, child.stderr])
      stream.on('data', (chunk) => {
        output += chunk;
      });
    const exited = new Promise<number | null>((resolve) => child.on('exit', resolve));
    return {
      exited,
      kill: () => child.kill('SIGTERM'),
      async line(message: string) {
        for (let waited = 0; waited < 15_000; waited += 50) {
          const found = output.split('\n').find((line) => line.includes(`"msg":"${message}"`));
          if (found) return JSON.parse(found) as { port: number };
          await new Promise((resolve) => setTimeout(resolve, 50));
        }
        throw new Error(`no ${message}: ${output}`);
      },
    };
  };
  const compose = parse(read('infra/compose.yaml'), { merge: true }) as {
    services: Record<string, { command: string[]; healthcheck?: { test: string[] } }>;
  };
  const gateway = run(compose.services['gateway-1']!.command, {
    NODE_ID: 'g',
    PORT: '0',
    REDIS_URL: redis.url,
  });
  const worker = run(compose.services.worker!.command, { METRICS_PORT: '0', REDIS_URL: redis.url });
  const { port } = await gateway.line('listening');
  const metrics = await worker.line('metrics');
  await worker.line('ready');

  const check = (command: string[], env: Record<string, string>) =>
    new Promise<number | null>((resolve) => {
      const [, ...args] = command;
      spawn(process.execPath, args, { env: { PATH: process.env.PATH, ...env } }).on('exit', resolve);
    });
  const gatewayCheck = JSON.parse(/CMD (\[.*\])/.exec(values('HEALTHCHECK')[0]!)![1]!) as string[];
  assert.equal(await check(gatewayCheck, { PORT: String(port) }), 0);
  assert.equal(await check(gatewayCheck, { PORT: '1' }), 1);
  const workerCheck = compose.services
    .worker!.healthcheck!.test.slice(1)
    .map((part) => part.replace('9100', String(metrics.port)));
  assert.equal(await check(workerCheck, {}), 0);
  gateway.kill();
  worker.kill();
  assert.deepEqual(await Promise.all([gateway.exited, worker.exited]), [0, 0], 'SIGTERM drains');
});

test('the image holds every package that its code imports', () => {
  const { dependencies } = JSON.parse(read('package.json')) as { dependencies: Record<string, string> };
  const files = ['shared', 'gateway', 'worker'].flatMap((folder) =>
    readdirSync(join(ROOT, folder), { recursive: true, encoding: 'utf8' })
      .filter((file) => file.endsWith('.ts') && !file.includes('public'))
      .map((file) => `${folder}/${file}`),
  );
  for (const file of [...files, 'infra/typescript.mjs', 'infra/typescript-hooks.mjs'])
    for (const [, name] of read(file)
      .replaceAll(/^import type [^;]+;/gm, '')
      .matchAll(/(?:from|import\()\s*'([^'.][^']*)'/g)) {
      const packageName = name!.startsWith('@')
        ? name!.split('/').slice(0, 2).join('/')
        : name!.split('/')[0]!;
      if (name!.startsWith('node:') || builtinModules.includes(packageName)) continue;
      assert.ok(dependencies[packageName], `${file} imports ${name}`);
    }
});

test('prometheus: on Kubernetes too, the jobs are those of the alerts', () => {
  const commented = /^#\n((?:# {2}.*\n)+)#\n/m.exec(read('infra/prometheus.yml'))![1]!;
  const [job] = parse(commented.replaceAll(/^#/gm, ''));
  const names = job.relabel_configs.find((rule: { target_label?: string }) => rule.target_label === 'job');
  assert.deepEqual(names.source_labels, ['__meta_kubernetes_pod_label_part']);
  const { scrape_configs } = parse(read('infra/prometheus.yml'));
  const jobs = scrape_configs.map(({ job_name }: { job_name: string }) => job_name);
  for (const part of ['gateway', 'worker']) {
    const [pods] = parseAllDocuments(read(`infra/k8s/${part}.yaml`)).map((document) => document.toJS());
    assert.deepEqual(pods.spec.template.metadata.labels, { app: 'rivulet', part });
    assert.equal(pods.spec.template.spec.containers[0].ports.length, 1, 'one target for each pod');
    assert.ok(jobs.includes(part));
  }
});

test('compose: files that exist, settings that parse, health before start, room to drain', () => {
  const { services } = parse(read('infra/compose.yaml'), { merge: true }) as {
    // biome-ignore lint/suspicious/noExplicitAny: checked field by field
    services: Record<string, any>;
  };
  assert.deepEqual(Object.keys(services).sort(), [
    ...['gateway-1', 'gateway-2', 'grafana', 'haproxy', 'prometheus', 'redis', 'worker'],
  ]);
  for (const [name, service] of Object.entries(services)) {
    for (const volume of service.volumes ?? []) {
      const [from] = volume.split(':');
      if (from.startsWith('./')) assert.doesNotThrow(() => read(join('infra', from)), `${name}: ${from}`);
    }
    if (service.image !== 'rivulet') assert.match(service.image, /:\w*\d/, `${name}: a fixed version`);
    for (const port of service.ports ?? [])
      assert.match(port, /^127\.0\.0\.1:/, `${name} is not open to the network`);
  }
  const seconds = (text: string) => Number(/^(\d+)s$/.exec(text)![1]) * 1000;
  for (const name of ['gateway-1', 'gateway-2']) {
    const config = readGatewayConfig(services[name].environment);
    assert.equal(config.NODE_ID, name);
    assert.ok(seconds(services[name].stop_grace_period) > config.DRAIN_MS);
    assert.equal(services[name].depends_on.redis.condition, 'service_healthy');
  }
  const worker = readWorkerConfig(services.worker.environment);
  assert.ok(seconds(services.worker.stop_grace_period) > worker.DRAIN_MS);
  assert.ok(worker.DRAIN_MS > worker.GENERATION_TIMEOUT_MS);
  // Users of the ACL file, and gateways of the load balancer.
  for (const [role, url] of [
    ['gateway', services['gateway-1'].environment.REDIS_URL],
    ['worker', services.worker.environment.REDIS_URL],
  ])
    assert.match(
      read('infra/redis-users.acl'),
      new RegExp(`^user ${role} on >${new URL(url).password} `, 'm'),
    );
  for (const address of ['GATEWAY_1', 'GATEWAY_2'])
    assert.ok(services[services.haproxy.environment[address].split(':')[0]]);
  assert.ok(services.haproxy.environment.GATEWAY_DNS, 'containers change their addresses');
  const { scrape_configs } = parse(read('infra/prometheus.yml'));
  const gateways = scrape_configs.find(({ job_name }: { job_name: string }) => job_name === 'gateway');
  assert.deepEqual(
    gateways.static_configs,
    [{ targets: ['gateway-1:8080', 'gateway-2:8080'] }],
    'a target that DNS forgets is never down',
  );
});

test('redis.conf and the ACL file start a real server', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'rivulet-conf-'));
  t.after(() => rmSync(dir, { recursive: true, force: true }));
  const settings = read('infra/redis.conf')
    .split('\n')
    .map((line) => /^(\S+) (.+)$/.exec(line.replace(/#.*/, '').trim()))
    .filter((match) => match && !['port', 'bind', 'aclfile', 'save'].includes(match[1]!))
    .flatMap((match) => [`--${match![1]}`, ...match![2]!.split(' ')]);
  const server = await startRedisServer({
    dir,
    args: [...settings, '--aclfile', join(ROOT, 'infra/redis-users.acl')],
  });
  t.after(() => server.stop());
  const stranger = spawnProcess('worker/main.ts', { REDIS_URL: server.url });
  assert.equal(await stranger.exited, 1, 'nobody gets in without a role');
  const worker = spawnProcess('worker/main.ts', {
    REDIS_URL: server.url.replace('//', '//worker:CHANGE-ME-worker@'),
  });
  await worker.logged((line) => line.msg === 'ready');
  await worker.kill('SIGTERM');
});

// ----------------------------------------------------------------------------------------------- settings

test('env.example names every setting with its default, and nothing else', () => {
  const example = new Map<string, string>();
  for (const [, off, name, value] of read('infra/env.example').matchAll(/^(#?)([A-Z][A-Z0-9_]+)=(.*)$/gm))
    example.set(name!, off ? `unset ${value}` : value!);
  const schemas = { ...gatewaySettings.shape, ...workerSettings.shape, ...autoscalerSettings.shape };
  assert.deepEqual([...example.keys()].sort(), Object.keys(schemas).sort());
  for (const [name, schema] of Object.entries(schemas)) {
    const parsed = schema.safeParse(undefined);
    const value = example.get(name)!;
    if (
      parsed.success &&
      parsed.data !== undefined &&
      !(Array.isArray(parsed.data) && parsed.data.length === 0)
    )
      assert.equal(value, String(parsed.data), `${name} has another default`);
    else if (parsed.success) assert.match(value, /^unset|^$/, `${name} has no default: put a # before it`);
    else assert.ok(value !== '', `${name} is required: show one`);
  }
});

test('the runbook names only commands, files and settings that exist', () => {
  const runbook = read('infra/RUNBOOK.md');
  const { scripts } = JSON.parse(read('package.json')) as { scripts: Record<string, string> };
  for (const [, name] of runbook.matchAll(/npm run ([a-z:]+)/g)) assert.ok(scripts[name!], `npm run ${name}`);
  for (const [, path] of runbook.matchAll(/`(infra\/[^`\s]+|test\/[^`\s]+)`/g))
    assert.doesNotThrow(() => readdirSync(dirname(join(ROOT, path!))), path);
  for (const section of [
    'Deploy',
    'Drain',
    'Stuck request',
    'Growing queue',
    'Dead letters',
    'Redis failover',
    'Losing a node',
    'Capacity',
  ])
    assert.match(runbook, new RegExp(`^## ${section}`, 'm'));
});

test('who saves the examples of the README here can still run npm test', (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'rivulet-readme-'));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  const examples = [...read('README.md').matchAll(/^```(js|ts)\n(.*?)^```/gms)];
  assert.equal(examples.length, 2);
  for (const [, language, text] of examples) writeFileSync(join(folder, `example.${language}`), text!);
  const { status, stderr } = spawnSync(
    join(ROOT, 'node_modules/.bin/biome'),
    ['check', '--error-on-warnings', `--config-path=${ROOT}`, '--vcs-enabled=false', '.'],
    { cwd: folder, encoding: 'utf8' },
  );
  assert.equal(status, 0, stderr);
});
