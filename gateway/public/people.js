import { linkify } from './markdown.js';
import {
  compareInboxIds,
  countUnread,
  createPeopleStore,
  idTime,
  orderMessages,
  threadKey,
} from './people-store.js';

/**
 * People beside the assistant: the list of persons and groups, the thread on screen, what is sent and received.
 * It uses the page's one client. What comes is stored first and acknowledged then, so that this browser gets it
 * from the inbox again if it was not kept. What is sent stays `pending` until the server has it for certain; one
 * message of a thread is under way at a time, so their order holds, and it keeps its messageId however often it
 * is sent. Everything that people wrote only ever becomes text nodes.
 */

const SAVE_MS = 150; // a burst from the inbox is written, and acknowledged, once
const PRESENCE_EVERY_MS = 30_000;
const PRESENCE_SOON_MS = 400;
const PRESENCE_BATCH = 50;
const PRESENCE_MOST = 300; // persons asked about in one round
const MEMBERS_ASKED = 100; // of the group on screen
const ADOPT_MS = 20_000; // a pending message of another tab, which may be gone
const STALE_MS = 12 * 3_600_000; // the server may have forgotten the messageId: the user decides
const MOST_TRIES = 6; // of a message that is refused for the moment
const RUN_MS = 5 * 60_000; // messages of one person within this stand together
const MOST_NOTICES = 3;

