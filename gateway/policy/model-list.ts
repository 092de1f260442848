import type { Policy } from './policy.ts';

/** Refuses a question that names a model which is not on the list. One that names none gets the worker's. */
export function createModelList(models: string[]): Policy {
  return {
    name: 'model-list',
    check({ frame }) {
      if (frame.type !== 'chat' || frame.model === undefined || models.includes(frame.model)) return null;
      return { code: 'invalid_frame', message: `model must be one of ${models.join(', ')}` };
    },
  };
}
