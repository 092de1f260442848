import MarkdownIt from './markdown-it.js';

/**
 * Markdown as DOM nodes: markdown-it reads it (CommonMark, tables, strikethrough, bare links), and what it finds becomes
 * elements of a short list. HTML and images are text, text only ever becomes text nodes, and links go to http and https
 * only: whatever a model writes is shown, never run. Each block finds its own direction; code is always left to right.
 *
 * While an answer streams, only its last block is read and built again: what comes later cannot change one before it.
 */
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
  /** @type {{ from: number, source: string, node: Node }[]} */
  let shown = [];
  let read = '';
  let references = {}; // of links, as the reader keeps them
  return {
    update(text) {
      const whole = text.replace(/\r\n?/g, '\n');
      const goesOn = whole.startsWith(read);
      const kept = goesOn ? shown.slice(0, -1) : [];
      const from = goesOn ? (shown.at(-1)?.from ?? 0) : 0;
      if (!goesOn) references = {};
      read = whole;
      const blocks = readBlocks(whole, from, references);
      let same = kept.length;
      while (shown[same] && shown[same].source === blocks[same - kept.length]?.source) same++;
      for (const old of shown.slice(same)) old.node.remove();
      shown = shown.slice(0, same);
      for (const { tokens, ...block } of blocks.slice(same - kept.length)) {
        const part = document.createDocumentFragment();
        appendTokens(part, tokens);
        const node = part.firstElementChild;
        container.append(node);
        shown.push({ ...block, node });
      }
    },
  };
}

/** The blocks from an offset on: where each begins, its source, its tokens. */
function readBlocks(text, offset, references) {
  const rest = text.slice(offset);
  const starts = [0]; // of lines
  for (let at = rest.indexOf('\n'); at >= 0; at = rest.indexOf('\n', at + 1)) starts.push(at + 1);
  const blocks = [];
  let tokens = [];
  for (const token of reader.parse(rest, references)) {
    tokens.push(token);
    if (token.level > 0 || token.nesting > 0) continue;
    const [first, end] = tokens[0].map;
    const from = offset + starts[first];
    blocks.push({ from, source: rest.slice(starts[first], starts[end]), tokens });
    tokens = [];
  }
  return blocks;
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