export function createPeopleView(parts) {
  const { elements, onShow, onChange, follow, isAtEnd, announce, toast } = parts;
  const { list, empty, messages, threadEmpty, notices, dockNote, composer } = elements;

  let userId = parts.userId;
  let store = createPeopleStore(userId, onStored);
  let client = null;
  let shown = null;
  /** Inbox id up to which the shown thread was read when it was opened: the line "New" stands there. */
  let newAfter = '';
  let views = new Map();
  let drawing = 0;
  let saveTimer = 0;
  const unsaved = new Set();
  /** The highest inbox id received, and the one acknowledged. */
  let receivedId = '';
  let ackedId = '';
  const pumping = new Set();
  const sentHere = new Set();
  /** user → number of connections; absent = not known. */
  let presence = new Map();
  let presenceTimer = 0;
  let presenceAt = 0;
  /** group → { count, userIds } */
  const members = new Map();
  /** Groups that are being joined or left. */
  const changing = new Set();
  let openNotices = [];

  const isSystem = (name) => /^-?\d+$/.test(name) && Number(name) <= 10_000;
  const nameOf = (name) => (isSystem(name) ? 'System' : name);
  const mayWrite = (thread) => !thread.left && !(thread.kind === 'user' && isSystem(thread.name));

  // ------------------------------------------------------------------------------------------------- connection

  function attach(made) {
    client = made;
    made.on('message', (frame) => client === made && take(frame));
    made.on('notice', (frame) => client === made && addNotice(frame));
    made.on('inbox', ({ upTo }) => client === made && takeDropped(upTo));
    made.on('ready', () => {
      if (client !== made) return;
      void syncGroups();
      askPresenceSoon();
      for (const thread of store.list()) void pump(thread, true);
      draw();
    });
    made.on('disconnected', () => {
      if (client !== made) return;
      presence = new Map(); // nobody knows
      draw();
    });
    for (const thread of store.list()) void pump(thread, true);
    drawNotices();
  }

  function detach() {
    saveNow();
    client = null;
    presence = new Map();
  }

  function setUser(name) {
    saveNow();
    unsaved.clear();
    store.close();
    userId = name;
    shown = null;
    receivedId = '';
    ackedId = '';
    pumping.clear();
    sentHere.clear();
    members.clear();
    changing.clear();
    openNotices = [];
    store = createPeopleStore(userId, onStored);
    drawNotices();
    draw();
  }

  // --------------------------------------------------------------------------------------------------- messages

  function take(frame) {
    const isGroup = typeof frame.group === 'string';
    const kind = isGroup ? 'group' : 'user';
    const thread = store.open(kind, isGroup ? frame.group : frame.from);
    const isNew = store.addReceived(thread, frame);
    if (compareInboxIds(frame.id, receivedId) > 0) receivedId = frame.id;
    saveSoon(thread);
    if (!isNew) return;
    const isReading = thread === shown && isAttentive();
    const from = nameOf(frame.from);
    if (isReading) announce(`${from}: ${String(frame.contents).slice(0, 1_000)}`);
    else announce(isGroup ? `New message from ${from} in ${frame.group}` : `New message from ${from}`);
    if (!isGroup && !presence.get(frame.from)) askPresenceSoon();
    if (isGroup && thread === shown && !members.get(frame.group)?.userIds.includes(frame.from))
      void askMembers(frame.group);
    draw();
  }

  function saveSoon(thread) {
    unsaved.add(thread);
    if (!saveTimer) saveTimer = setTimeout(saveNow, SAVE_MS);
  }

  /** Stores what changed; then, and only then, the inbox is told. */
  function saveNow() {
    clearTimeout(saveTimer);
    saveTimer = 0;
    for (const thread of [...unsaved]) if (store.save(thread)) unsaved.delete(thread);
    if (unsaved.size > 0 || compareInboxIds(receivedId, ackedId) <= 0) return;
    if (client && client.state !== 'closed') {
      client.ack(receivedId);
      ackedId = receivedId;
    }
  }

  /** Another tab has written a thread, or, without a key, what was dismissed. */
  function onStored(key) {
    if (key === '') drawNotices();
    else if (shown?.key === key && !store.get(key)) parts.close();
    draw();
  }

  function send(text) {
    const contents = text.trim();
    if (!shown || contents === '' || !mayWrite(shown)) return false;
    const most = client?.session?.limits?.messageBytes;
    if (most && new TextEncoder().encode(contents).length > most) {
      toast(`This message is too long: at most ${most.toLocaleString()} bytes.`);
      return false;
    }
    const message = store.addOwn(shown, contents);
    sentHere.add(message.messageId);
    newAfter = '';
    markRead(shown);
    store.save(shown);
    void pump(shown);
    drawNow();
    follow(true);
    return true;
  }

  function nextPending(thread, all) {
    return orderMessages(thread).find(
      (message) =>
        message.state === 'pending' &&
        (all || sentHere.has(message.messageId) || Date.now() - message.at > ADOPT_MS),
    );
  }

  /** Sends what is pending, one after the other. `all`: also what another tab, or an earlier page, has left. */
  async function pump(thread, all = false) {
    if (pumping.has(thread.key)) return;
    pumping.add(thread.key);
    const mine = store;
    let tries = 0;
    try {
      for (;;) {
        const used = client;
        const message = nextPending(thread, all);
        if (!message || !used || used.state === 'closed') return;
        if (Date.now() - message.at > STALE_MS) {
          endMessage(thread, message, { state: 'failed', error: { code: 'unsent' } });
          continue;
        }
        const to = thread.kind === 'group' ? { group: thread.name } : { user: thread.name };
        try {
          const sent = await used.send(to, message.contents, { messageId: message.messageId });
          if (store !== mine) return;
          tries = 0;
          endMessage(thread, message, {
            state: 'sent',
            at: idTime(sent.id) || message.at,
            online: sent.online,
          });
          if (thread.kind === 'user' && sent.online > 0 !== (presence.get(thread.name) ?? 0) > 0)
            askPresenceSoon();
        } catch (error) {
          if (store !== mine || error.code === 'closed' || error.closeCode !== undefined) return;
          if (error.temporary && ++tries < MOST_TRIES) {
            await new Promise((resolve) =>
              setTimeout(resolve, error.retryAfterMs ?? Math.min(15_000, 500 * 2 ** tries)),
            );
            if (store !== mine) return;
            continue;
          }
          tries = 0;
          endMessage(thread, message, {
            state: 'failed',
            error: { code: error.code, message: error.message, temporary: error.temporary },
          });
          if (error.code === 'forbidden' && thread.kind === 'group') void syncGroups();
        }
      }
    } finally {
      if (store === mine) pumping.delete(thread.key);
    }
  }

  function endMessage(thread, message, change) {
    Object.assign(message, { error: undefined }, change);
    sentHere.delete(message.messageId);
    store.save(thread);
    if (change.state === 'failed' && thread === shown) announce(describeFailure(message.error));
    draw();
  }

  function tryAgain(message) {
    const thread = shown;
    Object.assign(message, {
      state: 'pending',
      tries: message.tries + 1,
      at: Date.now(),
      error: undefined,
    });
    sentHere.add(message.messageId);
    store.save(thread);
    void pump(thread);
    drawNow();
    follow(true);
  }

  function discard(message) {
    Object.assign(message, { state: 'gone', contents: '', error: undefined });
    store.save(shown);
    drawNow();
    parts.focusComposer();
  }

  // ----------------------------------------------------------------------------------------------------- groups

  async function syncGroups() {
    const asked = client;
    let names;
    try {
      names = await asked.groups();
    } catch {
      return; // the next connection asks again
    }
    if (client !== asked) return;
    for (const name of names) {
      if (changing.has(name)) continue;
      const thread = store.get(threadKey('group', name)) ?? store.open('group', name);
      if (thread.left || thread.messages.length === 0) {
        thread.left = false;
        store.save(thread);
      }
    }
    for (const thread of store.list()) {
      if (thread.kind !== 'group' || thread.left || changing.has(thread.name)) continue;
      if (names.includes(thread.name)) continue;
      thread.left = true;
      store.save(thread);
    }
    if (shown?.kind === 'group' && !shown.left) void askMembers(shown.name);
    draw();
  }

  async function askMembers(group) {
    const asked = client;
    if (asked?.state !== 'ready') return;
    try {
      const { count, userIds } = await asked.members(group);
      if (client !== asked) return;
      members.set(group, { count, userIds });
      askPresenceSoon();
      draw();
    } catch {
      // Asked again with the next look.
    }
  }

  /** @throws ClientError when the server does not let */
  async function joinGroup(name) {
    changing.add(name);
    try {
      const { members: count } = await client.join(name);
      const thread = store.open('group', name);
      thread.left = false;
      store.save(thread);
      members.delete(name);
      void askMembers(name);
      draw();
      return { thread, count };
    } finally {
      changing.delete(name);
    }
  }

  async function leaveGroup(thread) {
    const { name } = thread;
    changing.add(name);
    unsaved.delete(thread);
    store.remove(thread.key);
    members.delete(name);
    if (shown === thread) parts.close();
    else draw();
    try {
      if (!thread.left) await client.leave(name);
      toast(`You left ${name}`, 'Undo', async () => {
        store.restore(thread);
        try {
          await joinGroup(name);
        } catch (error) {
          toast(describeGroupError(error));
        }
        parts.open(thread.key);
      });
    } catch (error) {
      store.restore(thread);
      draw();
      toast(describeGroupError(error));
    } finally {
      changing.delete(name);
    }
  }

  function remove(thread) {
    if (thread.kind === 'group') {
      void leaveGroup(thread);
      return;
    }
    unsaved.delete(thread);
    store.remove(thread.key);
    if (shown === thread) parts.close();
    else draw();
    toast(`${nameOf(thread.name)} removed from the list`, 'Undo', () => {
      store.restore(thread);
      parts.open(thread.key);
    });
  }

  // --------------------------------------------------------------------------------------------------- presence

  /** Several reasons to ask within a moment are one question. */
  function askPresenceSoon() {
    clearTimeout(presenceTimer);
    presenceTimer = setTimeout(askPresence, PRESENCE_SOON_MS);
  }

  async function askPresence() {
    clearTimeout(presenceTimer);
    presenceTimer = setTimeout(askPresence, PRESENCE_EVERY_MS);
    const asked = client;
    if (asked?.state !== 'ready' || document.hidden) return;
    presenceAt = Date.now();
    for (const thread of store.list()) void pump(thread);
    const wanted = new Set(
      store
        .list()
        .filter(({ kind, name }) => kind === 'user' && !isSystem(name))
        .map(({ name }) => name),
    );
    if (shown?.kind === 'group')
      for (const name of members.get(shown.name)?.userIds.slice(0, MEMBERS_ASKED) ?? []) wanted.add(name);
    const names = [...wanted].slice(0, PRESENCE_MOST);
    try {
      for (let from = 0; from < names.length; from += PRESENCE_BATCH) {
        const batch = names.slice(from, from + PRESENCE_BATCH);
        const online = await asked.presence(batch);
        if (client !== asked) return;
        for (const name of batch) presence.set(name, Object.hasOwn(online, name) ? online[name].length : 0);
      }
      draw();
    } catch {
      // Asked again in a while.
    }
  }

  function wake() {
    if (document.hidden) saveNow();
    else {
      if (shown && isAttentive()) markRead(shown);
      if (Date.now() - presenceAt > 5_000) askPresenceSoon();
      if (shown?.kind === 'group' && !shown.left) void askMembers(shown.name);
      draw();
    }
  }

  // ---------------------------------------------------------------------------------------------------- reading

  function isAttentive() {
    return !document.hidden && document.hasFocus() && isAtEnd();
  }

  function markRead(thread) {
    const latest = thread.messages.reduce(
      (highest, { id }) => (compareInboxIds(id, highest) > 0 ? id : highest),
      thread.readId,
    );
    if (latest === thread.readId) return;
    thread.readId = latest;
    saveSoon(thread);
  }

  function show(key) {
    const thread = store.get(key);
    if (!thread) return false;
    if (thread !== shown) {
      shown = thread;
      newAfter = countUnread(thread, userId) > 0 ? thread.readId || '0-0' : '';
      views = new Map();
      messages.replaceChildren();
      if (thread.kind === 'group' && !thread.left) void askMembers(thread.name);
      if (Date.now() - presenceAt > 5_000) askPresenceSoon();
    }
    drawNow();
    follow(true);
    if (newAfter !== '') parts.reveal(messages.querySelector('.day.new'));
    markRead(thread);
    drawNow();
    return true;
  }

  function hide() {
    shown = null;
    newAfter = '';
    views = new Map();
    messages.replaceChildren();
    messages.hidden = true;
    threadEmpty.hidden = true;
    dockNote.hidden = true;
    composer.hidden = false;
    draw();
  }

  // ---------------------------------------------------------------------------------------------------- drawing

  function draw() {
    if (!drawing) drawing = requestAnimationFrame(drawNow);
  }

  function drawNow() {
    cancelAnimationFrame(drawing);
    drawing = 0;
    if (shown && isAttentive()) markRead(shown);
    drawList();
    if (shown) {
      drawMessages();
      drawDock();
      onShow({ title: nameOf(shown.name), ...describeThread(shown), kind: shown.kind });
      follow(false);
    }
    onChange({ unread: store.list().reduce((sum, thread) => sum + countUnread(thread, userId), 0) });
    drawMembers();
  }

  function drawList() {
    const threads = store.list();
    // Built again only when it looks different: a click needs its button to stay.
    const key = JSON.stringify(
      threads.map((thread) => [
        thread.key,
        thread === shown,
        thread.left,
        countUnread(thread, userId),
        presence.get(thread.name),
        thread.messages.some(({ state }) => state === 'failed'),
      ]),
    );
    if (list.dataset.key === key) return;
    list.dataset.key = key;
    replaceRows(list, threads.map(buildRow), elements.addButton);
    empty.hidden = threads.length > 0;
  }

  function buildRow(thread) {
    const row = element('li', 'list-row');
    row.dataset.key = thread.key;
    const open = element('button', 'list-item person');
    open.type = 'button';
    if (thread === shown) open.setAttribute('aria-current', 'page');
    open.append(buildAvatar(thread.name, thread.kind));
    const text = element('span', 'list-text');
    text.append(isolate(nameOf(thread.name)));
    if (thread.kind === 'group')
      text.append(element('span', 'visually-hidden', thread.left ? ' (group, left)' : ' (group)'));
    else if (presence.has(thread.name))
      text.append(
        element('span', 'visually-hidden', presence.get(thread.name) > 0 ? ' (online)' : ' (offline)'),
      );
    open.append(text);
    const unread = countUnread(thread, userId);
    row.dataset.unread = String(unread);
    row.classList.toggle('left', thread.left);
    if (unread > 0) {
      const badge = element('span', 'badge', unread > 99 ? '99+' : String(unread));
      badge.append(element('span', 'visually-hidden', unread === 1 ? ' unread message' : ' unread messages'));
      open.append(badge);
    } else if (thread.messages.some(({ state }) => state === 'failed')) {
      const mark = element('span', 'badge failed', '!');
      mark.append(element('span', 'visually-hidden', ' a message was not sent'));
      open.append(mark);
    }
    open.addEventListener('click', () => parts.open(thread.key));
    const away = element('button', 'icon-button list-remove');
    away.type = 'button';
    const label = thread.kind === 'group' && !thread.left ? 'Leave' : 'Remove';
    away.setAttribute('aria-label', `${label} “${nameOf(thread.name)}”`);
    away.title = label;
    away.append(icon(label === 'Leave' ? 'leave' : 'trash'));
    away.addEventListener('click', () => remove(thread));
    row.append(open, away);
    return row;
  }

  function buildAvatar(name, kind) {
    const avatar = element('span', `avatar small${kind === 'group' ? ' group' : ''}`);
    avatar.setAttribute('aria-hidden', 'true');
    if (kind === 'group') avatar.append(icon('group'));
    else if (isSystem(name)) avatar.append(icon('notice'));
    else avatar.append(element('span', 'initials', initials(name)));
    avatar.style.setProperty('--hue', String(hueOf(name)));
    if (kind === 'user' && presence.has(name)) {
      const dot = element('span', 'presence');
      dot.dataset.online = String(presence.get(name) > 0);
      avatar.append(dot);
    }
    return avatar;
  }

  /** The line under the title, and whether it shows somebody online. */
  function describeThread(thread) {
    if (client?.state !== 'ready') return { detail: '', online: false };
    if (thread.kind === 'user') {
      if (isSystem(thread.name)) return { detail: 'Messages from this server', online: false };
      const count = presence.get(thread.name);
      if (count === undefined) return { detail: '', online: false };
      if (count === 0) return { detail: 'Offline', online: false };
      return { detail: count > 1 ? `Online, ${count} connections` : 'Online', online: true };
    }
    if (thread.left) return { detail: 'You are not in this group', online: false };
    const known = members.get(thread.name);
    if (!known) return { detail: 'Group', online: false };
    const others = known.userIds.filter((name) => name !== userId);
    const online = others.filter((name) => presence.get(name) > 0).length;
    const size = known.count === 1 ? 'Only you so far' : `${known.count.toLocaleString()} members`;
    return { detail: online > 0 ? `${size}, ${online} online` : size, online: online > 0 };
  }

  function drawMessages() {
    const ordered = orderMessages(shown);
    messages.hidden = ordered.length === 0;
    drawEmpty(ordered.length === 0);
    const nodes = [];
    let day = '';
    let before = null;
    let saidNew = newAfter === '';
    const lastSent = ordered.findLast(({ from, state }) => from === userId && state === 'sent');
    ordered.forEach((message, index) => {
      const isMine = message.from === userId;
      const isNew = !saidNew && !isMine && message.id !== '' && compareInboxIds(message.id, newAfter) > 0;
      const thisDay = dayOf(message.at);
      if (isNew || thisDay !== day) {
        const text = [thisDay === day ? '' : thisDay, isNew ? 'New' : ''].filter(Boolean).join(' · ');
        nodes.push(separator(text, isNew));
        day = thisDay;
        saidNew ||= isNew;
        before = null;
      }
      const after = ordered[index + 1];
      const isFirst = !before || !standTogether(before, message);
      const isLast = !after || dayOf(after.at) !== day || !standTogether(message, after);
      nodes.push(drawMessage(message, { isMine, isFirst, isLast, isLastSent: message === lastSent }));
      before = message;
    });
    nodes.forEach((node, index) => {
      if (messages.children[index] !== node) messages.insertBefore(node, messages.children[index] ?? null);
    });
    while (messages.children.length > nodes.length) messages.lastElementChild.remove();
    const used = new Set(nodes);
    for (const [key, view] of views) if (!used.has(view.root)) views.delete(key);
  }

  function separator(text, isNew) {
    const key = `line ${text}`;
    let view = views.get(key);
    if (!view) {
      view = { root: element('li', isNew ? 'day new' : 'day') };
      view.root.append(element('span', '', text));
      views.set(key, view);
    }
    return view.root;
  }

  function drawMessage(message, { isMine, isFirst, isLast, isLastSent }) {
    const key = `m ${message.from} ${message.messageId}`;
    let view = views.get(key);
    if (!view) {
      const root = element('li', isMine ? 'message mine' : 'message');
      const from = element('p', 'message-from');
      from.append(isMine ? 'You' : isolate(nameOf(message.from)));
      const row = element('div', 'message-row');
      const text = element('div', 'message-text');
      text.dir = 'auto';
      text.append(...linkify(message.contents));
      const meta = element('p', 'message-meta');
      row.append(text);
      root.append(from, row, meta);
      if (!isMine && shown.kind === 'group') row.prepend(buildAvatar(message.from, ''));
      view = { root, from, meta, shownMeta: '' };
      views.set(key, view);
    }
    view.root.dataset.status = message.state;
    view.root.classList.toggle('first', isFirst);
    view.root.classList.toggle('last', isLast);
    view.root.classList.toggle('in-group', shown.kind === 'group');
    view.from.className =
      isFirst && !isMine && shown.kind === 'group' ? 'message-from' : 'message-from visually-hidden';
    const signature = `${message.state} ${message.at} ${message.tries} ${isLast} ${isLastSent} ${client?.state === 'ready'}`;
    if (view.shownMeta === signature) return view.root;
    view.shownMeta = signature;
    drawMeta(view.meta, message, { isLast, isLastSent });
    return view.root;
  }

  function drawMeta(meta, message, { isLast, isLastSent }) {
    meta.replaceChildren();
    meta.hidden = false;
    switch (message.state) {
      case 'pending':
        meta.hidden = !isLast; // several in a row say it once
        meta.append(
          icon('clock'),
          client?.state === 'ready' ? 'Sending…' : 'Waiting for a connection. Your message is kept.',
        );
        return;
      case 'failed':
        meta.append(
          element('span', '', describeFailure(message.error)),
          textButton('Try again', () => tryAgain(message)),
          textButton('Discard', () => discard(message)),
        );
        return;
      default: {
        meta.hidden = !isLast && !isLastSent;
        const time = element('time', '', timeOf(message.at));
        time.dateTime = new Date(message.at).toISOString();
        time.title = new Date(message.at).toLocaleString();
        meta.append(time);
        if (isLastSent) meta.append(icon('check'), 'Sent');
      }
    }
  }

  function drawEmpty(isEmpty) {
    threadEmpty.hidden = !isEmpty;
    if (!isEmpty) return;
    const { kind, name } = shown;
    const key = `${shown.key} ${shown.left}`;
    if (threadEmpty.dataset.key === key) return;
    threadEmpty.dataset.key = key;
    const title = element('p', 'welcome-title');
    title.append(kind === 'group' ? '' : 'Write to ', isolate(nameOf(name)));
    const avatar = buildAvatar(name, kind);
    avatar.classList.replace('small', 'large');
    avatar.querySelector('.presence')?.remove();
    threadEmpty.replaceChildren(
      avatar,
      title,
      element(
        'p',
        'welcome-text',
        kind === 'group'
          ? 'Nothing was said here yet. Everyone who joins this group by its name reads along from then on.'
          : 'Messages arrive at once, or wait until their reader is back.',
      ),
    );
  }

  function drawDock() {
    const open = mayWrite(shown);
    composer.hidden = !open;
    dockNote.hidden = open;
    if (open) return;
    const key = `${shown.key} ${shown.left}`;
    if (dockNote.dataset.key === key) return;
    dockNote.dataset.key = key;
    const { name } = shown;
    if (shown.kind === 'user') {
      dockNote.replaceChildren('These messages come from the server and cannot be answered.');
      return;
    }
    dockNote.replaceChildren(
      'You are not in this group any more. ',
      textButton('Join again', async () => {
        try {
          await joinGroup(name);
          drawNow();
          parts.focusComposer();
        } catch (error) {
          toast(describeGroupError(error));
        }
      }),
    );
  }

  // ---------------------------------------------------------------------------------------------------- notices

  function addNotice({ id, messageId, contents, from, sentAt }) {
    const key = String(id ?? messageId ?? contents);
    if (openNotices.some((notice) => notice.key === key)) return;
    const sender = typeof from === 'string' && !isSystem(from) ? from : '';
    openNotices.push({ key, text: String(contents), sender, at: Number(sentAt) || Date.now() });
    openNotices = openNotices.slice(-MOST_NOTICES);
    announce(`Notice: ${String(contents).slice(0, 1_000)}`);
    drawNotices();
  }

  function takeDropped(upTo) {
    const { meta } = store;
    if (typeof upTo !== 'string' || compareInboxIds(upTo, meta.droppedUpTo) <= 0) return;
    store.meta = { ...meta, droppedUpTo: upTo };
    announce('Some older messages are no longer kept on the server.');
    drawNotices();
  }

  function drawNotices() {
    const rows = openNotices.map((notice) =>
      buildNotice(notice.text, notice.sender, notice.at, () => {
        openNotices = openNotices.filter((other) => other !== notice);
        drawNotices();
      }),
    );
    const { meta } = store;
    if (compareInboxIds(meta.droppedUpTo, meta.dismissed) > 0) {
      const row = buildNotice(
        'Some older messages were dropped: they were no longer kept when this browser came for them.',
        '',
        idTime(meta.droppedUpTo),
        () => {
          store.meta = { ...store.meta, dismissed: store.meta.droppedUpTo };
          drawNotices();
        },
      );
      row.classList.add('dropped');
      rows.push(row);
    }
    notices.replaceChildren(...rows);
    notices.hidden = rows.length === 0;
    follow(false);
  }

  function buildNotice(text, sender, at, dismiss) {
    const row = element('li', 'notice');
    const body = element('p', 'notice-text');
    body.dir = 'auto';
    if (sender) {
      const name = element('b');
      name.append(isolate(sender));
      body.append(name, ' ');
    }
    body.append(...linkify(text));
    const time = element('time', '', `${dayOf(at) === 'Today' ? '' : `${dayOf(at)}, `}${timeOf(at)}`);
    time.dateTime = new Date(at).toISOString();
    const close = element('button', 'icon-button');
    close.type = 'button';
    close.setAttribute('aria-label', 'Dismiss this notice');
    close.append(icon('close'));
    close.addEventListener('click', () => {
      dismiss();
      parts.focusComposer();
    });
    row.append(icon('notice'), body, time, close);
    return row;
  }

  // ---------------------------------------------------------------------------------------------------- dialogs

  const { addDialog, addForm, addInput, addError, addLabel, addHint, addSubmit, addCancel } = elements;
  const { membersDialog, membersList, membersTitle, membersNote, membersLeave, membersClose } = elements;
  const kindWanted = () => (new FormData(addForm).get('kind') === 'group' ? 'group' : 'user');

  function drawAddDialog() {
    const isGroup = kindWanted() === 'group';
    addLabel.textContent = isGroup ? 'Name of the group' : 'Name or user number';
    addHint.textContent = isGroup
      ? 'You join the group with this name. If there is none, it begins with you.'
      : 'As it stands at the bottom of their list. They need not be online.';
    addSubmit.textContent = isGroup ? 'Join' : 'Add';
    addError.textContent = '';
    addInput.removeAttribute('aria-invalid');
  }

  async function submitAdd() {
    const name = addInput.value.trim();
    const kind = kindWanted();
    const fault = kind === 'group' ? findGroupFault(name) : parts.findFault(name);
    if (fault || (kind === 'user' && name === userId)) {
      showAddError(fault || 'That is you.');
      return;
    }
    if (kind === 'user') {
      const thread = store.open('user', name);
      store.save(thread);
      askPresenceSoon();
      addDialog.close();
      parts.open(thread.key);
      return;
    }
    if (client?.state !== 'ready') {
      showAddError('There is no connection right now. Please try again in a moment.');
      return;
    }
    addSubmit.disabled = true;
    try {
      const { thread } = await joinGroup(name);
      addDialog.close();
      parts.open(thread.key);
    } catch (error) {
      showAddError(describeGroupError(error));
    } finally {
      addSubmit.disabled = false;
    }
  }

  function showAddError(text) {
    addError.textContent = text;
    addInput.setAttribute('aria-invalid', 'true');
    addInput.focus();
  }

  elements.addButton.addEventListener('click', () => {
    addForm.reset();
    drawAddDialog();
    addDialog.showModal();
    addInput.focus();
  });
  addForm.addEventListener('change', (event) => {
    if (event.target.name !== 'kind') return;
    drawAddDialog();
  });
  addForm.addEventListener('submit', (event) => {
    event.preventDefault();
    void submitAdd();
  });
  addCancel.addEventListener('click', () => addDialog.close());

  function openMembers() {
    if (shown?.kind !== 'group') return;
    if (!shown.left) void askMembers(shown.name);
    membersDialog.showModal();
    drawMembers();
  }

  function drawMembers() {
    if (!membersDialog.open) return;
    if (shown?.kind !== 'group') {
      membersDialog.close();
      return;
    }
    const known = members.get(shown.name);
    membersTitle.replaceChildren(isolate(shown.name));
    membersNote.textContent = shown.left
      ? 'You are not in this group any more.'
      : known
        ? known.count === 1
          ? 'Only you so far. Others join by this name.'
          : `${known.count.toLocaleString()} members`
        : 'Looking…';
    membersLeave.hidden = shown.left;
    const rank = (name) => (name === userId ? 0 : presence.get(name) > 0 ? 1 : 2);
    const names = [...(known?.userIds ?? [])].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
    const key = names.map((name) => `${name} ${presence.get(name) ?? ''}`).join();
    if (membersList.dataset.key === key) return;
    membersList.dataset.key = key;
    membersList.replaceChildren(
      ...names.slice(0, 200).map((name) => {
        const row = element('li', 'member');
        const text = element('span', 'list-text');
        text.append(isolate(name));
        const isOnline = presence.get(name) > 0;
        if (presence.has(name) && name !== userId)
          text.append(element('span', 'visually-hidden', isOnline ? ' (online)' : ' (offline)'));
        row.append(buildAvatar(name, 'user'), text);
        if (name === userId) row.append(element('span', 'member-hint', 'You'));
        else
          row.append(
            textButton('Write', () => {
              const thread = store.open('user', name);
              store.save(thread);
              membersDialog.close();
              parts.open(thread.key);
            }),
          );
        return row;
      }),
    );
    if (known && known.count > Math.min(names.length, 200))
      membersList.append(
        element(
          'li',
          'member-hint',
          `and ${(known.count - Math.min(names.length, 200)).toLocaleString()} more`,
        ),
      );
  }
  elements.membersButton.addEventListener('click', openMembers);
  membersClose.addEventListener('click', () => membersDialog.close());
  membersLeave.addEventListener('click', () => {
    const thread = shown;
    membersDialog.close();
    if (thread) void leaveGroup(thread);
  });

  presenceTimer = setTimeout(askPresence, PRESENCE_EVERY_MS);

  return {
    attach,
    detach,
    setUser,
    show,
    hide,
    send,
    wake,
    saveNow,
    draw,
    onScroll: () => shown && isAttentive() && countUnread(shown, userId) > 0 && draw(),
    has: (key) => store.get(key) !== undefined,
    get shownKey() {
      return shown?.key ?? '';
    },
    get canWrite() {
      return shown !== null && mayWrite(shown);
    },
    /** For the composer. */
    get placeholder() {
      return shown ? `Message ${nameOf(shown.name)}` : '';
    },
    get hasUnreadBelow() {
      return shown !== null && countUnread(shown, userId) > 0;
    },
  };
}

