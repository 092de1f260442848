import { createClient } from './client.js';
import { createConversationStore, isOpen } from './conversations.js';
import { createMarkdownView } from './markdown.js';
import { createPeopleView, hueOf, initials, replaceRows } from './people.js';
import { createPipelineView } from './pipeline.js';

/**
 * The page. It holds one client (one connection) and the user's conversations. An open answer is *followed*: by
 * `chat` until the server is known to have it, by `resume` afterwards, in every tab that shows its conversation
 * and after every reload. What is on screen is always drawn from the turn; the client's events only say that a
 * turn has changed, and drawing waits for the next frame of the screen.
 */

const SAVE_MS = 400; // how far a reload may fall back; the rest comes again from the log
const STALE_UNSENT_MS = 3_600_000; // a question that never left is not asked later than this
const PATIENCE_MS = 4_000; // an outage shorter than this is not worth a banner
const LISTED_CONVERSATIONS = 6; // until all are asked for: people come below them
const HISTORY_TURNS = 40;
const HISTORY_CHARACTERS = 60_000;
const LONGEST_DRAFT = 100_000; // characters; a longer one does not outlive a reload
const LONG_FIELD = 5_000; // characters; from here on the field does not look for its direction itself
const NEAR_END_PX = 80;
const RIGHT_TO_LEFT =
  /^\P{L}*[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;
const WIDE = window.matchMedia('(min-width: 1180px)');
const NARROW = window.matchMedia('(max-width: 820px)');

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const memory = openMemory();

// ------------------------------------------------------------------------------------------------------- state

let userId = query.get('userId') || memory.get('user') || rememberUser(`guest-${randomLetters(6)}`);
const token = takeToken();
const pageDevice = `web-${randomLetters(8)}`;
let store = createConversationStore(userId, onStored);
let client = null;
/** messageId → { answer, conversation, turn, stopping } for what this tab follows. */
const followed = new Map();
/** The conversation on screen; not stored before its first turn. */
let current = null;
/** Turn id → its elements. */
let views = new Map();
const dirty = new Set();
let drawing = 0;
let saveTimer = 0;
const unsaved = new Set();
let stickToEnd = true;
/** Node names, for "picked up again on n2". */
let lastNode = '';
/** What the gateway takes of one frame, as it said last. */
let mostFrameBytes = Number.POSITIVE_INFINITY;
let pipelineUrls = [];
/** No load balancer before the gateways: their list named this page's own, which stays true when that one is gone. */
let isDirect = false;
let patience = 0;
let unreadCount = 0;
let showsAllConversations = false;
/** What was written and not sent: one for the assistant, one for each thread. */
const drafts = new Map();

// -------------------------------------------------------------------------------------------------- connection

/** Only what this page's own server names: whoever is dialled gets the token. */
function gatewayUrls() {
  const own = new URL('/ws', location.href).href;
  return [...new Set([own, ...pipelineUrls].map(socketUrl).filter(Boolean))];
}

function socketUrl(text) {
  try {
    const url = new URL(text, location.href);
    url.protocol = url.protocol.replace('http', 'ws');
    if (url.pathname === '/') url.pathname = '/ws';
    return url.href;
  } catch {
    return '';
  }
}

function connect() {
  const made = createClient({
    url: gatewayUrls(),
    userId,
    token: token || undefined,
    device: deviceName(),
  });
  client = made;
  const touch = ({ messageId }) => {
    const entry = followed.get(messageId);
    if (entry && client === made) takeProgress(entry);
  };
  for (const event of ['accepted', 'queued', 'resumed', 'start', 'token', 'done', 'failed'])
    made.on(event, touch);
  made.on('ended', (event) => {
    if (client === made) takeEnd(event);
  });
  made.on('ready', ({ node, limits }) => {
    endPatience();
    mostFrameBytes = limits?.maxFrameBytes || Number.POSITIVE_INFINITY;
    const moved = lastNode !== '' && lastNode !== node;
    lastNode = node;
    showConnection('ready', moved ? `Now on ${node}` : `Connected · ${node}`);
    if (moved)
      setTimeout(
        () => client === made && made.state === 'ready' && showConnection('ready', `Connected · ${node}`),
        4_000,
      );
    hideBanner();
    drawAll();
    pipeline.refresh();
  });
  made.on('disconnected', ({ code, reason, final }) => {
    if (client !== made) return;
    for (const entry of followed.values()) entry.interrupted = true;
    if (final) {
      endPatience();
      showRefused(code, reason);
    }
    drawAll();
  });
  made.on('reconnecting', () => {
    if (client !== made) return;
    showConnection(
      'waiting',
      navigator.onLine === false ? 'Offline' : lastNode ? 'Reconnecting…' : 'Connecting…',
    );
    startPatience();
    drawAll();
  });
  people.attach(made);
  showConnection('connecting', 'Connecting…');
  startPatience();
  made.connect().catch(() => {}); // a refusal is shown by `disconnected`
  followOpenTurns();
}

function startPatience() {
  patience ||= setTimeout(
    () =>
      showBanner('The gateway cannot be reached. Trying again by itself.', 'Try now', () => client.wake()),
    PATIENCE_MS,
  );
}

function endPatience() {
  clearTimeout(patience);
  patience = 0;
}

function disconnect() {
  saveNow();
  endPatience();
  people.detach();
  const old = client;
  client = null;
  followed.clear();
  old?.close();
}

function showRefused(code, reason) {
  showConnection('off', 'Not connected');
  const because = reason ? `: ${reason.replace(/\.$/, '')}.` : '.';
  switch (code) {
    case 1000:
      return;
    case 4500:
      showBanner(`This name is not accepted${because}`, 'Change name', openUserDialog);
      return;
    case 4501:
      showBanner(
        `${token ? 'Your sign-in is not accepted' : 'You are not signed in'}${because}`,
        'Try again',
        reconnect,
      );
      return;
    case 4502:
      showBanner('This account is closed for now.', 'Try again', reconnect);
      return;
    default:
      showBanner(`The server closed the connection${because}`, 'Connect again', reconnect);
  }
}

function reconnect() {
  hideBanner();
  disconnect();
  connect();
}

function showConnection(state, text) {
  const element = $('connection');
  element.dataset.state = state;
  if ($('connection-text').textContent !== text) $('connection-text').textContent = text;
}

/** Other gateways of the same installation, unless a load balancer stands before them. */
function learnNodes(urls) {
  isDirect ||= urls.some((url) => sameHost(url, location.origin));
  // The one in use stays, whatever the list says of it: without it the client would go back to one that is gone.
  const used = pipelineUrls.filter((url) => client && sameHost(url, client.url));
  const next = isDirect ? [...new Set([...urls, ...used])] : [];
  if (next.join() === pipelineUrls.join()) return;
  pipelineUrls = next;
  client?.setUrls(gatewayUrls());
}

/** Where the live view is not for everybody, who is signed in may still know the other gateways. */
async function askNodes() {
  try {
    const response = await fetch('/nodes', { headers: { authorization: `Bearer ${token}` } });
    if (response.ok) learnNodes((await response.json()).urls);
  } catch {
    // Asked again with the next connection.
  }
}

function sameHost(a, b) {
  const normal = (text) => new URL(text).host.replace('localhost', '127.0.0.1');
  try {
    return normal(a) === normal(b);
  } catch {
    return false;
  }
}

// ----------------------------------------------------------------------------------------------------- answers

function followOpenTurns() {
  for (const conversation of store.list())
    for (const turn of conversation.turns) if (isOpen(turn)) follow(conversation, turn);
}

function follow(conversation, turn) {
  if (!client || client.state === 'closed' || followed.has(turn.messageId)) return;
  if (!turn.known && Date.now() - turn.askedAt > STALE_UNSENT_MS) {
    endTurn(turn, { code: 'unsent', message: '' });
    save(conversation);
    return;
  }
  const answer = turn.known
    ? client.resume(turn.messageId, turn.lastId || undefined, { text: turn.text })
    : client.chat(turn.question, {
        messageId: turn.messageId,
        conversationId: conversation.id,
        history: historyBefore(conversation, turn),
      });
  followed.set(turn.messageId, {
    answer,
    conversation,
    turn,
    interrupted: turn.known,
    resumedUntil: 0,
    stopping: false,
  });
}

/** The latest turns that fit, oldest first. */
function historyBefore(conversation, turn) {
  const history = [];
  let characters = 0;
  let room = mostFrameBytes - questionBytes(conversation, turn.question);
  const earlier = conversation.turns.slice(0, conversation.turns.indexOf(turn)).slice(-HISTORY_TURNS);
  for (const { question, text } of earlier.reverse()) {
    if (text === '') continue;
    const pair = [
      { role: 'user', content: question },
      { role: 'assistant', content: text },
    ];
    characters += question.length + text.length;
    if (characters > HISTORY_CHARACTERS) break;
    room -= bytesOf(pair);
    if (room < 0) break;
    history.unshift(...pair);
  }
  return history.length > 0 ? history : undefined;
}

/** Of the frame that asks it without earlier turns. The id of a message is as long as that of its conversation. */
function questionBytes({ id }, contents) {
  return bytesOf({ type: 'chat', messageId: id, contents, conversationId: id, history: [] });
}

function bytesOf(value) {
  return new TextEncoder().encode(JSON.stringify(value)).length;
}

function takeProgress(entry) {
  const { answer, turn, conversation } = entry;
  if (!isOpen(turn) || turn.messageId !== answer.messageId) return; // another tab has asked it again
  if (entry.interrupted) {
    entry.interrupted = false;
    if (answer.status === 'running' || answer.status === 'queued') {
      entry.resumedUntil = Date.now() + 3_000;
      setTimeout(() => draw(turn), 3_100);
    }
  }
  const announceStart = turn.status !== 'running' && answer.status === 'running';
  turn.status = answer.status === 'sending' ? turn.status : answer.status;
  turn.known = true;
  turn.text = answer.text;
  turn.lastId = answer.lastId;
  turn.attempt = answer.attempt;
  turn.position = answer.position;
  turn.restarts = answer.restarts;
  if (announceStart && conversation === current) announce('The answer is being written.');
  save(conversation);
  draw(turn);
}

function takeEnd({ messageId, error }) {
  const entry = followed.get(messageId);
  if (!entry) return;
  followed.delete(messageId);
  const { answer, turn, conversation } = entry;
  if (turn.messageId !== answer.messageId) return; // another tab has asked it again
  if (error && (error.closeCode !== undefined || error.code === 'closed')) {
    draw(turn); // we are cut off, the answer is not over
    return;
  }
  turn.text = answer.text;
  turn.lastId = answer.lastId;
  turn.attempt = answer.attempt;
  if (error) {
    endTurn(turn, { code: error.code, message: error.message, temporary: error.temporary });
    if (conversation === current) announce(describeError(turn.error));
    finish();
    return;
  }
  turn.status = answer.status;
  answer.done.then((result) => {
    turn.finishReason = result.finishReason;
    if (conversation === current)
      announce(result.status === 'cancelled' ? 'Stopped.' : `The answer: ${turn.text.slice(0, 2_000)}`);
    finish();
  }, finish);

  function finish() {
    conversation.updatedAt = Date.now();
    save(conversation, true);
    draw(turn);
    drawSidebar();
    drawComposer();
  }
}

function endTurn(turn, error) {
  turn.status = 'failed';
  turn.error = error;
}

function openTurn() {
  return current.turns.find(isOpen);
}

/** Asked for in this tab, of this attempt: a reload or another attempt can be stopped again. */
function isStopping(turn) {
  return followed.get(turn.messageId)?.stopping === true;
}

function stopAnswer() {
  const turn = openTurn();
  const entry = turn && followed.get(turn.messageId);
  if (!entry || entry.stopping) return false;
  entry.stopping = true;
  entry.answer.cancel();
  draw(turn);
  drawComposer();
  return true;
}

function ask(question) {
  const text = question.trim();
  if (text === '') return false;
  if (openTurn()) {
    toast('One answer at a time: wait for this one, or stop it.');
    return false;
  }
  if (questionBytes(current, text) > mostFrameBytes) {
    toast(`This message is too long: at most ${mostFrameBytes.toLocaleString()} bytes.`);
    return false;
  }
  const turn = store.addTurn(current, text);
  store.save(current);
  rememberCurrent();
  follow(current, turn);
  stickToEnd = true;
  drawThread();
  drawSidebar();
  drawComposer();
  return true;
}

function askAgain(turn) {
  if (openTurn()) return;
  store.askAgain(current, turn);
  store.save(current);
  follow(current, turn);
  drawThread();
  drawSidebar();
  drawComposer();
  $('question').focus();
}

// ----------------------------------------------------------------------------------------------------- storage

function save(conversation, now = false) {
  unsaved.add(conversation);
  if (now) saveNow();
  else if (!saveTimer) saveTimer = setTimeout(saveNow, SAVE_MS);
}

function saveNow() {
  clearTimeout(saveTimer);
  saveTimer = 0;
  for (const conversation of unsaved) store.save(conversation);
  unsaved.clear();
}

/** Another tab has written a conversation. */
function onStored(id) {
  const conversation = store.get(id);
  if (!conversation) {
    for (const [messageId, entry] of followed) if (entry.conversation.id === id) followed.delete(messageId);
    if (current.id === id) showConversation(null);
  } else {
    for (const turn of conversation.turns) if (isOpen(turn)) follow(conversation, turn);
    if (current.id === id) {
      current = conversation;
      drawThread();
    }
  }
  drawSidebar();
  drawComposer();
}

// ----------------------------------------------------------------------------------------------------- drawing

function draw(turn) {
  dirty.add(turn);
  if (!drawing) drawing = requestAnimationFrame(drawDirty);
}

function drawAll() {
  for (const turn of current.turns) if (isOpen(turn)) draw(turn);
  drawComposer();
}

function drawDirty() {
  drawing = 0;
  for (const turn of dirty) {
    const view = views.get(turn.id);
    if (view) drawTurn(view, turn);
  }
  dirty.clear();
  drawComposer();
  followEnd();
}

function showConversation(id, { focus = true } = {}) {
  keepDraft();
  people.hide();
  $('turns').hidden = false;
  current = (id && store.get(id)) || store.create();
  rememberCurrent();
  views = new Map();
  $('turns').replaceChildren();
  takeDraft();
  stickToEnd = true;
  for (const turn of current.turns) if (isOpen(turn)) follow(current, turn);
  drawThread();
  drawSidebar();
  drawComposer();
  closeDrawers();
  if (focus) $('question').focus();
}

/** Shows the thread with a person or of a group. The assistant's answers go on meanwhile. */
function showPeople(key, { focus = true } = {}) {
  if (!people.has(key)) return false;
  keepDraft();
  if (current.turns.length > 0) current = store.create();
  views = new Map();
  $('turns').replaceChildren();
  $('turns').hidden = true;
  $('welcome').hidden = true;
  stickToEnd = true;
  people.show(key);
  rememberCurrent();
  takeDraft();
  drawSidebar();
  drawComposer();
  closeDrawers();
  if (focus) focusComposer();
  return true;
}

function focusComposer() {
  if ($('composer').hidden) $('thread').focus();
  else $('question').focus();
}

function keepDraft() {
  drafts.set(people.shownKey, $('question').value);
}

/** For a reload: they are this tab's, and this user's. */
function storeDrafts() {
  keepDraft();
  const kept = [...drafts].filter(([, text]) => text !== '' && text.length <= LONGEST_DRAFT);
  try {
    sessionStorage.setItem('rivulet:drafts', JSON.stringify({ userId, kept }));
  } catch {
    // Not remembered.
  }
}

function restoreDrafts() {
  try {
    const stored = JSON.parse(sessionStorage.getItem('rivulet:drafts'));
    if (stored?.userId !== userId) return;
    for (const [key, text] of stored.kept) drafts.set(key, text);
  } catch {
    // None, or none of ours.
  }
  fillQuestion(drafts.get('') ?? '');
}

function takeDraft() {
  const key = people.shownKey;
  fillQuestion(drafts.get(key) ?? '');
  $('question').placeholder = people.placeholder || 'Write a message';
  $('hint-stop').hidden = key !== '';
  resizeQuestion();
}

function drawTitle() {
  const title = people.shownKey ? $('title').textContent : current.title;
  const text = title ? `${title} · Rivulet` : 'Rivulet';
  document.title = unreadCount > 0 ? `(${unreadCount > 99 ? '99+' : unreadCount}) ${text}` : text;
}

function drawThread() {
  if (people.shownKey) return;
  const list = $('turns');
  const wanted = new Set(current.turns.map((turn) => turn.id));
  for (const [id, view] of views) {
    if (wanted.has(id)) continue;
    view.root.remove();
    views.delete(id);
  }
  for (const turn of current.turns) {
    let view = views.get(turn.id);
    if (!view) {
      view = buildTurn(turn);
      views.set(turn.id, view);
    }
    if (list.children[current.turns.indexOf(turn)] !== view.root)
      list.insertBefore(view.root, list.children[current.turns.indexOf(turn)] ?? null);
    drawTurn(view, turn);
  }
  $('welcome').hidden = current.turns.length > 0;
  $('title').textContent = current.title || 'New conversation';
  $('detail').hidden = true;
  $('open-members').hidden = true;
  drawTitle();
  followEnd();
}

function buildTurn(turn) {
  const root = element('li', 'turn');
  const question = element('div', 'question');
  const bubble = element('div', 'bubble');
  bubble.dir = 'auto';
  const asker = element('span', 'visually-hidden', 'You: ');
  asker.dir = 'ltr'; // and so without a say in the bubble's direction
  bubble.append(asker, document.createTextNode(turn.question));
  question.append(bubble);
  const answer = element('div', 'answer');
  const body = element('div', 'prose');
  const state = element('p', 'turn-state');
  const actions = element('div', 'turn-actions');
  answer.append(element('span', 'visually-hidden', 'Answer: '), body, state, actions);
  root.append(question, answer);
  const markdown = createMarkdownView(body);
  return { root, body, state, actions, markdown, shownText: null, shownOpen: true, shownKind: '' };
}

function drawTurn(view, turn) {
  const open = isOpen(turn);
  if (view.shownText !== turn.text || view.shownOpen !== open) {
    view.shownText = turn.text;
    view.shownOpen = open;
    view.markdown.update(turn.text, !open);
  }
  view.root.dataset.status = turn.status;
  view.body.setAttribute('aria-busy', String(open));
  view.root.classList.toggle(
    'streaming',
    open && turn.text !== '' && client?.state === 'ready' && !isStopping(turn),
  );
  const { tone, text } = describeState(turn);
  view.state.hidden = text === '';
  view.state.dataset.tone = tone;
  if (view.state.textContent !== text) view.state.textContent = text;
  const kind = open ? '' : `${turn.text !== ''} ${turn.status === 'done'} ${turn.tries}`;
  if (view.shownKind === kind) return;
  view.shownKind = kind;
  view.actions.replaceChildren();
  if (kind === '') return;
  if (turn.text !== '')
    view.actions.append(actionButton('copy', 'Copy', (button) => copyText(turn.text, button)));
  view.actions.append(
    actionButton(
      'again',
      turn.status === 'done' || turn.status === 'cancelled' ? 'Ask again' : 'Try again',
      () => askAgain(turn),
    ),
  );
}

/** The line under an answer: what is going on, in calm words; empty when the text speaks for itself. */
function describeState(turn) {
  if (!isOpen(turn)) {
    if (turn.status === 'failed') return { tone: 'error', text: describeError(turn.error) };
    if (turn.status === 'cancelled') return { tone: 'quiet', text: 'Stopped' };
    if (turn.finishReason === 'length') return { tone: 'quiet', text: 'Ended at the length limit' };
    if (turn.finishReason === 'content_filter')
      return {
        tone: 'quiet',
        text: `${turn.text === '' ? 'Kept back' : 'Cut off'} by the content filter of the model`,
      };
    return { tone: 'quiet', text: turn.text === '' ? 'The answer was empty' : '' };
  }
  const entry = followed.get(turn.messageId);
  if (entry?.stopping) return { tone: 'busy', text: 'Stopping…' };
  if (client?.state !== 'ready') {
    return turn.known
      ? { tone: 'warn', text: 'Connection lost. The answer goes on and will be picked up here.' }
      : { tone: 'warn', text: 'Waiting for a connection. Your question is kept.' };
  }
  if (turn.status === 'sending')
    return { tone: 'busy', text: turn.known ? 'Picking up where it was…' : 'Sending…' };
  if (turn.status === 'queued') {
    if (!turn.position)
      return { tone: 'busy', text: turn.position === 0 ? 'Next in line' : 'Waiting its turn' };
    return {
      tone: 'busy',
      text:
        turn.position === 1
          ? 'In line, one question ahead of yours'
          : `In line, ${turn.position} questions ahead of yours`,
    };
  }
  if (turn.text === '')
    return { tone: 'busy', text: turn.restarts > 0 ? 'That attempt broke off. Starting over…' : 'Thinking' };
  if (entry && entry.resumedUntil > Date.now())
    return { tone: 'good', text: `Picked up again${lastNode ? ` on ${lastNode}` : ''}` };
  if (turn.restarts > 0) return { tone: 'quiet', text: `Started over (attempt ${turn.attempt})` };
  return { tone: 'quiet', text: '' };
}

function describeError({ code, message, temporary } = {}) {
  switch (code) {
    case 'content_refused':
      return temporary
        ? 'Your question could not be checked just now. Please try again in a moment.'
        : message || 'The rules of this server do not allow this question.';
    case 'queue_full':
      return 'Everyone is asking at once: the queue is full. Please try again in a moment.';
    case 'too_many_active':
      return 'You have several answers running already. Let one finish first.';
    case 'conversation_busy':
      return 'An answer of this conversation is still being written, perhaps in another tab.';
    case 'unknown_message':
      return 'This answer is no longer kept on the server.';
    case 'payload_too_large':
      return 'This message is too long.';
    case 'attempts_exhausted':
      return 'It did not work out, even after several attempts.';
    case 'model_timeout':
      return 'The model took too long.';
    case 'unsent':
      return 'This question was never sent.';
    default:
      return message || 'Something went wrong.';
  }
}

function drawSidebar() {
  const asked = store.list().filter((conversation) => conversation.turns.length > 0);
  const listed = showsAllConversations
    ? asked
    : asked.filter((conversation, index) => index < LISTED_CONVERSATIONS || conversation === current);
  const more = $('conversations-more');
  more.hidden = asked.length <= LISTED_CONVERSATIONS;
  more.textContent = showsAllConversations ? 'Show fewer' : `Show all ${asked.length}`;
  more.setAttribute('aria-expanded', String(showsAllConversations));
  drawConversations(
    listed.map((conversation) => ({
      id: conversation.id,
      title: conversation.title,
      isShown: conversation.id === current.id,
      isBusy: conversation.turns.some(isOpen),
    })),
  );
}

function drawConversations(items) {
  const list = $('conversations');
  // Built again only when it looks different: a click needs its button to stay, and another tab may save all the time.
  const key = JSON.stringify(items);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  replaceRows(list, items.map(buildRow), $('new-chat'));
  $('conversations-empty').hidden = items.length > 0;
}

function buildRow({ id, title, isShown, isBusy }) {
  const row = element('li', 'list-row');
  row.dataset.key = id;
  const open = element('button', 'list-item');
  open.type = 'button';
  if (isShown) open.setAttribute('aria-current', 'page');
  const text = element('span', 'list-text', title || 'Untitled');
  text.dir = 'auto';
  open.append(text);
  if (isBusy) {
    const busy = element('span', 'list-busy');
    busy.append(element('span', 'visually-hidden', ' (being answered)'));
    open.append(busy);
  }
  open.addEventListener('click', () => showConversation(id));
  const remove = element('button', 'icon-button list-remove');
  remove.type = 'button';
  remove.setAttribute('aria-label', `Delete “${title}”`);
  remove.append(icon('trash'));
  remove.addEventListener('click', () => removeConversation(id));
  row.append(open, remove);
  return row;
}

function removeConversation(id) {
  const conversation = store.get(id);
  if (!conversation) return drawSidebar(); // it has made room for another
  for (const turn of conversation.turns) {
    const entry = followed.get(turn.messageId);
    if (!entry) continue;
    followed.delete(turn.messageId);
    entry.answer.cancel();
    turn.status = 'cancelled';
  }
  unsaved.delete(conversation);
  store.remove(conversation.id);
  if (current === conversation) showConversation(null);
  else drawSidebar();
  toast('Conversation deleted', 'Undo', () => {
    store.restore(conversation);
    showConversation(conversation.id);
  });
}

function drawComposer() {
  const turn = people.shownKey ? undefined : openTurn();
  const send = $('send');
  send.classList.toggle('stops', turn !== undefined);
  send.setAttribute('aria-label', turn ? 'Stop the answer' : 'Send');
  send.title = turn ? 'Stop (Esc)' : 'Send (Enter)';
  send.disabled = turn ? isStopping(turn) : $('question').value.trim() === '';
}

function followEnd() {
  const thread = $('thread');
  if (stickToEnd) thread.scrollTop = thread.scrollHeight;
  updateToLatest();
}

function updateToLatest() {
  const thread = $('thread');
  $('to-latest').hidden = thread.scrollHeight - thread.scrollTop - thread.clientHeight < NEAR_END_PX * 2;
  $('to-latest-text').textContent = people.hasUnreadBelow ? 'New messages' : 'Latest';
}

// ------------------------------------------------------------------------------------------------ small pieces

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  use.setAttribute('href', `#i-${name}`);
  svg.setAttribute('aria-hidden', 'true');
  svg.append(use);
  return svg;
}

