import { setTimeout as delay } from 'node:timers/promises';
import { Counter, createMetricsRegistry, Gauge, Histogram } from '../shared/metrics.ts';
import type { NodeView, WorkerView } from '../shared/pipeline.ts';

/** How long Redis may take to tell queues and workers: an outage must not cost a scrape all other numbers. */
const PIPELINE_MS = 1_000;

/** What all gateways see alike: queues and workers. */
export interface SharedNumbers {
  nodes: Pick<NodeView, 'node' | 'waiting' | 'running' | 'retries' | 'dead'>[];
  workers: Pick<WorkerView, 'alive'>[];
}

/** What a gateway counts. Names follow the Prometheus conventions; `infra/grafana` reads them. */
export function createGatewayMetrics(facts: {
  connections: () => number;
  followed: () => number;
  /** Null where another gateway tells them. */
  pipeline: () => Promise<SharedNumbers | null>;
}) {
  const registry = createMetricsRegistry();
  const registers = [registry];
  let look: Promise<SharedNumbers | null> | null = null;
  /** One look for all gauges of a scrape, which are collected at once. */
  function lookAtPipeline(): Promise<SharedNumbers | null> {
    look ??= Promise.race([
      facts.pipeline().catch(() => null),
      delay(PIPELINE_MS, null, { ref: false }),
    ]).finally(() => {
      look = null;
    });
    return look;
  }
  new Gauge({
    name: 'rivulet_connections',
    help: 'Open WebSocket connections.',
    registers,
    collect() {
      this.set(facts.connections());
    },
  });
  new Gauge({
    name: 'rivulet_generations_followed',
    help: 'Generations that connections of this gateway follow.',
    registers,
    collect() {
      this.set(facts.followed());
    },
  });
  new Gauge({
    name: 'rivulet_queue_requests',
    help: 'Requests by node and state (waiting, running, retry, dead); told by the first live gateway for all.',
    labelNames: ['node', 'state'] as const,
    registers,
    async collect() {
      const pipeline = await lookAtPipeline();
      this.reset();
      for (const { node, waiting, running, retries, dead } of pipeline?.nodes ?? []) {
        this.set({ node, state: 'waiting' }, waiting);
        this.set({ node, state: 'running' }, running);
        this.set({ node, state: 'retry' }, retries);
        this.set({ node, state: 'dead' }, dead);
      }
    },
  });
  new Gauge({
    name: 'rivulet_workers',
    help: 'Workers that beat, whether they are scraped or not; told by the first live gateway for all.',
    registers,
    async collect() {
      const pipeline = await lookAtPipeline();
      // No number is not zero, which is an alarm.
      if (pipeline) this.set(pipeline.workers.filter(({ alive }) => alive).length);
      else this.remove();
    },
  });
  return {
    registry,
    admitted: new Counter({
      name: 'rivulet_admitted_total',
      help: 'Chats accepted as new generations.',
      registers,
    }),
    joined: new Counter({
      name: 'rivulet_joined_total',
      help: 'Chats that joined an existing generation.',
      registers,
    }),
    rejected: new Counter({
      name: 'rivulet_rejected_total',
      help: 'Chats rejected, by code.',
      labelNames: ['code'] as const,
      registers,
    }),
    cancelled: new Counter({
      name: 'rivulet_cancelled_total',
      help: 'Generations cancelled here.',
      registers,
    }),
    resumed: new Counter({ name: 'rivulet_resumed_total', help: 'Resumes answered.', registers }),
    frames: new Counter({
      name: 'rivulet_frames_total',
      help: 'Frames taken from the reply stream.',
      registers,
    }),
    healed: new Counter({ name: 'rivulet_gaps_healed_total', help: 'Gaps healed from the log.', registers }),
    doubled: new Counter({
      name: 'rivulet_doubles_dropped_total',
      help: 'Doubled frames dropped.',
      registers,
    }),
    slow: new Counter({
      name: 'rivulet_slow_clients_total',
      help: 'Streams paused for a slow client.',
      registers,
    }),
    messagesSent: new Counter({
      name: 'rivulet_messages_sent_total',
      help: 'Messages to people accepted here.',
      registers,
    }),
    messagesDelivered: new Counter({
      name: 'rivulet_messages_delivered_total',
      help: 'Messages from people handed to connections.',
      registers,
    }),
    inboxGaps: new Counter({
      name: 'rivulet_inbox_gaps_total',
      help: 'Times a connection had to read its inbox because the live path had a gap.',
      registers,
    }),
    tailBroken: new Counter({
      name: 'rivulet_tail_broken_total',
      help: 'Times the reply tail was broken.',
      registers,
    }),
    protocolErrors: new Counter({
      name: 'rivulet_protocol_errors_total',
      help: 'Frames not understood.',
      registers,
    }),
    rateLimited: new Counter({
      name: 'rivulet_rate_limited_total',
      help: 'Frames refused because of their rate.',
      registers,
    }),
    addressLimited: new Counter({
      name: 'rivulet_address_limited_total',
      help: 'Connections refused because their address has too many.',
      registers,
    }),
    admission: new Histogram({
      name: 'rivulet_admission_seconds',
      help: 'Time to accept or reject a chat.',
      buckets: [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5],
      registers,
    }),
    firstToken: new Histogram({
      name: 'rivulet_first_token_seconds',
      help: 'From the chat frame to the first token, as the gateway sees it.',
      buckets: [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60],
      registers,
    }),
    answer: new Histogram({
      name: 'rivulet_answer_seconds',
      help: 'From the chat frame to the terminal frame, for connections that stayed.',
      buckets: [0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600],
      registers,
    }),
    redis: new Histogram({
      name: 'rivulet_redis_seconds',
      help: 'Round trip of a PING to Redis, twice a second.',
      buckets: [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 3],
      registers,
    }),
  };
}

export type GatewayMetrics = ReturnType<typeof createGatewayMetrics>;