// ------------------------------------------------------------------------------------------------ small pieces

/** Replaces the rows of a list under the keyboard: who was on one that is gone goes on with its neighbour. */
export function replaceRows(list, rows, whenEmpty) {
  const focused = document.activeElement;
  const at = [...list.children].findIndex((row) => row.contains(focused));
  const { key } = list.children[at]?.dataset ?? {};
  list.replaceChildren(...rows);
  if (at < 0) return;
  const row = rows.find((other) => other.dataset.key === key) ?? rows[Math.min(at, rows.length - 1)];
  const part = focused.classList.contains('list-remove') ? '.list-remove' : '.list-item';
  (row?.querySelector(part) ?? whenEmpty).focus();
}

function standTogether(a, b) {
  return a.from === b.from && b.at - a.at < RUN_MS && a.state !== 'failed';
}

function describeFailure({ code, message, temporary } = {}) {
  switch (code) {
    case 'forbidden':
      return 'Not sent: you may not write here.';
    case 'content_refused':
      return temporary
        ? 'Not sent: it could not be checked just now. Please try again in a moment.'
        : 'Not sent: the rules of this server do not allow it.';
    case 'payload_too_large':
      return 'Not sent: it is too long.';
    case 'rate_limited':
      return 'Not sent: too many messages at once.';
    case 'unsent':
      return 'It is not certain that this was sent.';
    default:
      return `Not sent${message ? `: ${message}` : '.'}`;
  }
}