function actionButton(name, label, run) {
  const button = element('button', 'text-button');
  button.type = 'button';
  button.append(icon(name), element('span', '', label));
  button.addEventListener('click', () => run(button));
  return button;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    const label = button.querySelector('span') ?? button;
    const before = label.textContent;
    label.textContent = 'Copied';
    setTimeout(() => {
      label.textContent = before === 'Copied' ? 'Copy' : before;
    }, 1_500);
  } catch {
    toast('Copying is not allowed here.');
  }
}

function announce(text) {
  $('announcer').textContent = text;
}

function toast(text, action, run) {
  const box = element('div', 'toast');
  box.append(element('span', '', text));
  const timer = setTimeout(() => box.remove(), action ? 7_000 : 4_000);
  if (action) {
    const button = element('button', 'text-button', action);
    button.type = 'button';
    button.addEventListener('click', () => {
      clearTimeout(timer);
      box.remove();
      run();
    });
    box.append(button);
  }
  const toasts = $('toasts');
  while (toasts.children.length > 0) toasts.firstElementChild.remove();
  toasts.append(box);
}

let bannerAction = null;
function showBanner(text, action, run) {
  $('banner-text').textContent = text;
  $('banner-action').textContent = action;
  bannerAction = run;
  $('banner').hidden = false;
}

