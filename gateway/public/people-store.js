/**
 * Messages with people and groups of one user, in localStorage: one entry for each thread. Several tabs write the
 * same threads; every write reads what is stored first and keeps both sides' messages. Other tabs hear of it
 * through the `storage` event.
 *
 * A thread: { key, kind: 'user' | 'group', name, createdAt, readId, left, messages }. `readId` is the inbox id up to
 * which it was read. A message: { from, messageId, contents, at, id, state, tries, error? }: `id` is the inbox id
 * of what was received, '' for what was sent; `state`: received | pending | sent | failed | gone.
 */

const KEPT_THREADS = 200;
const KEPT_MESSAGES = 400; // of a thread
const KEPT_CHARACTERS = 200_000; // of a thread's texts; browsers give 5 million in all
const RANKS = { pending: 0, failed: 1, sent: 2, received: 2, gone: 3 };

export function createPeopleStore(userId, onChange) {
  const own = `rivulet:${encodeURIComponent(userId)}:`;
  const prefix = `${own}p:`;
  const metaKey = `${own}inbox`;
  const threads = new Map();
  /** Removed here; a late write of another tab does not bring them back. */
  const removed = new Set();

  for (const storageKey of storageKeys()) {
    if (!storageKey.startsWith(prefix)) continue;
    const stored = read(storageKey);
    if (stored && storageKey === prefix + stored.key) threads.set(stored.key, stored);
  }

  const onStorage = (event) => {
    if (event.key === metaKey) onChange('');
    if (!event.key?.startsWith(prefix)) return;
    const key = event.key.slice(prefix.length);
    if (event.newValue === null) {
      if (!threads.delete(key)) return;
    } else {
      const stored = parseThread(event.newValue);
      if (!stored || removed.has(key)) return;
      const mine = threads.get(key);
      if (mine) {
        merge(mine, stored);
        mine.left = stored.left;
      } else threads.set(key, stored);
    }
    onChange(key);
  };
  window.addEventListener('storage', onStorage);

  return {
    get: (key) => threads.get(key),
    /** The one with the latest message first. */
    list: () => [...threads.values()].sort((a, b) => lastAt(b) - lastAt(a)),

    /** The thread with a person or of a group, made when there is none. */
    open(kind, name) {
      const key = threadKey(kind, name);
      const there = threads.get(key);
      if (there) return there;
      removed.delete(key);
      const thread = { key, kind, name, createdAt: Date.now(), readId: '', left: false, messages: [] };
      threads.set(key, thread);
      for (const old of this.list().slice(KEPT_THREADS))
        if (old !== thread && countUnread(old, userId) === 0) this.remove(old.key);
      return thread;
    },

    addOwn(thread, contents) {
      const message = {
        from: userId,
        messageId: newId(),
        contents,
        at: Date.now(),
        id: '',
        state: 'pending',
        tries: 0,
      };
      thread.messages.push(message);
      trim(thread);
      return message;
    },

    /** Takes a `message` frame. False when it was there already. */
    addReceived(thread, { from, messageId, contents, sentAt, id }) {
      const there = thread.messages.find(
        (message) => message.messageId === messageId && message.from === from,
      );
      if (there) {
        const isNews = there.id === '';
        there.id = id; // what one sends to oneself
        return isNews && from !== userId;
      }
      thread.messages.push({
        from,
        messageId,
        contents: String(contents),
        at: idTime(id) || Number(sentAt) || Date.now(),
        id,
        state: 'received',
        tries: 0,
      });
      trim(thread);
      return true;
    },

    /** False when it could not be stored. */
    save(thread) {
      if (threads.get(thread.key) !== thread) return true;
      const key = prefix + thread.key;
      const stored = read(key);
      if (stored) merge(thread, stored);
      const makeRoom = [...threads.values()].filter((other) => other.messages.length > 20);
      for (let tries = 0; tries < 20; tries++) {
        try {
          localStorage.setItem(key, JSON.stringify(thread));
          return true;
        } catch {
          const largest = makeRoom.sort((a, b) => b.messages.length - a.messages.length)[0];
          if (!largest || largest.messages.length < 2) return false;
          trim(largest, Math.floor(largest.messages.length / 2));
          if (largest !== thread && !shrink(prefix + largest.key, largest)) return false;
        }
      }
      return false;
    },

    remove(key) {
      threads.delete(key);
      removed.add(key);
      try {
        localStorage.removeItem(prefix + key);
      } catch {
        // Nothing was stored.
      }
    },

    restore(thread) {
      removed.delete(thread.key);
      const there = threads.get(thread.key);
      if (there && there !== thread) merge(thread, there);
      threads.set(thread.key, thread);
      this.save(thread);
    },

    /** { droppedUpTo, dismissed }: inbox ids, '' for none. */
    get meta() {
      try {
        return { droppedUpTo: '', dismissed: '', ...JSON.parse(localStorage.getItem(metaKey) ?? '{}') };
      } catch {
        return { droppedUpTo: '', dismissed: '' };
      }
    },
    set meta(value) {
      try {
        localStorage.setItem(metaKey, JSON.stringify(value));
      } catch {
        // Not remembered.
      }
    },

    close: () => window.removeEventListener('storage', onStorage),
  };
}