function describeGroupError({ code, message } = {}) {
  const text = String(message ?? '').replace(/^(join|leave|members): /, '');
  if (code === 'forbidden') return `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
  if (code === 'timeout') return 'The server did not answer. Please try again.';
  return text || 'That did not work.';
}

function findGroupFault(name) {
  if (name === '') return 'Please enter a name.';
  if (!/^[A-Za-z0-9._:@-]{1,64}$/.test(name)) return 'Letters, digits and . _ : @ - only, at most 64.';
  return '';
}

function dayOf(at) {
  const date = new Date(at);
  const midnight = new Date();
  midnight.setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight.getTime() - date.getTime()) / 86_400_000);
  if (days <= 0) return 'Today';
  if (days === 1) return 'Yesterday';
  if (days < 7) return date.toLocaleDateString(undefined, { weekday: 'long' });
  return date.toLocaleDateString(undefined, { day: 'numeric', month: 'long', year: 'numeric' });
}

function timeOf(at) {
  return new Date(at).toLocaleTimeString(undefined, { timeStyle: 'short' });
}

export function initials(name) {
  return name
    .replace(/^guest-/, '')
    .slice(0, 2)
    .toUpperCase();
}

export function hueOf(name) {
  let hue = 0;
  for (const character of name) hue = (hue * 31 + character.charCodeAt(0)) % 360;
  return hue;
}

/** A name that cannot turn the direction of what stands around it. */
function isolate(name) {
  return element('bdi', '', name);
}

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function textButton(label, run) {
  const button = element('button', 'text-button', label);
  button.type = 'button';
  button.addEventListener('click', run);
  return button;
}

function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  use.setAttribute('href', `#i-${name}`);
  svg.setAttribute('aria-hidden', 'true');
  svg.append(use);
  return svg;
}