function hideBanner() {
  $('banner').hidden = true;
  bannerAction = null;
}

/** localStorage, or nothing where it is off: then the page works and forgets. */
function openMemory() {
  return {
    get(key) {
      try {
        return localStorage.getItem(`rivulet:${key}`) ?? '';
      } catch {
        return '';
      }
    },
    set(key, value) {
      try {
        localStorage.setItem(`rivulet:${key}`, value);
      } catch {
        // Not remembered.
      }
    },
  };
}

function rememberUser(name) {
  memory.set('user', name);
  return name;
}

/** Which conversation this tab shows, so that a reload shows it again. */
function rememberCurrent() {
  try {
    const shown = people.shownKey || (current.turns.length > 0 ? current.id : '');
    if (shown) sessionStorage.setItem(`rivulet:${userId}:current`, shown);
    else sessionStorage.removeItem(`rivulet:${userId}:current`);
  } catch {
    // Not remembered.
  }
}

function rememberedCurrent() {
  try {
    return sessionStorage.getItem(`rivulet:${userId}:current`);
  } catch {
    return null;
  }
}

function showRemembered(options) {
  const key = rememberedCurrent();
  current = store.create();
  if (!key || !showPeople(key, options)) showConversation(key, options);
}

/** A token in the address goes into this tab's memory, and out of the address bar. */
function takeToken() {
  const given = query.get('token');
  try {
    if (!given) return sessionStorage.getItem('rivulet:token') ?? '';
    sessionStorage.setItem('rivulet:token', given);
    query.delete('token');
    const rest = query.toString();
    history.replaceState(null, '', rest ? `?${rest}` : location.pathname);
  } catch {
    // It stays in the address bar.
  }
  return given ?? '';
}

