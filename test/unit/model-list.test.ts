import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createAdmission } from '../../gateway/admission.ts';
import { readGatewayConfig } from '../../gateway/config.ts';
import { createPolicies } from '../../gateway/policy/create-policies.ts';
import { createLogger } from '../../shared/logger.ts';

test('MODELS: a question that names another model is refused, before anything is kept', async () => {
  const log = createLogger('silent', {});
  const ask = async (models: string, model?: string) => {
    const { policies } = await createPolicies(readGatewayConfig({ NODE_ID: 'n1', MODELS: models }), log);
    const store = {
      inspect: async () => null, // it was never accepted
      admit: async () => ({ state: 'created', queued: { position: 0, full: false } }),
    };
    const admission = createAdmission({ policies, store, isDraining: () => false, log } as never);
    return admission.admit('u', { type: 'chat', messageId: 'm', contents: 'hi', model });
  };
  assert.deepEqual(await ask('small, large', 'dear'), {
    state: 'rejected',
    code: 'invalid_frame',
    message: 'model must be one of small, large',
    temporary: false,
  });
  for (const model of ['small', 'large', undefined])
    assert.equal((await ask('small, large', model)).state, 'created', model);
  assert.equal((await ask('', 'dear')).state, 'created');
});
