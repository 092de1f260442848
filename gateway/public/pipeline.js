/**
 * The live view: asks `GET /pipeline` once a second while it is open and the page is visible, and draws rates from
 * the rise of the counters. It never holds up the chat: a poll that fails is tried again with the next second, and one
 * that is refused with the next connection.
 */

const POLL_MS = 1_000;
const TIMEOUT_MS = 4_000;
const SAMPLES = 60;
const SHOWN_REQUESTS = 5; // per worker

/**
 * @param elements the parts of the page that it fills
 * @param getOrigins where to ask, the best first: the gateway in use, then this page's own
 * @param onNodes told the URLs of the live gateways
 * @param onRefused told that there is nothing to see for this user
 * @param isMine whether a messageId is one of this page's
 */
export function createPipelineView({ elements, getOrigins, onNodes, onRefused, isMine }) {
  let open = false;
  let timer = 0;
  let asking = false;
  let isRefused = false;
  /** The snapshot before, for rates. */
  let before = null;
  const rates = []; // tokens per second, the latest last

  function setOpen(value) {
    open = value;
    schedule(0);
  }

  function schedule(ms) {
    clearTimeout(timer);
    // Also while it is closed, once in a while: it is how the page learns of the other gateways.
    if (!document.hidden && !isRefused)
      timer = setTimeout(poll, open ? ms : Math.max(ms, before ? 15_000 : 500));
  }

  function refresh() {
    isRefused = false;
    schedule(0);
  }

  async function poll() {
    if (asking) return;
    asking = true;
    try {
      show(await ask());
    } catch (error) {
      showProblem(error);
    } finally {
      asking = false;
      schedule(POLL_MS);
    }
  }

  async function ask() {
    let problem = null;
    for (const origin of getOrigins()) {
      try {
        const response = await fetch(`${origin}/pipeline`, {
          headers: { accept: 'application/json' },
          signal: AbortSignal.timeout(TIMEOUT_MS),
        });
        if (response.status === 401 || response.status === 403) throw new Problem('off');
        if (response.status >= 500) throw new Error(`the gateway answers ${response.status}`); // it passes
        if (!response.ok) throw new Problem('missing');
        return await response.json();
      } catch (error) {
        problem = error;
        if (error instanceof Problem) break;
      }
    }
    throw problem;
  }

  function showProblem(error) {
    const kind = error instanceof Problem ? error.kind : 'away';
    elements.live.dataset.state = kind === 'away' ? 'waiting' : 'off';
    elements.live.textContent = kind === 'away' ? 'Paused' : 'Off';
    elements.note.textContent = {
      off: 'The live view is off for this user.',
      missing: 'This gateway has no live view.',
      away: 'The live view cannot be reached right now. Still trying.',
    }[kind];
    elements.note.hidden = false;
    if (kind !== 'away') elements.content.hidden = true;
    elements.content.classList.toggle('stale', kind === 'away');
    if (kind === 'away') before = null;
    else {
      isRefused = true;
      onRefused();
    }
  }

  function show(snapshot) {
    const nodes = snapshot.nodes ?? [];
    const workers = snapshot.workers ?? [];
    onNodes(nodes.filter((node) => node.alive && node.url).map((node) => node.url));
    const seconds = before ? (snapshot.time - before.time) / 1000 : 0;
    const tokens = seconds > 0 ? sumOfRises(workers, before.workers, 'worker', 'tokens') / seconds : 0;
    rates.push(tokens);
    if (rates.length > SAMPLES) rates.shift();
    elements.live.dataset.state = 'live';
    elements.live.textContent = 'Live';
    elements.note.hidden = true;
    elements.content.hidden = false;
    elements.content.classList.remove('stale');
    if (open) {
      drawThroughput(tokens);
      drawNodes(nodes, seconds);
      drawWorkers(workers);
    }
    before = snapshot;
  }

  function drawThroughput(tokens) {
    const peak = Math.max(...rates);
    elements.now.textContent = formatRate(tokens);
    elements.peak.textContent = peak > 0 ? `peak ${formatRate(peak)}` : '';
    const ceiling = Math.max(10, peak * 1.15);
    const points = rates.map((rate, index) => {
      const x = 300 - (rates.length - 1 - index) * (300 / (SAMPLES - 1));
      return [x, 71 - (rate / ceiling) * 66];
    });
    const line = smoothPath(points);
    elements.line.setAttribute('d', line);
    elements.area.setAttribute('d', `${line}L300 72L${points[0][0].toFixed(1)} 72Z`);
    elements.chart.setAttribute(
      'aria-label',
      `Tokens per second over the last minute: ${formatRate(tokens)} now, ${formatRate(peak)} at most`,
    );
  }

  function drawNodes(nodes, seconds) {
    updateList(
      elements.nodes,
      nodes,
      (node) => node.node,
      buildNode,
      (card, node) => {
        const previous = before?.nodes.find((other) => other.node === node.node);
        const replies = previous && seconds > 0 ? Math.max(0, node.replied - previous.replied) / seconds : 0;
        card.root.dataset.alive = String(node.alive);
        card.name.textContent = node.node;
        card.detail.textContent = !node.alive
          ? 'gone'
          : node.connections === null || node.connections === undefined
            ? ''
            : count(node.connections, 'connection');
        card.waiting.set(node.waiting, 'amber');
        card.running.set(node.running, 'accent');
        card.retries.set(node.retries, 'amber');
        card.dead.set(node.dead, 'red');
        card.replies.set(formatRate(replies), '', replies > 0);
      },
    );
  }

  function drawWorkers(all) {
    // One that left matters only while its requests wait to be taken over.
    const workers = all.filter((worker) => worker.alive || worker.runningCount > 0);
    updateList(
      elements.workers,
      workers,
      (worker) => worker.worker,
      buildWorker,
      (card, worker) => {
        card.root.dataset.alive = String(worker.alive);
        card.name.textContent = worker.worker;
        card.name.title = worker.worker;
        const busy = worker.runningCount ?? worker.running.length;
        card.detail.textContent = worker.alive ? `${busy} of ${worker.concurrency}` : 'gone';
        card.meter.style.width = `${Math.min(100, (busy / Math.max(1, worker.concurrency)) * 100)}%`;
        card.totals.textContent = `${count(worker.done, 'answer')} done${worker.failed ? `, ${worker.failed} failed` : ''}`;
        const rows = worker.running.slice(0, SHOWN_REQUESTS).map((request) => {
          const row = element('li', isMine(request.messageId) ? 'request mine' : 'request');
          const who = element(
            'span',
            'request-user',
            isMine(request.messageId) ? 'your answer' : request.user,
          );
          const age = element('span', 'request-age', formatAge(request.sinceMs));
          row.title = `${request.user} · ${request.messageId}`;
          row.append(who);
          if (request.attempt > 1)
            row.append(element('span', 'request-attempt', `attempt ${request.attempt}`));
          row.append(age);
          return row;
        });
        if (busy > rows.length && rows.length > 0)
          rows.push(element('li', 'request more', `and ${busy - rows.length} more`));
        card.requests.replaceChildren(...rows);
      },
    );
    elements.noWorkers.hidden = workers.some((worker) => worker.alive);
  }

  document.addEventListener('visibilitychange', () => schedule(0));
  schedule(0);
  return { setOpen, refresh };
}