/** One per browser, so that the inbox knows its devices apart; one per page where nothing can be remembered. */
function deviceName() {
  if (!memory.get('device')) memory.set('device', pageDevice);
  return memory.get('device') || pageDevice;
}

function randomLetters(length) {
  const alphabet = 'abcdefghijkmnpqrstuvwxyz23456789';
  return Array.from(
    crypto.getRandomValues(new Uint8Array(length)),
    (byte) => alphabet[byte % alphabet.length],
  ).join('');
}

// -------------------------------------------------------------------------------------------------------- user

/** Whoever has a token has its name: another would end the sign-in. */
function drawUser() {
  $('user').disabled = token !== '';
  $('user-hint').hidden = token !== '';
  $('user-name').textContent = userId;
  const avatar = $('avatar');
  avatar.textContent = initials(userId);
  avatar.style.setProperty('--hue', String(hueOf(userId)));
  $('people-self').textContent = userId;
}

function openUserDialog() {
  $('user-input').value = userId;
  $('user-error').textContent = '';
  $('user-input').removeAttribute('aria-invalid');
  $('user-dialog').showModal();
  $('user-input').select();
}

function changeUser(value) {
  const reason = findFault(value);
  $('user-error').textContent = reason;
  if (reason) {
    $('user-input').setAttribute('aria-invalid', 'true');
    $('user-input').focus();
    return;
  }
  $('user-dialog').close();
  if (value === userId && client?.state !== 'closed') return;
  disconnect();
  store.close();
  userId = rememberUser(value);
  if (query.has('userId')) {
    query.set('userId', userId);
    history.replaceState(null, '', `?${query}`);
  }
  lastNode = '';
  drafts.clear();
  fillQuestion('');
  store = createConversationStore(userId, onStored);
  people.setUser(userId);
  hideBanner();
  drawUser();
  connect();
  showRemembered();
}

