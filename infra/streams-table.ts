import type { NodeView, PipelineSnapshot, WorkerView } from '../shared/pipeline.ts';

/** The text of `npm run streams`. `last`, an earlier look, gives the rates. Pure: a snapshot in, lines out. */
export function renderPipeline(
  snapshot: PipelineSnapshot,
  last: PipelineSnapshot | null,
  options: { color: boolean },
): string {
  const bold = (text: string) => (options.color ? `\x1b[1m${text}\x1b[0m` : text);
  const seconds = last ? Math.max(0.001, (snapshot.time - last.time) / 1000) : 0;
  const rate = (now: number, before: number | undefined) =>
    before === undefined || now < before ? '-' : ((now - before) / seconds).toFixed(1);

  const nodeBefore = new Map(last?.nodes.map((node) => [node.node, node]));
  const workerBefore = new Map(last?.workers.map((worker) => [worker.worker, worker]));
  const nodes = table(
    [
      'GATEWAY',
      'STATE',
      'WAITING',
      'RUNNING',
      'RETRIES',
      'DEAD',
      'REPLIED',
      ...(last ? ['REPLIES/S'] : []),
      'SOCKETS',
      'ADDRESS',
    ],
    snapshot.nodes.map((node: NodeView) => [
      node.node,
      node.alive ? 'alive' : 'gone',
      node.waiting,
      node.running,
      node.retries,
      node.dead,
      node.replied,
      ...(last ? [rate(node.replied, nodeBefore.get(node.node)?.replied)] : []),
      node.connections,
      node.url ?? '-',
    ]),
    bold,
  );
  const workers = table(
    [
      'WORKER',
      'STATE',
      'RUNNING',
      'OF',
      'TOKENS',
      ...(last ? ['TOKENS/S'] : []),
      'DONE',
      'FAILED',
      'PID',
      'ANSWERS',
    ],
    snapshot.workers.map((worker: WorkerView) => [
      worker.worker,
      worker.alive ? 'alive' : 'gone',
      worker.runningCount,
      worker.concurrency,
      worker.tokens,
      ...(last ? [rate(worker.tokens, workerBefore.get(worker.worker)?.tokens)] : []),
      worker.done,
      worker.failed,
      worker.pid,
      describeRunning(worker),
    ]),
    bold,
  );
  return [
    snapshot.nodes.length ? nodes : 'No gateway has registered.',
    snapshot.workers.length ? workers : 'No worker has registered.',
  ].join('\n\n');
}

function describeRunning(worker: WorkerView): string {
  const shown = worker.running.slice(0, 3).map(({ user, messageId, attempt, sinceMs }) => {
    const again = attempt > 1 ? `, attempt ${attempt}` : '';
    return `${user}:${messageId} (${Math.round(sinceMs / 1000)} s${again})`;
  });
  const more = worker.runningCount - shown.length;
  return shown.join('  ') + (more > 0 && shown.length ? `  +${more}` : '') || '-';
}

/** Columns as wide as their widest cell; numbers to the right, text to the left. */
function table(head: string[], rows: (string | number)[][], bold: (text: string) => string): string {
  const widths = head.map((title, column) =>
    Math.max(title.length, ...rows.map((row) => String(row[column]).length)),
  );
  const numeric = head.map((_, column) => rows.every((row) => /^[\d.]+$|^-$/.test(String(row[column]))));
  const line = (cells: (string | number)[]) =>
    cells
      .map((cell, column) => {
        const text = String(cell);
        return numeric[column] ? text.padStart(widths[column]!) : text.padEnd(widths[column]!);
      })
      .join('  ')
      .trimEnd();
  return [bold(line(head)), ...rows.map(line)].join('\n');
}