class Problem extends Error {
  constructor(kind) {
    super(kind);
    this.kind = kind;
  }
}

function sumOfRises(now, then, key, field) {
  const old = new Map(then.map((entry) => [entry[key], entry[field]]));
  return now.reduce(
    (sum, entry) => sum + Math.max(0, entry[field] - (old.get(entry[key]) ?? entry[field])),
    0,
  );
}

/** Keeps one element per key, in order, without rebuilding those that stay. */
function updateList(list, items, keyOf, build, fill) {
  list.cards ??= new Map();
  const keep = new Set(items.map(keyOf));
  for (const key of list.cards.keys()) if (!keep.has(key)) list.cards.delete(key);
  const cards = items.map((item) => {
    const key = keyOf(item);
    let card = list.cards.get(key);
    if (!card) {
      card = build();
      list.cards.set(key, card);
    }
    fill(card, item);
    return card.root;
  });
  const same =
    cards.length === list.children.length && cards.every((card, index) => list.children[index] === card);
  if (!same) list.replaceChildren(...cards);
}

function buildNode() {
  const root = element('li', 'card');
  const head = element('div', 'card-head');
  const name = element('span', 'card-name');
  const detail = element('span', 'card-detail');
  head.append(element('span', 'dot'), name, detail);
  const stats = element('dl', 'stats');
  const stat = (label) => {
    const box = element('div', 'stat');
    const value = element('dd', '', '0');
    box.append(element('dt', '', label), value);
    stats.append(box);
    return {
      set(shown, tone, active = shown > 0) {
        value.textContent = String(shown);
        box.dataset.tone = active ? tone : '';
        box.classList.toggle('zero', !active);
      },
    };
  };
  root.append(head, stats);
  return {
    root,
    name,
    detail,
    waiting: stat('waiting'),
    running: stat('running'),
    replies: stat('frames/s'),
    retries: stat('retries'),
    dead: stat('dead'),
  };
}

function buildWorker() {
  const root = element('li', 'card');
  const head = element('div', 'card-head');
  const name = element('span', 'card-name');
  const detail = element('span', 'card-detail');
  head.append(element('span', 'dot'), name, detail);
  const track = element('div', 'meter');
  const meter = element('span', '');
  track.append(meter);
  const requests = element('ul', 'requests');
  const totals = element('p', 'card-foot');
  root.append(head, track, requests, totals);
  return { root, name, detail, meter, requests, totals };
}

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

/** A curve through the points that never overshoots: horizontal tangents at both ends of each piece. */
function smoothPath(points) {
  let path = `M${points[0][0].toFixed(1)} ${points[0][1].toFixed(1)}`;
  for (let i = 1; i < points.length; i++) {
    const [x0, y0] = points[i - 1];
    const [x1, y1] = points[i];
    const middle = ((x0 + x1) / 2).toFixed(1);
    path += `C${middle} ${y0.toFixed(1)} ${middle} ${y1.toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`;
  }
  return path;
}

function formatRate(rate) {
  if (rate >= 10_000) return `${(rate / 1000).toFixed(1)}k`;
  return rate >= 10 || rate === 0 ? String(Math.round(rate)) : rate.toFixed(1);
}

function formatAge(ms) {
  const seconds = Math.round(ms / 1000);
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min`;
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? '' : 's'}`;
}