function findFault(name) {
  if (name === '') return 'Please enter a name.';
  if (!/^[A-Za-z0-9._:@-]{1,64}$/.test(name)) return 'Letters, digits and . _ : @ - only, at most 64.';
  if (/^-?\d+$/.test(name) && Number(name) <= 10_000) return 'Numbers up to 10000 are reserved.';
  return '';
}

// ----------------------------------------------------------------------------------------------------- drawers

function setSidebar(open) {
  document.body.classList.toggle('sidebar-open', open);
  $('open-sidebar').setAttribute('aria-expanded', String(open));
  updateDrawers();
}

function setPipeline(open, remember = true) {
  document.body.classList.toggle('pipeline-open', open);
  $('toggle-pipeline').setAttribute('aria-expanded', String(open));
  if (remember && WIDE.matches) memory.set('pipeline', open ? 'open' : 'closed');
  pipeline.setOpen(open);
  updateDrawers();
}

/** What slid out of view is also out of reach of the keyboard; a drawer over the chat takes it all. */
function updateDrawers() {
  const sidebarOpen = document.body.classList.contains('sidebar-open');
  const pipelineOpen = document.body.classList.contains('pipeline-open');
  const sidebarCovers = NARROW.matches && sidebarOpen;
  const pipelineCovers = !WIDE.matches && pipelineOpen;
  $('sidebar').inert = NARROW.matches ? !sidebarOpen : pipelineCovers;
  $('pipeline').inert = !pipelineOpen;
  const covered = sidebarCovers || pipelineCovers;
  $('scrim').hidden = !covered;
  $('chat').inert = covered;
}