export function threadKey(kind, name) {
  return `${kind === 'group' ? 'g' : 'u'}:${name}`;
}

/** In the order of reading: confirmed ones by the server's time, then what is on its way. */
export function orderMessages(thread) {
  return thread.messages.filter((message) => message.state !== 'gone').sort(compareMessages);
}

export function countUnread(thread, userId) {
  let count = 0;
  for (const { id, from } of thread.messages)
    if (id !== '' && from !== userId && compareInboxIds(id, thread.readId) > 0) count++;
  return count;
}

/** `<ms>-<seq>`; '' is below every id. */
export function compareInboxIds(a, b) {
  if (a === b) return 0;
  if (a === '') return -1;
  if (b === '') return 1;
  const [aMs, aSeq] = a.split('-').map(Number);
  const [bMs, bSeq] = b.split('-').map(Number);
  return aMs - bMs || aSeq - bSeq;
}

/** The server's clock, ms; 0 when the id is none. */
export function idTime(id) {
  return Number.parseInt(id, 10) || 0;
}

function lastAt(thread) {
  return thread.messages.reduce((latest, { at }) => Math.max(latest, at), thread.createdAt);
}

function compareMessages(a, b) {
  const waits = Number(a.state === 'pending') - Number(b.state === 'pending');
  return waits || a.at - b.at || compareInboxIds(a.id, b.id);
}

function trim(thread, most = KEPT_MESSAGES) {
  const ordered = [...thread.messages].sort(compareMessages);
  let characters = 0;
  let from = ordered.length;
  while (from > 0 && ordered.length - from < most) {
    characters += ordered[from - 1].contents.length;
    if (characters > KEPT_CHARACTERS && from < ordered.length) break;
    from--;
  }
  if (from > 0) thread.messages = ordered.slice(from);
}

/** Objects of `mine` stay the same objects. */
function merge(mine, theirs) {
  mine.createdAt = Math.min(mine.createdAt, theirs.createdAt);
  if (compareInboxIds(theirs.readId, mine.readId) > 0) mine.readId = theirs.readId;
  const known = new Map(mine.messages.map((message) => [`${message.from} ${message.messageId}`, message]));
  for (const message of theirs.messages) {
    const there = known.get(`${message.from} ${message.messageId}`);
    if (!there) mine.messages.push(message);
    else if (isFurther(message, there)) Object.assign(there, { error: undefined }, message);
  }
  trim(mine);
}

function isFurther(a, b) {
  if (a.state === 'gone' || b.state === 'gone') return a.state === 'gone';
  if (RANKS[a.state] === 2 || RANKS[b.state] === 2) return RANKS[a.state] > RANKS[b.state] || a.id > b.id;
  if (a.tries !== b.tries) return a.tries > b.tries;
  return RANKS[a.state] > RANKS[b.state];
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return `p${Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')}`;
}

function shrink(key, thread) {
  try {
    localStorage.setItem(key, JSON.stringify(thread));
    return true;
  } catch {
    return false;
  }
}

function storageKeys() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}

function read(key) {
  try {
    return parseThread(localStorage.getItem(key));
  } catch {
    return null;
  }
}

/** Whatever wrote it: only what has the right shape is taken. */
function parseThread(text) {
  if (!text) return null;
  try {
    const value = JSON.parse(text);
    if (value?.kind !== 'user' && value?.kind !== 'group') return null;
    if (typeof value.name !== 'string' || value.key !== threadKey(value.kind, value.name)) return null;
    if (!Array.isArray(value.messages)) return null;
    const messages = value.messages.filter(
      (message) =>
        typeof message?.messageId === 'string' &&
        typeof message.from === 'string' &&
        typeof message.contents === 'string' &&
        typeof message.id === 'string' &&
        typeof message.at === 'number' &&
        message.state in RANKS,
    );
    return { createdAt: 0, readId: '', left: false, ...value, messages };
  } catch {
    return null;
  }
}
