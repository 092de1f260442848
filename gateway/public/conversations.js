/**
 * Conversations of one user, in localStorage: one entry each, so that tabs do not overwrite each other's lists.
 * Several tabs may write the same conversation; every write reads what is stored first and keeps, turn by turn,
 * whichever side got further. Other tabs hear of it through the `storage` event.
 *
 * A turn: { id, messageId, tries, question, createdAt, askedAt, status, text, lastId, attempt, known, finishReason?, error? }
 * `status`: sending | queued | running | done | cancelled | failed. `messageId` names the generation, so that a
 * reload in the middle of an answer can go on from `lastId`.
 */

const KEPT_CONVERSATIONS = 100; // older ones are dropped
const MOST_DROPPED = 20; // to make room for one
const TITLE_LENGTH = 60;

export function createConversationStore(userId, onChange) {
  const prefix = `rivulet:${userId}:c:`;
  const conversations = new Map();
  /** Deleted here; a late write of another tab does not bring them back, neither here nor after a reload. */
  const deleted = new Set();

  for (const key of storageKeys()) {
    if (!key.startsWith(prefix)) continue;
    const stored = read(key);
    // The rest of the key is the id, or it belongs to another user, whose name begins like this one's.
    if (stored && key === prefix + stored.id) conversations.set(stored.id, stored);
  }

  const onStorage = (event) => {
    if (event.key === null) return;
    if (!event.key.startsWith(prefix)) return;
    const id = event.key.slice(prefix.length);
    if (event.newValue === null) {
      if (!conversations.delete(id)) return;
    } else if (deleted.has(id)) {
      unstore(event.key);
      return;
    } else {
      const stored = parse(event.newValue);
      if (!stored || stored.id !== id) return;
      const own = conversations.get(id);
      if (own) merge(own, stored);
      else conversations.set(id, stored);
    }
    onChange(id);
  };
  window.addEventListener('storage', onStorage);

  return {
    get: (id) => conversations.get(id),

    /** The latest first. */
    list: () => [...conversations.values()].sort((a, b) => b.updatedAt - a.updatedAt),

    /** An empty one, which is not listed and does not count before its first turn. */
    create() {
      const now = Date.now();
      return { id: newId('c'), title: '', createdAt: now, updatedAt: now, turns: [] };
    },

    addTurn(conversation, question) {
      const now = Date.now();
      const turn = {
        id: newId('t'),
        messageId: newId('m'),
        tries: 0,
        question,
        createdAt: now,
        askedAt: now,
        status: 'sending',
        text: '',
        lastId: '',
        attempt: 0,
        known: false,
      };
      conversation.turns.push(turn);
      keep(conversation, now);
      if (!conversation.title) conversation.title = makeTitle(question);
      return turn;
    },

    /** Asks the same question anew, as another generation. */
    askAgain(conversation, turn) {
      const now = Date.now();
      Object.assign(turn, {
        messageId: newId('m'),
        tries: turn.tries + 1,
        askedAt: now,
        status: 'sending',
        text: '',
        lastId: '',
        attempt: 0,
        known: false,
        finishReason: undefined,
        error: undefined,
      });
      keep(conversation, now);
    },

    /** Nothing of one that is not listed any more, be it that another tab has deleted it. */
    save(conversation) {
      if (conversations.get(conversation.id) !== conversation) return;
      const key = prefix + conversation.id;
      const stored = read(key);
      if (stored) merge(conversation, stored);
      write(key, JSON.stringify(conversation));
    },

    remove(id) {
      conversations.delete(id);
      deleted.add(id);
      unstore(prefix + id);
    },

    restore(conversation) {
      deleted.delete(conversation.id);
      conversations.set(conversation.id, conversation);
      this.save(conversation);
    },

    close: () => window.removeEventListener('storage', onStorage),
  };

  /** Also one that made room and is on screen still: a new question brings it back. */
  function keep(conversation, now) {
    conversation.updatedAt = now;
    conversations.set(conversation.id, conversation);
  }

  /**
   * When the storage is full, the oldest conversations make room, but only for what they can make room for. The open
   * page never depends on it.
   */
  function write(key, value) {
    const others = [...conversations.values()]
      .sort((a, b) => a.updatedAt - b.updatedAt)
      .map(({ id }) => prefix + id)
      .filter((other) => other !== key);
    if (put(key, value)) {
      for (const old of others.slice(0, Math.max(0, conversations.size - KEPT_CONVERSATIONS))) drop(old);
      return;
    }
    const dropped = new Map();
    for (const old of findRoom(others, value.length - (readText(key)?.length ?? 0))) {
      dropped.set(old, { conversation: conversations.get(old.slice(prefix.length)), text: readText(old) });
      drop(old);
      if (put(key, value)) return;
    }
    for (const [old, { conversation, text }] of dropped) {
      conversations.set(conversation.id, conversation);
      if (text !== null) put(old, text);
    }
  }

  /** The first of these that hold so many characters together; none where they do not. */
  function findRoom(keys, length) {
    let room = 0;
    const found = keys.slice(0, MOST_DROPPED).findIndex((key) => {
      room += readText(key)?.length ?? 0;
      return room >= length;
    });
    return keys.slice(0, found + 1);
  }

  function drop(key) {
    conversations.delete(key.slice(prefix.length));
    unstore(key);
  }
}

export function isOpen(turn) {
  return turn.status === 'sending' || turn.status === 'queued' || turn.status === 'running';
}

/** Takes from `other` what got further there. Objects of `own` stay the same objects. */
function merge(own, other) {
  own.title ||= other.title;
  own.updatedAt = Math.max(own.updatedAt, other.updatedAt);
  for (const theirs of other.turns) {
    const mine = own.turns.find((turn) => turn.id === theirs.id);
    if (!mine) own.turns.push(theirs);
    else if (isFurther(theirs, mine))
      Object.assign(mine, { finishReason: undefined, error: undefined }, theirs);
  }
  own.turns.sort((a, b) => a.createdAt - b.createdAt);
}

function isFurther(a, b) {
  if (a.tries !== b.tries) return a.tries > b.tries;
  if (isOpen(a) !== isOpen(b)) return isOpen(b);
  return compareIds(a.lastId, b.lastId) > 0 || (a.known && !b.known);
}

function compareIds(a, b) {
  const [attemptA = -1, seqA = -1] = a === '' ? [] : a.split('-').map(Number);
  const [attemptB = -1, seqB = -1] = b === '' ? [] : b.split('-').map(Number);
  return attemptA - attemptB || seqA - seqB;
}

function makeTitle(question) {
  const line = question.trim().split('\n', 1)[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}

function newId(letter) {
  const bytes = crypto.getRandomValues(new Uint8Array(10));
  return letter + Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

function storageKeys() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}

function unstore(key) {
  try {
    localStorage.removeItem(key);
  } catch {
    // Storage is off.
  }
}

/** False where it does not fit, or nothing can be stored at all. */
function put(key, value) {
  try {
    localStorage.setItem(key, value);
    return true;
  } catch {
    return false;
  }
}

function read(key) {
  return parse(readText(key));
}

function readText(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function parse(text) {
  if (!text) return null;
  try {
    const value = JSON.parse(text);
    const fits = typeof value?.id === 'string' && Array.isArray(value.turns);
    return fits ? { title: '', createdAt: 0, updatedAt: 0, ...value } : null;
  } catch {
    return null;
  }
}
