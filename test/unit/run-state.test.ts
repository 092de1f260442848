import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { lockFolder, readRunState, writeRunState } from '../../infra/run-state.ts';

test('a folder has one owner, also while it writes itself down; a lock of nobody is taken over', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'rivulet-lock-'));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  const path = join(folder, 'start.pid');
  const lock = () => lockFolder(folder, () => true);

  writeFileSync(path, ''); // its owner is between making and writing it
  const second = lock();
  writeFileSync(path, String(process.ppid));
  assert.deepEqual(await second, { owner: process.ppid });

  for (const stale of ['', '999999999', String(process.pid)]) {
    writeFileSync(path, stale);
    const taken = await lock();
    assert.ok('unlock' in taken);
    assert.equal(readFileSync(path, 'utf8'), String(process.pid));
    taken.unlock();
    assert.equal(existsSync(path), false);
  }
});

test('a lock that changed hands is left alone: by who found the old one stale, and by who had it', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'rivulet-lock-'));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  const path = join(folder, 'start.pid');
  writeFileSync(path, String(process.ppid));
  const second = await lockFolder(folder, (pid) => {
    if (pid === 1) return true;
    writeFileSync(path, '1'); // the other start takes the lock over while this one looks whose the old one is
    return false;
  });
  assert.deepEqual(second, { owner: 1 });
  rmSync(path);
  const mine = await lockFolder(folder, () => true);
  assert.ok('unlock' in mine);
  writeFileSync(path, '1');
  mine.unlock();
  assert.equal(readFileSync(path, 'utf8'), '1');
  assert.deepEqual(readdirSync(folder), ['start.pid']);
});

test('what a run leaves for the tools is for its own user: it may hold a password', (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'rivulet-run-'));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  const path = join(folder, 'run.json');
  writeFileSync(path, '{}', { mode: 0o644 }); // of a run that crashed
  const state = {
    pid: process.pid,
    startedAt: '',
    redisUrl: 'redis://u:secret@h',
    keyPrefix: 'chat',
    gateways: [],
  };
  writeRunState(folder, state);
  assert.equal(statSync(path).mode & 0o777, 0o600);
  assert.deepEqual(readRunState(folder), state);
});
