import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { readAutoscalerConfig } from '../../infra/autoscaling.ts';
import { chooseToRetire, createScaler, type ScalingLimits, workersWanted } from '../../infra/scaling.ts';
import { drawScaling, loadOf, type ScalingSample, thin } from '../../infra/scaling-plot.ts';

const limits: ScalingLimits = { min: 0, max: 4, concurrency: 16, coolDownMs: 10_000 };

test('the queue decides, within the limits', () => {
  const wanted = (demand: number, more: Partial<ScalingLimits> = {}) =>
    workersWanted(demand, { ...limits, ...more });
  assert.deepEqual(
    [0, 1, 16, 17, 64, 65, 1e6].map((demand) => wanted(demand)),
    [0, 1, 1, 2, 4, 4, 4],
  );
  assert.equal(wanted(0, { min: 1 }), 1);
});

test('up at once, down after the cool-down, in one step to what is still needed', () => {
  const scale = createScaler(limits);
  assert.equal(scale(0, 0), 0);
  assert.equal(scale(200, 64), 4);
  assert.equal(scale(400, 20), 4);
  assert.equal(scale(5_000, 1), 4);
  assert.equal(scale(10_199, 0), 4);
  assert.equal(scale(10_200, 0), 2, 'the 20 of 400 ms still count');
  assert.equal(scale(10_400, 0), 1);
  assert.equal(scale(15_000, 0), 0);
});

test('a load that comes and goes does not make workers flap', () => {
  const scale = createScaler(limits);
  const targets = new Set<number>();
  for (let second = 0; second < 600; second++) {
    const target = scale(second * 1_000, second % 9 === 0 ? 30 : 0);
    if (second > 0) targets.add(target);
  }
  assert.deepEqual([...targets], [2]);
});

test('for every load: never below what is needed, never down within the cool-down', () => {
  const steps = fc.array(fc.record({ gap: fc.integer({ min: 1, max: 4_000 }), demand: fc.nat(100) }));
  fc.assert(
    fc.property(steps, (list) => {
      const scale = createScaler(limits);
      const seen: { at: number; wanted: number }[] = [];
      let at = 0;
      for (const { gap, demand } of list) {
        at += gap;
        seen.push({ at, wanted: workersWanted(demand, limits) });
        const recent = seen.filter((one) => one.at > at - limits.coolDownMs);
        assert.equal(scale(at, demand), Math.max(...recent.map(({ wanted }) => wanted)));
      }
    }),
  );
});

test('the ones still starting go first, then the idle, then the least busy; young before old', () => {
  const candidates = [
    { pid: 1, running: 3, startedMs: 1 },
    { pid: 2, running: 0, startedMs: 2 },
    { pid: 3, running: 0, startedMs: 3 },
    { pid: 4, running: null, startedMs: 4 },
    { pid: 5, running: 1, startedMs: 5 },
  ];
  assert.deepEqual(
    chooseToRetire(candidates, 4).map(({ pid }) => pid),
    [4, 3, 2, 5],
  );
  assert.deepEqual(chooseToRetire(candidates, -1), []);
});

test('settings: limits that contradict each other are named', () => {
  assert.equal(readAutoscalerConfig({}).WORKERS_MAX, 4);
  assert.throws(
    () => readAutoscalerConfig({ WORKERS_MIN: '5', WORKERS_MAX: '2' }),
    /WORKERS_MIN is above WORKERS_MAX/,
  );
  assert.throws(() => readAutoscalerConfig({ SCALE_POLL_MS: 'often' }), /SCALE_POLL_MS/);
});

test('the plot draws what was seen and nothing else', () => {
  const samples = Array.from(
    { length: 100 },
    (_, index): ScalingSample => ({
      atMs: 1_000 + index * 200,
      appended: index * 4,
      open: index % 7,
      running: index % 5,
      target: index > 50 ? 2 : 1,
      workers: index > 55 ? 2 : 1,
    }),
  );
  assert.equal(loadOf(samples).at(-1), 20, '4 each 200 ms');
  assert.equal(thin(samples).length, 50);
  assert.equal(thin(samples).at(-1), samples.at(-1));
  const svg = drawScaling(samples);
  assert.match(svg, /^<svg xmlns/);
  assert.equal(svg.match(/<polyline/g)?.length, 5);
  assert.doesNotMatch(svg + drawScaling([]), /NaN|undefined|Infinity/);
});