function closeDrawers() {
  if (NARROW.matches) setSidebar(false);
  if (!WIDE.matches && document.body.classList.contains('pipeline-open')) setPipeline(false, false);
}

// ------------------------------------------------------------------------------------------------------ wiring

const pipeline = createPipelineView({
  elements: {
    live: $('pipeline-live'),
    note: $('pipeline-note'),
    content: $('pipeline-content'),
    now: $('tokens-now'),
    peak: $('tokens-peak'),
    chart: $('chart'),
    line: $('chart-line'),
    area: $('chart-area'),
    nodes: $('nodes'),
    workers: $('workers'),
    noWorkers: $('no-workers'),
  },
  getOrigins() {
    const inUse = client ? new URL(client.url) : null;
    const origin = inUse ? `${inUse.protocol.replace('ws', 'http')}//${inUse.host}` : location.origin;
    return [...new Set([origin, location.origin])];
  },
  onNodes: learnNodes,
  onRefused() {
    setPipeline(false, false);
    if (token) void askNodes();
  },
  isMine: (messageId) => followed.has(messageId),
});

const people = createPeopleView({
  userId,
  elements: {
    list: $('people'),
    empty: $('people-empty'),
    messages: $('messages'),
    threadEmpty: $('thread-empty'),
    notices: $('notices'),
    dockNote: $('dock-note'),
    composer: $('composer'),
    addButton: $('add-person'),
    addDialog: $('add-dialog'),
    addForm: $('add-form'),
    addInput: $('add-input'),
    addError: $('add-error'),
    addLabel: $('add-label'),
    addHint: $('add-hint'),
    addSubmit: $('add-submit'),
    addCancel: $('add-cancel'),
    membersButton: $('open-members'),
    membersDialog: $('members-dialog'),
    membersList: $('members'),
    membersTitle: $('members-title'),
    membersNote: $('members-note'),
    membersLeave: $('members-leave'),
    membersClose: $('members-close'),
  },
  open: (key) => showPeople(key),
  close: () => showConversation(null),
  /** The thread on screen, as it is to be headed. */
  onShow({ title, detail, online, kind }) {
    $('title').textContent = title;
    $('detail').textContent = detail;
    $('detail').hidden = detail === '';
    $('detail').classList.toggle('online', online);
    $('open-members').hidden = kind !== 'group';
    drawTitle();
    drawComposer();
  },
  onChange({ unread }) {
    unreadCount = unread;
    $('unread-dot').hidden = unread === 0;
    $('open-sidebar').setAttribute(
      'aria-label',
      unread === 0 ? 'Conversations' : `Conversations, ${unread} unread`,
    );
    drawTitle();
  },
  follow(force) {
    if (force) stickToEnd = true;
    followEnd();
  },
  isAtEnd: () => stickToEnd,
  /** Scrolls back to where something begins, if that is above what the end shows. */
  reveal(node) {
    const thread = $('thread');
    const above = node ? node.getBoundingClientRect().top - thread.getBoundingClientRect().top : 0;
    if (above >= 0) return;
    stickToEnd = false;
    thread.scrollTop += above - 16;
    updateToLatest();
  },
  focusComposer,
  findFault,
  announce,
  toast,
});

