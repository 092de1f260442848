import MarkdownIt from './markdown-it.js';

/**
 * Markdown as DOM nodes: markdown-it reads it (CommonMark, tables, strikethrough, bare links), and what it finds becomes
 * elements of a short list. HTML and images are text, text only ever becomes text nodes, and links go to http and https
 * only: whatever a model writes is shown, never run. Each block finds its own direction; code is always left to right.
 *
 * While an answer streams, only its last two blocks are read again: the last one may turn out to belong to the one
 * before it (the `2` of a list becomes its second item with the dot that follows), and to none above. What does reach
 * further, a link that is defined below its use, waits for the end: then the whole text is read once more.
 */
const OPEN_BLOCKS = 2;

const reader = new MarkdownIt({ linkify: true, breaks: true }).disable('image');
reader.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
reader.validateLink = (url) => /^https?:\/\//i.test(url);

/** Text with its http(s) addresses as links; all else stays text, Markdown too. */
export function linkify(text) {
  const parts = [];
  let from = 0;
  for (const { index, lastIndex, url } of reader.linkify.match(text) ?? []) {
    if (!reader.validateLink(url)) continue;
    const link = document.createElement('a');
    pointTo(link, reader.normalizeLink(url));
    link.textContent = text.slice(index, lastIndex);
    parts.push(text.slice(from, index), link);
    from = lastIndex;
  }
  parts.push(text.slice(from));
  return parts;
}

function pointTo(link, url) {
  link.href = url;
  link.target = '_blank';
  link.rel = 'noopener noreferrer nofollow';
}

/** Shows Markdown in `container`; `update` may be called with every new piece. */
export function createMarkdownView(container) {
  /** @type {{ source: string, links: string, node: Element }[]} */
  const shown = [];
  let read = '';
  let settled = settleNothing();

  /** An element stays where it would look the same: its text may be selected, its button pressed. */
  function show(index, { source, links, tokens }) {
    const old = shown[index];
    if (old?.source === source && old.links === links) return;
    const part = document.createDocumentFragment();
    appendTokens(part, tokens);
    const node = part.firstElementChild;
    if (old) old.node.replaceWith(node);
    else container.append(node);
    shown[index] = { source, links, node };
  }

  return {
    /** `isWhole` where nothing follows any more. */
    update(text, isWhole = false) {
      const whole = text.replace(/\r\n?/g, '\n');
      if (isWhole || !whole.startsWith(read)) settled = settleNothing();
      read = whole;
      const blocks = readBlocks(whole, settled);
      for (const [index, block] of blocks.entries()) show(settled.count + index, block);
      for (const old of shown.splice(settled.count + blocks.length)) old.node.remove();
      if (!isWhole) settled = settle(whole, settled, blocks);
    },
  };
}

/** What later text cannot change: how many blocks, where they end, and the links that they define. */
function settleNothing() {
  return { count: 0, end: 0, references: {} };
}

function settle(text, { count, end, references }, blocks) {
  const more = blocks.length - OPEN_BLOCKS;
  if (more <= 0) return { count, end, references };
  const { from } = blocks[more];
  const source = text.slice(end, from);
  // Read alone, for its definitions only: one at the end of the text may still grow, and the first one counts.
  if (source.includes(']:')) reader.parse(source, { references });
  return { count: count + more, end: from, references };
}

/** The blocks below the settled ones: where each begins, its source, where its links go, its tokens. */
function readBlocks(text, { end: offset, references }) {
  const rest = text.slice(offset);
  const starts = [0]; // of lines
  for (let at = rest.indexOf('\n'); at >= 0; at = rest.indexOf('\n', at + 1)) starts.push(at + 1);
  const blocks = [];
  let tokens = [];
  for (const token of reader.parse(rest, { references: { ...references } })) {
    tokens.push(token);
    if (token.level > 0 || token.nesting > 0) continue;
    const [first, end] = tokens[0].map;
    const source = rest.slice(starts[first], starts[end]);
    blocks.push({ from: offset + starts[first], source, links: listLinks(tokens), tokens });
    tokens = [];
  }
  return blocks;
}

/** The addresses in their places: all of a block that its own source does not tell. */
function listLinks(tokens) {
  const parts = tokens.flatMap(({ children }) => children ?? []);
  return parts.map((part) => part.attrGet('href') ?? '').join(' ');
}

function appendTokens(parent, tokens) {
  const open = [parent];
  for (const token of tokens) {
    const top = open.at(-1);
    if (token.nesting < 0) open.pop();
    else if (token.nesting > 0) open.push(token.hidden ? top : openElement(top, token));
    else if (token.type === 'inline') appendTokens(top, token.children);
    else if (token.type === 'fence' || token.type === 'code_block') top.append(buildCode(token));
    else if (token.type === 'hr') top.append(document.createElement('hr'));
    else if (token.type === 'softbreak' || token.type === 'hardbreak')
      top.append(document.createElement('br'));
    else if (token.type === 'code_inline') {
      const code = document.createElement('code');
      code.dir = 'ltr';
      code.textContent = token.content;
      top.append(code);
    } else top.append(token.content);
  }
}

const ALIGNED = /^text-align:(left|right|center)$/;

/** The element that a token opens, put into its place; where its content goes. */
function openElement(parent, token) {
  switch (token.type) {
    case 'heading_open':
      return place(parent, `h${Math.min(6, Number(token.tag[1]) + 2)}`, 'auto'); // the page has its own h1 and h2
    case 'paragraph_open':
    case 'blockquote_open':
    case 'bullet_list_open':
    case 'ordered_list_open': {
      const block = place(parent, token.tag, token.level === 0 ? 'auto' : '');
      const start = token.attrGet('start');
      if (start !== null) block.start = Number(start);
      return block;
    }
    case 'table_open': {
      const frame = place(parent, 'div');
      frame.className = 'table';
      frame.tabIndex = 0; // scrollable by keyboard
      return place(frame, 'table', 'auto');
    }
    case 'th_open':
    case 'td_open': {
      const cell = place(parent, token.tag, 'auto');
      const [, side] = ALIGNED.exec(token.attrGet('style') ?? '') ?? [];
      if (side) cell.style.textAlign = side;
      return cell;
    }
    case 'link_open': {
      const link = place(parent, 'a');
      pointTo(link, token.attrGet('href'));
      return link;
    }
    case 'list_item_open':
    case 'thead_open':
    case 'tbody_open':
    case 'tr_open':
    case 'strong_open':
    case 'em_open':
    case 's_open':
      return place(parent, token.tag);
    default:
      return parent; // none that this list knows: its content alone
  }
}

function place(parent, tag, direction = '') {
  const element = document.createElement(tag);
  if (direction) element.dir = direction;
  parent.append(element);
  return element;
}

const LANGUAGE = /^[\w+#.-]{0,30}/;

function buildCode({ content, info }) {
  const figure = document.createElement('div');
  figure.className = 'code';
  const head = place(figure, 'div');
  head.className = 'code-head';
  place(head, 'span').textContent = LANGUAGE.exec(info.trim())[0] || 'code';
  const copy = place(head, 'button');
  copy.type = 'button';
  copy.className = 'text-button';
  copy.dataset.copy = 'code';
  copy.textContent = 'Copy';
  const pre = place(figure, 'pre');
  pre.tabIndex = 0; // scrollable by keyboard
  place(pre, 'code').textContent = content.replace(/\n$/, '');
  return figure;
}
