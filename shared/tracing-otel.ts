import { type Context, ROOT_CONTEXT, SpanStatusCode, TraceFlags, trace } from '@opentelemetry/api';
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-http';
import { resourceFromAttributes } from '@opentelemetry/resources';
import { BatchSpanProcessor, NodeTracerProvider } from '@opentelemetry/sdk-trace-node';
import type { Tracing } from './tracing.ts';

/** The only file that knows OpenTelemetry; see tracing.ts. No global provider, no patching of other modules. */
export function startOpenTelemetry(
  endpoint: string,
  service: string,
  attributes: Record<string, string>,
): Tracing {
  const exporter = new OTLPTraceExporter({ url: `${endpoint.replace(/\/+$/, '')}/v1/traces` });
  const provider = new NodeTracerProvider({
    resource: resourceFromAttributes({ 'service.name': service, ...attributes }),
    // Bounded: spans beyond the queue are dropped, never waited for.
    spanProcessors: [new BatchSpanProcessor(exporter, { maxQueueSize: 2_048, scheduledDelayMillis: 1_000 })],
  });
  const tracer = provider.getTracer('rivulet');
  return {
    start(name, parent, initial = {}) {
      const span = tracer.startSpan(name, { attributes: initial }, readContext(parent));
      const { traceId, spanId, traceFlags } = span.spanContext();
      const flags = (traceFlags & TraceFlags.SAMPLED).toString(16).padStart(2, '0');
      return {
        context: `00-${traceId}-${spanId}-${flags}`,
        event: (event) => void span.addEvent(event),
        set: (values) => void span.setAttributes(values),
        end(failure) {
          if (failure !== undefined) span.setStatus({ code: SpanStatusCode.ERROR, message: failure });
          span.end();
        },
      };
    },
    async stop() {
      await provider.shutdown().catch(() => {}); // a collector that is away must not hold a process back
    },
  };
}

function readContext(parent: string): Context {
  const match = /^00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$/.exec(parent);
  if (!match) return ROOT_CONTEXT;
  return trace.setSpanContext(ROOT_CONTEXT, {
    traceId: match[1]!,
    spanId: match[2]!,
    traceFlags: Number.parseInt(match[3]!, 16),
    isRemote: true,
  });
}
