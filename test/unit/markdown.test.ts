import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { test } from 'node:test';

/** How the page reads Markdown, without a page. */

const module = new URL('../../gateway/public/markdown.js', import.meta.url).href;
const { parseBlocks } = (await import(module)) as {
  parseBlocks(text: string): { type: string; language?: string; code?: string }[];
};

test('a fence names its language; backticks after backticks are inline code', () => {
  const first = (text: string) => {
    const { type, language, code } = parseBlocks(text)[0]!;
    return type === 'code' ? `${language}|${code}` : type;
  };
  assert.equal(first('```  ts title\nlet a;\n```'), 'ts|let a;');
  assert.equal(first('```\na'), '|a');
  assert.equal(first('~~~ c++ `x`\na\n~~~'), 'c++|a');
  assert.equal(first('````\n```\n````'), '|```');
  assert.equal(first('``` a ` b'), 'paragraph');
  assert.equal(first('```a```'), 'paragraph');
});

test('hostile lines take no longer than their length', () => {
  // In a process that can be ended: a scan that backtracks would take minutes for these, and a linear one milliseconds.
  const script = `
    const element = () => ({ append() {}, dataset: {} });
    globalThis.document = { createElement: element };
    const { createMarkdownView } = await import(${JSON.stringify(module)});
    const gap = ' '.repeat(400_000);
    for (const text of [
      '\`\`\`' + gap + '\`',
      '\`'.repeat(400_000) + gap + '\`',
      '~'.repeat(400_000) + gap + '\u2028',
      '# ' + gap, '# a #' + gap + 'b', '- -' + gap + 'x', '-' + gap, '1.' + gap, '>' + gap + '\u2028',
      ('(https://'.repeat(110) + ']'.repeat(1_000) + 'x ').repeat(400),
    ])
      createMarkdownView(element()).update(text);`;
  execFileSync(process.execPath, ['--input-type=module', '-e', script], { timeout: 30_000 });
});
