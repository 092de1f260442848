import assert from 'node:assert/strict';
import { type TestContext, test } from 'node:test';

/** What the page keeps of conversations: tabs that share one storage, and hear of each other as browsers do it. */

const PREFIX = 'rivulet:ann:c:';

interface Turn {
  id: string;
  messageId: string;
  status: string;
  text: string;
}
interface Conversation {
  id: string;
  title: string;
  updatedAt: number;
  turns: Turn[];
}
interface Store {
  get(id: string): Conversation | undefined;
  list(): Conversation[];
  create(): Conversation;
  addTurn(conversation: Conversation, question: string): Turn;
  askAgain(conversation: Conversation, turn: Turn): void;
  save(conversation: Conversation): void;
  remove(id: string): void;
  restore(conversation: Conversation): void;
}

const { createConversationStore } = (await import(
  new URL('../../gateway/public/conversations.js', import.meta.url).href
)) as { createConversationStore(userId: string, onChange: (id: string) => void): Store };

type Change = { key: string; newValue: string | null };

/** One storage for all tabs. What a tab writes reaches the others when they are told to `hear`. */
function startBrowser(t: TestContext) {
  const stored = new Map<string, string>();
  const tabs: { listener: ((event: Change) => void) | null; unheard: Change[] }[] = [];
  let writing: (typeof tabs)[number] | null = null;

  function announce(key: string, newValue: string | null): void {
    for (const tab of tabs) if (tab !== writing) tab.unheard.push({ key, newValue });
  }
  const storage = new Proxy(
    {
      getItem: (key: string) => stored.get(key) ?? null,
      setItem(key: string, value: string) {
        stored.set(key, value);
        announce(key, value);
      },
      removeItem(key: string) {
        if (stored.delete(key)) announce(key, null);
      },
    },
    {
      ownKeys: () => [...stored.keys()],
      getOwnPropertyDescriptor: () => ({ enumerable: true, configurable: true }),
    },
  );
  const globals = globalThis as Record<string, unknown>;
  globals.localStorage = storage;
  t.after(() => {
    delete globals.localStorage;
    delete globals.window;
  });

  return {
    stored: () => [...stored.keys()].map((key) => key.slice(PREFIX.length)),
    openTab() {
      const tab: (typeof tabs)[number] = { listener: null, unheard: [] };
      tabs.push(tab);
      globals.window = {
        addEventListener: (_type: string, listener: (event: Change) => void) => {
          tab.listener = listener;
        },
      };
      const store = createConversationStore('ann', () => {});
      return {
        store,
        /** Runs something as this tab: others hear of its writes, it does not. */
        run<T>(action: () => T): T {
          writing = tab;
          const result = action();
          writing = null;
          return result;
        },
        hear() {
          writing = tab;
          for (const change of tab.unheard.splice(0)) tab.listener?.(change);
          writing = null;
        },
        ask(question: string): Conversation {
          const conversation = store.create();
          store.addTurn(conversation, question);
          this.run(() => store.save(conversation));
          return conversation;
        },
      };
    },
  };
}

test('empty conversations are not listed, and take no room from others', (t) => {
  const browser = startBrowser(t);
  const tab = browser.openTab();
  const asked = Array.from({ length: 5 }, (_, index) => tab.ask(`question ${index}`));
  for (let count = 0; count < 100; count++) tab.store.create();
  assert.equal(tab.store.list().length, 5);
  const last = tab.ask('one more');
  assert.deepEqual(
    browser.stored(),
    [...asked, last].map(({ id }) => id),
  );
});

test('the oldest go above the bound; one that is on screen still comes back with a new question', (t) => {
  const browser = startBrowser(t);
  const tab = browser.openTab();
  const asked = Array.from({ length: 101 }, (_, index) => {
    const conversation = tab.store.create();
    tab.store.addTurn(conversation, `question ${index}`);
    conversation.updatedAt = index;
    tab.run(() => tab.store.save(conversation));
    return conversation;
  });
  assert.equal(browser.stored().length, 100);
  const oldest = asked[0]!;
  assert.equal(tab.store.get(oldest.id), undefined);
  tab.store.askAgain(oldest, oldest.turns[0]!);
  tab.run(() => tab.store.save(oldest));
  assert.equal(browser.stored().length, 100);
  assert.ok(browser.stored().includes(oldest.id));
  assert.ok(!browser.stored().includes(asked[1]!.id));
});

test('deleted in one tab while another writes its answer: it stays deleted', (t) => {
  const browser = startBrowser(t);
  const [one, two] = [browser.openTab(), browser.openTab()];
  const { id } = one.ask('a question');
  two.hear();
  const followed = two.store.get(id)!;
  one.run(() => one.store.remove(id));
  two.hear();
  followed.turns[0]!.text = 'more of the answer';
  two.run(() => two.store.save(followed));
  assert.deepEqual(browser.stored(), []);
});

test('deleted in one tab, written by another that has not heard of it yet: it goes again', (t) => {
  const browser = startBrowser(t);
  const [one, two] = [browser.openTab(), browser.openTab()];
  const conversation = one.ask('a question');
  const { id } = conversation;
  two.hear();
  one.run(() => one.store.remove(id));
  two.run(() => two.store.save(two.store.get(id)!));
  one.hear();
  two.hear();
  assert.deepEqual(browser.stored(), []);
  assert.deepEqual([one.store.list(), two.store.list()], [[], []]);
  one.run(() => one.store.restore(conversation));
  two.hear();
  assert.equal(two.store.get(id)!.title, 'a question', 'undo brings it back');
  assert.deepEqual(browser.stored(), [id]);
});
