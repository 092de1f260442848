/**
 * Traces from the socket to the model and back, off by default. The context travels as a W3C `traceparent` text in
 * the request entry. Off costs one comparison with null a request: nothing of OpenTelemetry is even loaded, since
 * only `OTEL_EXPORTER_OTLP_ENDPOINT` makes `createTracing` import it. Spans carry ids, counts and codes, never
 * contents. Everything else (headers, sampling, batch sizes) is what the SDK reads from its own OTEL_ variables.
 */
export interface Tracing {
  /** Starts a span below the one in `parent` ('' = a new trace). */
  start(name: string, parent: string, attributes?: Record<string, string | number>): Span;
  /** Sends what is left. */
  stop(): Promise<void>;
}

export interface Span {
  /** For whoever goes on with the work: a `traceparent`. */
  readonly context: string;
  event(name: string): void;
  set(attributes: Record<string, string | number>): void;
  /** Ends it; with a code from the error table when it failed. */
  end(failure?: string): void;
}

export async function createTracing(
  endpoint: string | undefined,
  service: string,
  attributes: Record<string, string>,
): Promise<Tracing | null> {
  if (!endpoint) return null;
  const { startOpenTelemetry } = await import('./tracing-otel.ts');
  return startOpenTelemetry(endpoint, service, attributes);
}
