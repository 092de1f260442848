/** Adds the jobs of one event-loop turn with one `addBulk`. */
export function addJobs(queue) {
  const opts = { removeOnComplete: true, removeOnFail: true };
  let jobs = [];
  const flush = () => {
    const batch = jobs;
    jobs = [];
    if (batch.length === 1) void queue.add('chat', batch[0].data, opts);
    else void queue.addBulk(batch);
  };
  return (data) => {
    if (jobs.push({ name: 'chat', data, opts }) === 1) setImmediate(flush);
  };
}
