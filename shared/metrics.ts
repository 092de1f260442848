import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';

/** Between two looks at the event loop's lag, which includes it. At the usual 10 ms an idle process does little else. */
const LAG_LOOK_MS = 50;

/** A process's own metrics registry with the usual process and event-loop metrics in it. */
export function createMetricsRegistry(): Registry {
  const registry = new Registry();
  collectDefaultMetrics({ register: registry, eventLoopMonitoringPrecision: LAG_LOOK_MS });
  return registry;
}

export { Counter, Gauge, Histogram, type Registry };
