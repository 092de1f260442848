import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/**
 * The shipped ACL file for a test's Redis: the roles as they are, with known passwords, and a `default` user that may
 * do everything, for the test itself. Processes of the stack connect as their role, so a missing right fails a test.
 */
export type Role = 'gateway' | 'worker' | 'operator';

const SHIPPED = new URL('../../infra/redis-users.acl', import.meta.url);

/** Writes the file and returns the arguments for redis-server. */
export function aclArgs(dir: string): string[] {
  const path = join(dir, 'users.acl');
  const users = readFileSync(SHIPPED, 'utf8')
    .replace('user default off', 'user default on nopass ~* &* +@all')
    .replaceAll('CHANGE-ME-', 'test-');
  writeFileSync(path, users);
  return ['--aclfile', path];
}

export function urlFor(role: Role, url: string): string {
  return url.replace('://', `://${role}:test-${role}@`);
}

/** What the server has denied, as text; empty when nothing was. */
export function readDenials(log: unknown): string {
  return (log as unknown[][])
    .map((entry) => {
      const fields = new Map<string, unknown>();
      for (let index = 0; index + 1 < entry.length; index += 2)
        fields.set(String(entry[index]), entry[index + 1]);
      return `${fields.get('username')} may not use ${fields.get('reason')} ${fields.get('object')} (${fields.get('context')})`;
    })
    .join('\n');
}