const questionField = $('question');

function fillQuestion(text) {
  turnQuestion(text);
  questionField.value = text;
}

/** Looking for the direction of a long text takes a browser minutes: it gets that of its first letter, for good. */
function turnQuestion(text) {
  const isLong = text.length > LONG_FIELD;
  questionField.dir = isLong ? (RIGHT_TO_LEFT.test(text.slice(0, LONG_FIELD)) ? 'rtl' : 'ltr') : 'auto';
}

function resizeQuestion() {
  questionField.style.height = 'auto';
  questionField.style.height = `${Math.min(questionField.scrollHeight, 220)}px`;
}

/** Safari ends a composition before the key that confirms it: what still tells that key from others is its code. */
function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

function submitQuestion() {
  const text = questionField.value;
  if (!(people.shownKey ? people.send(text) : ask(text))) return;
  fillQuestion('');
  drafts.delete(people.shownKey);
  resizeQuestion();
  drawComposer();
}

questionField.addEventListener('beforeinput', ({ data }) => {
  if (data?.length > LONG_FIELD) turnQuestion(data); // before the browser looks at it
});
questionField.addEventListener('input', () => {
  turnQuestion(questionField.value);
  resizeQuestion();
  drawComposer();
});
questionField.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || isComposing(event)) return;
  event.preventDefault();
  submitQuestion();
});
$('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  if (!people.shownKey && openTurn()) stopAnswer();
  else submitQuestion();
  questionField.focus();
});
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || isComposing(event) || event.defaultPrevented) return;
  if (document.querySelector('dialog[open]')) return;
  if (!$('scrim').hidden) {
    const opener = document.body.classList.contains('sidebar-open') ? 'open-sidebar' : 'toggle-pipeline';
    closeDrawers();
    $(opener).focus();
  } else if (!people.shownKey && stopAnswer()) {
    questionField.focus();
  }
});

