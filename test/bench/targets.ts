import { advantage, alignColumns, format, summarize, type WorkloadResult } from './report.ts';
import { SYSTEMS, type SystemName } from './systems.ts';

/** What this project wants of itself, against what a run has measured: medians of the rounds, ratios within the run. */

interface Target {
  workload: string;
  metric: string;
  /** Rivulet is to be so many times better than this one, or absent: its own number is to be at most `limit`. */
  against?: SystemName;
  limit: number;
}

const TARGETS: Target[] = [
  { workload: 'a', metric: 'tokensPerSecond', against: 'bullmq-socketio', limit: 5 },
  { workload: 'a', metric: 'tokensPerSecond', against: 'bullmq-pubsub-batched', limit: 2 },
  { workload: 'a', metric: 'tokensPerSecond', against: 'control', limit: 0.6 },
  { workload: 'b', metric: 'answersPerSecond', against: 'bullmq-socketio', limit: 2 },
  { workload: 'c', metric: 'firstTokenP50', against: 'bullmq-socketio', limit: 2 },
  { workload: 'c', metric: 'firstTokenP99', against: 'bullmq-socketio', limit: 3 },
  { workload: 'held', metric: 'heldAnswers', against: 'bullmq-socketio', limit: 4 },
  { workload: 'held', metric: 'heldAnswers', against: 'bullmq-pubsub-batched', limit: 1.5 },
  { workload: 'd-50k', metric: 'bytesPerSocket', limit: 2_048 },
  { workload: 'f-memory', metric: 'liveBytes', limit: 6_144 },
  { workload: 'f-memory', metric: 'finishedBytes', limit: 1_536 },
  { workload: 'g-1000-20', metric: 'interTokenP99', limit: 25 },
  { workload: 'g-10000-500', metric: 'late', limit: 0 },
];

/** A table of the targets that this run can say something about; nothing where it has none. */
export function formatTargets(results: WorkloadResult[]): string {
  const rows: string[][] = [];
  for (const { workload: id, metric: key, against, limit } of TARGETS) {
    const result = results.find(({ workload }) => workload.id === id);
    const metric = result?.workload.metrics.find((one) => one.key === key);
    const ours = result?.rounds.get('rivulet');
    const theirs = against && result?.rounds.get(against);
    if (!metric || !ours?.length || (against && !theirs?.length)) continue;
    const own = summarize(ours, key).median;
    const measured = theirs ? advantage(own, summarize(theirs, key).median, metric.better) : own;
    rows.push([
      `${id}: ${metric.title}${against ? `, beside ${SYSTEMS[against].title}` : ''}`,
      against ? `${limit}×` : `≤ ${format(limit)}`,
      against ? `${format(measured, 2)}×` : format(measured, metric.digits),
      (against ? measured >= limit : measured <= limit) ? 'met' : 'missed',
    ]);
  }
  return rows.length === 0 ? '' : alignColumns([['Targets', 'wanted', 'measured', ''], ...rows]).join('\n');
}
