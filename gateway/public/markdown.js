/**
 * A small part of Markdown, as DOM nodes: paragraphs, headings, fenced code, lists, quotes, rules; inline code,
 * bold, italic, links. Each block finds its own direction; code is always left to right. Text only ever becomes text nodes, so whatever a model writes is shown, never run. Links go
 * to http and https only. Every scan is linear in the text: nothing here backtracks.
 *
 * While an answer streams, only the blocks that changed are built again: with text that grows at its end, the last.
 */

/** Shows Markdown in `container`; `update` may be called with every new piece. */
export function createMarkdownView(container) {
  /** @type {{ key: string, node: Node }[]} */
  const shown = [];
  return {
    update(text) {
      const blocks = parseBlocks(text);
      let same = 0;
      while (same < blocks.length && same < shown.length && blocks[same].key === shown[same].key) same++;
      for (const old of shown.splice(same)) old.node.remove();
      for (const block of blocks.slice(same)) {
        const node = buildBlock(block);
        container.append(node);
        shown.push({ key: block.key, node });
      }
    },
  };
}

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$/s; // without backticks after the first kind: that is inline code
const LANGUAGE = /^[\w+#.-]{0,30}/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const BULLET = /^( {0,12})[-*+] +(\S.*)$/;
const NUMBER = /^( {0,12})(\d{1,9})[.)] +(\S.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;

/** Splits into blocks; `key` is the block's source, for comparison. */
export function parseBlocks(text) {
  const lines = text.replaceAll('\r\n', '\n').split('\n');
  const blocks = [];
  let index = 0;
  const add = (type, from, content) =>
    blocks.push({ type, key: `${type}\n${lines.slice(from, index).join('\n')}`, ...content });

  while (index < lines.length) {
    const from = index;
    const line = lines[index];
    if (line.trim() === '') {
      index++;
      continue;
    }
    const fence = FENCE.exec(line);
    if (fence) {
      index++;
      const code = [];
      while (index < lines.length && !closesFence(lines[index], fence[1])) code.push(lines[index++]);
      index++; // the closing line, or one past the end while it streams
      add('code', from, { code: code.join('\n'), language: LANGUAGE.exec(fence[2].trim())[0] });
      continue;
    }
    const heading = HEADING.exec(line);
    if (heading) {
      index++;
      add('heading', from, { level: heading[1].length, text: heading[2].replace(/\s#+\s*$/, '') });
      continue;
    }
    if (RULE.test(line)) {
      index++;
      add('rule', from, {});
      continue;
    }
    if (QUOTE.test(line)) {
      const quoted = [];
      while (index < lines.length && QUOTE.test(lines[index])) quoted.push(QUOTE.exec(lines[index++])[1]);
      add('quote', from, { text: quoted.join('\n') });
      continue;
    }
    if (readItem(line)) {
      const items = [];
      while (index < lines.length) {
        const item = readItem(lines[index]);
        if (item && isOtherList(item, items[0])) break;
        if (item) items.push(item);
        else if (lines[index].trim() === '') {
          // A blank line goes on with the list only when another item follows.
          const next = readItem(lines[index + 1] ?? '');
          if (!next || isOtherList(next, items[0])) break;
        } else if (FENCE.test(lines[index]) || HEADING.test(lines[index])) break;
        else items.at(-1).text += `\n${lines[index].trim()}`;
        index++;
      }
      add('list', from, { items });
      continue;
    }
    const words = [];
    while (
      index < lines.length &&
      lines[index].trim() !== '' &&
      (index === from || !startsBlock(lines[index]))
    )
      words.push(lines[index++]);
    add('paragraph', from, { text: words.join('\n') });
  }
  return blocks;
}

function closesFence(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

/** Numbers after bullets, or the other way round, at the margin. */
function isOtherList(item, first) {
  return first !== undefined && item.depth <= first.depth && item.ordered !== first.ordered;
}

function startsBlock(line) {
  return (
    FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || readItem(line) !== null
  );
}

function readItem(line) {
  if (RULE.test(line)) return null;
  const bullet = BULLET.exec(line);
  if (bullet) return { depth: bullet[1].length, ordered: false, text: bullet[2] };
  const number = NUMBER.exec(line);
  return number
    ? { depth: number[1].length, ordered: true, start: Number(number[2]), text: number[3] }
    : null;
}

function buildBlock(block) {
  switch (block.type) {
    case 'code':
      return buildCode(block);
    case 'heading':
      // The page has its own h1 and h2.
      return withInline(createDirected(`h${Math.min(6, block.level + 2)}`), block.text);
    case 'rule':
      return document.createElement('hr');
    case 'quote': {
      const quote = createDirected('blockquote');
      quote.append(withInline(document.createElement('p'), block.text));
      return quote;
    }
    case 'list': {
      const list = buildList(block.items);
      list.dir = 'auto';
      return list;
    }
    default:
      return withInline(createDirected('p'), block.text);
  }
}

function createDirected(tag) {
  const element = document.createElement(tag);
  element.dir = 'auto';
  return element;
}

function buildCode({ code, language }) {
  const figure = document.createElement('div');
  figure.className = 'code';
  const head = document.createElement('div');
  head.className = 'code-head';
  const name = document.createElement('span');
  name.textContent = language || 'code';
  const copy = document.createElement('button');
  copy.type = 'button';
  copy.className = 'text-button';
  copy.dataset.copy = 'code';
  copy.textContent = 'Copy';
  head.append(name, copy);
  const pre = document.createElement('pre');
  pre.tabIndex = 0; // scrollable by keyboard
  const element = document.createElement('code');
  element.textContent = code;
  pre.append(element);
  figure.append(head, pre);
  return figure;
}

/** Nested by indentation, at most as deep as the items say. */
function buildList(items) {
  const root = buildListElement(items[0]);
  const open = [{ depth: items[0].depth, list: root }];
  for (const item of items) {
    while (open.length > 1 && item.depth < open.at(-1).depth) open.pop();
    let level = open.at(-1);
    if (item.depth >= level.depth + 2 && level.list.lastElementChild) {
      const list = buildListElement(item);
      level.list.lastElementChild.append(list);
      level = { depth: item.depth, list };
      open.push(level);
    }
    level.list.append(withInline(document.createElement('li'), item.text));
  }
  return root;
}

function buildListElement({ ordered, start }) {
  const list = document.createElement(ordered ? 'ol' : 'ul');
  if (ordered && start !== 1) list.start = start;
  return list;
}

function withInline(element, text) {
  appendInline(element, text, 0);
  return element;
}

const DEEPEST = 6; // nested emphasis; deeper is shown as it is written
const LONGEST_URL = 2_048;

/** Inline code, bold, italic and links. Each kind of mark is looked for once past the end of the last find. */
function appendInline(parent, text, depth) {
  const next = new Map(); // where each mark comes next, Infinity for nowhere
  let plain = '';
  let index = 0;
  const flush = () => {
    if (plain === '') return;
    appendText(parent, plain);
    plain = '';
  };
  /** Where a mark comes next, or -1. What was found is kept, so that hostile text cannot make it look twice. */
  const find = (mark, from) => {
    let at = next.get(mark) ?? -1;
    if (at < from) {
      at = text.indexOf(mark, from);
      next.set(mark, at < 0 ? Number.POSITIVE_INFINITY : at);
    }
    return at === Number.POSITIVE_INFINITY ? -1 : at;
  };

  while (index < text.length) {
    const character = text[index];
    if (character === '\\' && /[\\`*_[\]()#>!~-]/.test(text[index + 1] ?? '')) {
      plain += text[index + 1];
      index += 2;
      continue;
    }
    if (character === '`') {
      let length = 1;
      while (text[index + length] === '`') length++;
      const mark = '`'.repeat(length);
      const end = length <= 8 ? find(mark, index + length) : -1;
      if (end > 0) {
        flush();
        const code = document.createElement('code');
        code.dir = 'ltr';
        code.textContent = text.slice(index + length, end).replace(/^ (.*) $/s, '$1');
        parent.append(code);
        index = end + length;
      } else {
        plain += mark;
        index += length;
      }
      continue;
    }
    if ((character === '*' || character === '_') && depth < DEEPEST) {
      const mark = text[index + 1] === character ? character + character : character;
      const from = index + mark.length;
      const opens = /\S/.test(text[from] ?? '') && !(character === '_' && /\w/.test(text[index - 1] ?? ''));
      const end = opens ? find(mark, from + 1) : -1;
      const closes =
        end > 0 &&
        /\S/.test(text[end - 1]) &&
        !(character === '_' && /\w/.test(text[end + mark.length] ?? ''));
      if (closes && !text.slice(from, end).includes('\n\n')) {
        flush();
        const element = document.createElement(mark.length === 2 ? 'strong' : 'em');
        appendInline(element, text.slice(from, end), depth + 1);
        parent.append(element);
        index = end + mark.length;
        continue;
      }
      plain += mark;
      index = from;
      continue;
    }
    if (character === '[') {
      const middle = find('](', index + 1);
      const label = middle > 0 ? text.slice(index + 1, middle) : '';
      const end = label !== '' && !label.includes('[') ? find(')', middle + 2) : -1;
      const url = end > 0 ? readUrl(text.slice(middle + 2, end)) : null;
      if (url) {
        flush();
        parent.append(buildLink(url, label));
        index = end + 1;
        continue;
      }
    }
    if (
      character === 'h' &&
      /^https?:\/\/[^\s<>"'`]/.test(text.slice(index, index + 10)) &&
      !/\w/.test(text[index - 1] ?? '')
    ) {
      let raw = /^[^\s<>"'`]*/.exec(text.slice(index, index + LONGEST_URL))[0];
      while ('.,;:!?*_)]}'.includes(raw.at(-1))) raw = raw.slice(0, -1); // it belongs to the sentence
      const url = readUrl(raw);
      if (url) {
        flush();
        parent.append(buildLink(url, raw));
        index += raw.length;
        continue;
      }
    }
    plain += character;
    index++;
  }
  flush();
}

/** Line breaks of the source stay line breaks. */
function appendText(parent, text) {
  text.split('\n').forEach((line, number) => {
    if (number > 0) parent.append(document.createElement('br'));
    if (line !== '') parent.append(line);
  });
}

function readUrl(text) {
  if (text.length > LONGEST_URL || /\s/.test(text)) return null;
  try {
    const url = new URL(text);
    return url.protocol === 'http:' || url.protocol === 'https:' ? url.href : null;
  } catch {
    return null;
  }
}

function buildLink(href, label) {
  const link = document.createElement('a');
  link.href = href;
  link.textContent = label;
  link.target = '_blank';
  link.rel = 'noopener noreferrer nofollow';
  return link;
}
