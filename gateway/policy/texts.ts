import type { PolicyRequest } from './policy.ts';

/** What a user says in a frame, history included: a word there would reach the model just the same. */
export function moderatedTexts(frame: PolicyRequest['frame']): string[] {
  if (frame.type === 'send' || !frame.history) return [frame.contents];
  return [
    ...frame.history.filter(({ role }) => role !== 'assistant').map(({ content }) => content),
    frame.contents,
  ];
}