$('new-chat').addEventListener('click', () => showConversation(null));
$('conversations-more').addEventListener('click', () => {
  showsAllConversations = !showsAllConversations;
  drawSidebar();
});
$('suggestions').addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button && ask(button.textContent)) questionField.focus();
});
$('turns').addEventListener('click', (event) => {
  const button = event.target.closest('[data-copy="code"]');
  if (button) copyText(button.closest('.code').querySelector('code').textContent, button);
});
$('thread').addEventListener(
  'scroll',
  () => {
    const thread = $('thread');
    stickToEnd = thread.scrollHeight - thread.scrollTop - thread.clientHeight < NEAR_END_PX;
    people.onScroll();
    updateToLatest();
  },
  { passive: true },
);
$('to-latest').addEventListener('click', () => {
  stickToEnd = true;
  followEnd();
  questionField.focus();
});
$('banner-action').addEventListener('click', () => bannerAction?.());

$('open-sidebar').addEventListener('click', () => {
  setSidebar(true);
  $('new-chat').focus();
});
$('close-sidebar').addEventListener('click', () => {
  setSidebar(false);
  $('open-sidebar').focus();
});
$('toggle-pipeline').addEventListener('click', () => {
  const open = !document.body.classList.contains('pipeline-open');
  setPipeline(open);
  if (open && !WIDE.matches) $('close-pipeline').focus();
});
$('close-pipeline').addEventListener('click', () => {
  setPipeline(false);
  $('toggle-pipeline').focus();
});
$('scrim').addEventListener('click', closeDrawers);
$('skip').addEventListener('click', (event) => {
  event.preventDefault(); // an address with a fragment would be scrolled to by every reload
  closeDrawers();
  focusComposer();
});
NARROW.addEventListener('change', updateDrawers);
WIDE.addEventListener('change', () =>
  setPipeline(WIDE.matches && memory.get('pipeline') !== 'closed', false),
);

$('user').addEventListener('click', openUserDialog);
$('user-cancel').addEventListener('click', () => $('user-dialog').close());
$('user-form').addEventListener('submit', (event) => {
  event.preventDefault();
  changeUser($('user-input').value.trim());
});
$('theme').addEventListener('click', () => {
  const { dataset } = document.documentElement;
  const dark = dataset.theme
    ? dataset.theme === 'dark'
    : window.matchMedia('(prefers-color-scheme: dark)').matches;
  dataset.theme = dark ? 'light' : 'dark';
  memory.set('theme', dataset.theme);
});

document.addEventListener('visibilitychange', () => {
  if (document.hidden) {
    saveNow();
    storeDrafts();
  } else client?.wake();
  people.wake();
});
window.addEventListener('focus', () => people.wake());
window.addEventListener('online', () => {
  if (client?.state === 'ready') showConnection('ready', `Connected · ${lastNode}`);
  client?.wake();
});
window.addEventListener('offline', () => {
  if (client?.state === 'ready') showConnection('waiting', 'Offline');
  client?.wake(); // a connection that is gone is noticed by its silence
});
window.addEventListener('pagehide', () => {
  saveNow();
  storeDrafts();
  people.saveNow();
});

drawUser();
restoreDrafts();
connect();
showRemembered({ focus: !NARROW.matches });
setPipeline(WIDE.matches && memory.get('pipeline') !== 'closed', false);
document.body.classList.add('settled'); // from here on, drawers slide
