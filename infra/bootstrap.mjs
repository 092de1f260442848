/**
 * The set-up before every command of package.json: the Node version, the dependencies, the programs that a
 * command needs. Then it runs the command. Node built-ins only, and no syntax above Node 14, so that it can
 * speak on any version. With everything in place it costs a few file reads and one `redis-server --version`.
 */
import { spawn, spawnSync } from 'node:child_process';
import { accessSync, constants, existsSync, mkdirSync, readFileSync, statSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, delimiter, dirname, isAbsolute, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { readCommand, takeLock } from './process-lock.mjs';

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));

/** What each command runs, and the programs (keys of TOOLS) that must be there first. */
export const COMMANDS = {
  start: {
    script: 'infra/local.ts',
    tools: (args, env) => (env.REDIS_URL || args.length > 0 ? [] : ['redis']),
  },
  test: {
    script: 'infra/run-tests.ts',
    tools: testTools,
  },
  bench: { script: 'test/bench/main.ts', tools: () => ['redis'] },
  faults: { script: 'test/faults/main.ts', tools: () => ['redis'] },
};

/** `npm test -- unit` should not install a browser; the whole suite and anything that names it should. */
function testTools(args) {
  const runs = (...parts) =>
    args.length === 0 || parts.some((part) => args.some((arg) => arg.includes(part)));
  return [
    'redis',
    ...(runs('browser') ? ['chromium'] : []),
    ...(runs('scenarios', 'load-balancer', 'compose-commands') ? ['haproxy'] : []),
    ...(runs('scenarios', 'load-balancer') ? ['nginx'] : []),
    ...(runs('scenarios', 'load-balancer', 'redis-tls') ? ['openssl'] : []),
  ];
}

/**
 * Programs from outside npm. `apt` lists alternatives, each a set of packages; `service` is what a Debian
 * package would start by itself and must not.
 */
export const TOOLS = {
  redis: {
    title: 'Redis',
    variable: 'REDIS_SERVER',
    names: ['redis-server', 'valkey-server'],
    apt: ['redis-server', 'valkey-server'],
    brew: 'redis',
    service: 'redis-server',
    atLeast: [7, 0],
    otherwise: 'install redis-server or valkey-server, 7.0 or newer (https://redis.io/docs/install)',
  },
  chromium: {
    title: 'Chromium',
    variable: 'CHROMIUM_PATH',
    names: ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'],
    places: [
      '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
      '/Applications/Chromium.app/Contents/MacOS/Chromium',
    ],
    apt: ['chromium fonts-liberation'],
    brew: '--cask google-chrome',
    otherwise: 'install chromium or google-chrome (a part of the tests runs without it: npm test -- unit)',
  },
  haproxy: {
    title: 'HAProxy',
    variable: 'HAPROXY',
    names: ['haproxy'],
    apt: ['haproxy'],
    brew: 'haproxy',
    service: 'haproxy',
    otherwise: 'install haproxy',
  },
  openssl: {
    title: 'OpenSSL',
    variable: 'OPENSSL',
    names: ['openssl'],
    apt: ['openssl'],
    brew: 'openssl',
    otherwise: 'install openssl',
  },
  nginx: {
    title: 'nginx',
    variable: 'NGINX',
    names: ['nginx'],
    apt: ['nginx-light', 'nginx'],
    brew: 'nginx',
    service: 'nginx',
    otherwise: 'install nginx',
  },
};

/** A reason to stop that a person can act on; printed without a stack. */
export class SetupError extends Error {}

// --- Node and platform ---------------------------------------------------------------------------------------

/** `@rjweb/uws@1.5.0` ships ABI 93, 108 and 115 (Node 16, 18, 20); our code needs Node 20. */
const NODE_ABI = '115';
const NODE_MINOR = 11; // the first 20.x whose test runner has what infra/run-tests.ts uses

/** Why this Node cannot run Rivulet, with the ways to get one that can; null when it can. */
export function nodeProblem({ version, abi }) {
  const [major, minor] = version.replace(/^v/, '').split('.').map(Number);
  if (major === 20 && minor >= NODE_MINOR && abi === NODE_ABI) return null;
  const reason =
    major > 20
      ? 'Its WebSocket server, uWebSockets.js, is a native build that supports Node up to 20.'
      : major === 20 && minor >= NODE_MINOR
        ? `Its WebSocket server, uWebSockets.js, is a native build for ABI ${NODE_ABI}; this Node has ABI ${abi}.`
        : 'uWebSockets.js would run on this version, but the code needs what came with Node 20.';
  return [
    `Rivulet needs Node 20 (20.${NODE_MINOR} or a newer 20.x); this is Node ${version.replace(/^v/, '')}.`,
    ...(major < 16 ? [] : [reason]),
    'To get it, one of:',
    '  nvm install && nvm use                     nvm, https://github.com/nvm-sh/nvm (reads .nvmrc)',
    '  fnm use --install-if-missing               fnm, https://github.com/Schniz/fnm (reads .nvmrc)',
    '  brew install node@20 && brew link --overwrite node@20',
    '  curl -fsSL https://deb.nodesource.com/setup_20.x | sudo -E bash - && sudo apt-get install -y nodejs',
    '  a download from https://nodejs.org/en/download (choose v20)',
  ].join('\n');
}

const PLATFORMS = ['linux x64', 'linux arm64', 'darwin x64', 'darwin arm64'];

/** Why this machine cannot run it; null when it can. */
export function platformProblem({ platform, arch, musl }) {
  if (platform === 'win32')
    return 'Rivulet runs on Linux and macOS. On Windows, run it inside WSL 2 (https://learn.microsoft.com/windows/wsl/install).';
  if (musl)
    return 'uWebSockets.js has no build for musl libc (Alpine). Use a glibc system; in Docker, node:20-slim in place of node:20-alpine.';
  if (PLATFORMS.includes(`${platform} ${arch}`)) return null;
  return `uWebSockets.js has no build for ${platform} ${arch}. It has them for ${PLATFORMS.join(', ')}.`;
}

function usesMusl() {
  if (process.platform !== 'linux') return false;
  if (existsSync('/etc/alpine-release')) return true;
  const glibc = ['/lib64/ld-linux-x86-64.so.2', '/lib/ld-linux-aarch64.so.1'].some((path) =>
    existsSync(path),
  );
  return !glibc && ['x86_64', 'aarch64'].some((arch) => existsSync(`/lib/ld-musl-${arch}.so.1`));
}

// --- dependencies --------------------------------------------------------------------------------------------

/**
 * Why node_modules does not hold what package-lock.json asks for; null when it does. `lock` and `installed` are
 * the parsed lock files, `installed` null when there is none. Packages for other platforms may be absent.
 */
export function dependencyProblem(lock, installed, { platform, arch }) {
  if (!installed) return 'missing';
  for (const [path, wanted] of Object.entries(lock.packages)) {
    if (path === '') continue;
    const present = installed.packages[path];
    if (present) {
      if (present.version !== wanted.version || present.integrity !== wanted.integrity)
        return `changed: ${path}`;
    } else if (!wanted.optional || isForHost(wanted, platform, arch)) {
      // An optional package of this very platform is absent when node_modules came from another machine.
      return `missing: ${path}`;
    }
  }
  const extra = Object.keys(installed.packages).find(
    (path) => !lock.packages[path] && !installed.packages[path].optional,
  );
  return extra ? `removed: ${extra}` : null;
}

/** musl is not asked about: `platformProblem` refuses it. npm leaves its builds out on glibc. */
function isForHost({ os, cpu, libc }, platform, arch) {
  return Boolean(os) && allows(os, platform) && allows(cpu, arch) && allows(libc, 'glibc');
}

function allows(list, value) {
  if (!list || list.length === 0) return true;
  if (list.includes(`!${value}`)) return false;
  return list.includes(value) || list.every((entry) => entry.startsWith('!'));
}

function readJson(path) {
  try {
    return JSON.parse(readFileSync(path, 'utf8'));
  } catch {
    return null;
  }
}

function currentDependencyProblem(root) {
  const lock = readJson(join(root, 'package-lock.json'));
  if (!lock?.packages)
    throw new SetupError(
      'package-lock.json is missing or not valid JSON. Restore it: git checkout package-lock.json',
    );
  return dependencyProblem(lock, readJson(join(root, 'node_modules', '.package-lock.json')), process);
}

const NPM_OPTIONS = [
  '--include=dev', // type-check, lint and tests need them, whatever NODE_ENV says
  '--no-audit',
  '--no-fund',
  '--loglevel=error',
  '--fetch-retries=1', // a person waits: without a network, say so after seconds
  '--fetch-retry-mintimeout=1000',
  '--fetch-retry-maxtimeout=5000',
];

async function installDependencies(root) {
  if (!currentDependencyProblem(root)) return;
  const unlock = await lockInstall(root);
  try {
    const problem = currentDependencyProblem(root);
    if (!problem) return; // another start did it while we waited
    const npm = npmCommand(process.env);
    const title = problem === 'missing' ? 'Installing dependencies' : 'Updating dependencies';
    const install = (titled, ...verb) =>
      runQuietly(titled, npm.file, [...npm.args, ...verb, ...NPM_OPTIONS], { cwd: root });
    let result = await install(title, 'ci');
    // A lock file written where the registry lacked some platforms' packages is refused by `npm ci` alone.
    if (/EUSAGE/.test(result.output))
      result = await install(`${title} (npm install)`, 'install', '--no-save');
    if (result.code !== 0) throw new SetupError(describeNpmFailure(result));
    const left = currentDependencyProblem(root);
    if (left)
      throw new SetupError(
        `npm ci ended well, but node_modules is still not as package-lock.json says (${left}). Try: rm -rf node_modules && npm ci`,
      );
    try {
      createRequire(join(root, 'package.json'))('uWebSockets.js');
    } catch (error) {
      throw new SetupError(
        `uWebSockets.js does not load on this machine: ${lastLines(String(error.message || error), 1)}`,
      );
    }
  } finally {
    unlock();
  }
}

/** npm itself when it started us, so that no other version is picked from the PATH. */
function npmCommand(env) {
  const path = env.npm_execpath || '';
  if (/npm-cli\.c?js$/.test(path) && existsSync(path)) return { file: process.execPath, args: [path] };
  return { file: 'npm', args: [] };
}

/** What to say when `npm ci` failed: the network, the disk's rights, or its own last words. */
export function describeNpmFailure({ code, output, missing }) {
  if (missing) return 'npm is not on the PATH; it comes with Node 20 (https://nodejs.org/en/download).';
  const registry = /https?:\/\/[^\s/]+/.exec(output);
  if (
    /ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|ERR_SOCKET_TIMEOUT/.test(
      output,
    )
  )
    return `The dependencies could not be downloaded: ${registry ? registry[0] : 'the npm registry'} cannot be reached. Check the network or proxy (npm config get registry, HTTPS_PROXY), then run the command again.`;
  if (/EACCES|EPERM|EROFS/.test(output))
    return `npm may not write here (${ROOT}); node_modules may belong to another user. Its last words:\n${lastLines(output, 5)}`;
  if (/ENOSPC/.test(output)) return 'The disk is full: npm could not write the dependencies.';
  return `npm ci failed with code ${code}. Its last words:\n${lastLines(output, 12)}`;
}

/** One installation at a time: two commands started together on a fresh clone would break each other's. */
async function lockInstall(root) {
  const path = join(root, '.rivulet', 'install.lock');
  try {
    mkdirSync(dirname(path), { recursive: true });
  } catch (error) {
    throw new SetupError(
      `${dirname(path)} cannot be written (${error.code}): run Rivulet from a folder that is yours.`,
    );
  }
  const isOurs = (pid) => (readCommand(pid) || '').includes('bootstrap.mjs');
  for (let told = false; ; told = true) {
    const taken = await takeLock(path, isOurs).catch((error) => {
      throw new SetupError(`${path} cannot be written (${error.code}).`);
    });
    if (taken.unlock) return taken.unlock;
    if (!told) say(`Waiting for process ${taken.owner}, which is installing dependencies here…`);
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
}

function readTextOr(path, otherwise) {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return otherwise;
  }
}

// --- programs ------------------------------------------------------------------------------------------------

/** Folders that hold servers but are not on every user's PATH. */
const MORE_FOLDERS = ['/usr/local/bin', '/usr/bin', '/usr/local/sbin', '/usr/sbin', '/opt/homebrew/bin'];

/** The path of a program: from its variable, else the PATH, else a well-known place; null when there is none. */
export function findTool(tool, env) {
  const set = env[tool.variable];
  if (set) {
    const found = isAbsolute(set) || set.includes('/') ? (isProgram(set) ? set : null) : onPath(set, env);
    if (!found) throw new SetupError(`${tool.variable}=${set} is not a program that can be run.`);
    return found;
  }
  for (const name of tool.names) {
    const found = onPath(name, env);
    if (found) return found;
  }
  return (tool.places || []).find(isProgram) || null;
}

function onPath(name, env) {
  const folders = (env.PATH || '').split(delimiter).filter(Boolean);
  for (const folder of [...folders, ...MORE_FOLDERS.filter((more) => !folders.includes(more))]) {
    const path = join(folder, name);
    if (isProgram(path) && !isEmptySnapStub(path)) return path;
  }
  return null;
}

function isProgram(path) {
  try {
    accessSync(path, constants.X_OK);
    return statSync(path).isFile();
  } catch {
    return false;
  }
}

/** Ubuntu's /usr/bin/chromium-browser is a script that only asks for the snap. */
function isEmptySnapStub(path) {
  if (basename(path) !== 'chromium-browser' || existsSync('/snap/bin/chromium')) return false;
  return statSync(path).size < 10000 && readTextOr(path, '').includes('/snap/bin/chromium');
}

/** The version in what `<server> --version` printed: `v=7.0.15`; null when there is none. */
export function parseServerVersion(text) {
  const match = /\bv=(\d+)\.(\d+)(?:\.(\d+))?/.exec(text);
  return match ? [Number(match[1]), Number(match[2])] : null;
}

function versionProblem(tool, path) {
  if (!tool.atLeast) return null;
  const run = spawnSync(path, ['--version'], { encoding: 'utf8', timeout: 10000 });
  if (run.error || run.status !== 0)
    return `${path} does not run: ${run.error ? run.error.message : lastLines(run.stderr, 1)}`;
  const version = parseServerVersion(run.stdout);
  if (
    !version ||
    version[0] > tool.atLeast[0] ||
    (version[0] === tool.atLeast[0] && version[1] >= tool.atLeast[1])
  )
    return null;
  return `${path} is version ${version.join('.')}; Rivulet needs ${tool.atLeast.join('.')} or newer (streams without surprises). Newer packages: https://redis.io/docs/install, or set ${tool.variable}=/path/to/one.`;
}

/**
 * How to install a tool here: a program with arguments, or `advice` for a person when we may not or cannot.
 * `host`: `{ root, apt, sudo, brew }`, each a boolean.
 */
export function planInstall(tool, host) {
  if (host.apt && (host.root || host.sudo)) {
    const script = aptScript(tool);
    return host.root
      ? { how: 'apt-get', file: 'sh', args: ['-c', script] }
      : { how: 'sudo apt-get', file: 'sudo', args: ['-n', 'sh', '-c', script] };
  }
  if (host.brew) return { how: 'brew', file: 'brew', args: ['install', '--quiet', ...tool.brew.split(' ')] };
  const advice = host.apt
    ? `run  sudo apt-get install -y ${tool.apt[0]}${tool.service ? `  (then, to keep port free:  sudo systemctl disable --now ${tool.service})` : ''}`
    : tool.otherwise;
  return {
    advice: `${tool.title} is needed and could not be installed from here: ${advice}, or set ${tool.variable}=/path/to/it.`,
  };
}

/**
 * Debian starts a server when its package is installed, and at every boot. We run our own on another port, so
 * a temporary policy forbids the start, and the service that we brought is disabled.
 */
function aptScript(tool) {
  const install = (packages) =>
    `apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 ${packages}`;
  return [
    'export DEBIAN_FRONTEND=noninteractive',
    'policy=/usr/sbin/policy-rc.d',
    `if [ ! -e "$policy" ]; then trap 'rm -f "$policy"' EXIT; trap 'exit 130' INT TERM; printf '#!/bin/sh\\nexit 101\\n' >"$policy"; chmod 755 "$policy"; fi`,
    'apt-get update -qq -o DPkg::Lock::Timeout=120 || echo "apt-get update failed, going on with the old lists"',
    `{ ${tool.apt.map(install).join(' || ')}; } || exit 1`,
    ...(tool.service
      ? [
          `if command -v systemctl >/dev/null; then systemctl disable ${tool.service} >/dev/null 2>&1 || true; fi`,
        ]
      : []),
  ].join('\n');
}

async function ensureTool(tool, env) {
  let path = findTool(tool, env);
  if (!path) {
    const root = typeof process.getuid === 'function' && process.getuid() === 0;
    const apt = onPath('apt-get', env) !== null;
    const plan = planInstall(tool, {
      root,
      apt,
      sudo: apt && !root && spawnSync('sudo', ['-n', 'true'], { stdio: 'ignore' }).status === 0,
      brew: onPath('brew', env) !== null,
    });
    if (plan.advice) throw new SetupError(plan.advice);
    const result = await runQuietly(`Installing ${tool.title} with ${plan.how}`, plan.file, plan.args, {
      cwd: '/',
    });
    path = findTool(tool, env);
    if (!path)
      throw new SetupError(
        `${tool.title} could not be installed with ${plan.how} (code ${result.code}); please ${tool.otherwise}, or set ${tool.variable}=/path/to/it. Its last words:\n${lastLines(result.output, 6)}`,
      );
  }
  const problem = versionProblem(tool, path);
  if (problem) throw new SetupError(problem);
  return path;
}

// --- running -------------------------------------------------------------------------------------------------

function say(text) {
  process.stderr.write(`${text}\n`);
}

function lastLines(text, count) {
  return text.trim().split('\n').slice(-count).join('\n');
}

/** Runs a program with its output kept back, under one line that shows that time passes. */
function runQuietly(title, file, args, options) {
  const startedAt = Date.now();
  const live = process.stderr.isTTY;
  const seconds = () => `${Math.round((Date.now() - startedAt) / 1000)} s`;
  const draw = () => process.stderr.write(`\r${title}… ${seconds()} `);
  if (live) draw();
  else say(`${title}…`);
  const timer = live ? setInterval(draw, 1000) : null;
  return new Promise((resolve) => {
    const child = spawn(file, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    const keep = (chunk) => {
      output = (output + chunk).slice(-20000);
    };
    child.stdout.on('data', keep);
    child.stderr.on('data', keep);
    const end = (result) => {
      if (timer) clearInterval(timer);
      const outcome = result.code === 0 ? 'done' : 'failed';
      if (live) process.stderr.write(`\r${title}: ${outcome} in ${seconds()}   \n`);
      else say(`${title}: ${outcome} in ${seconds()}`);
      resolve({ output, ...result });
    };
    child.on('error', (error) => end({ code: 127, missing: error.code === 'ENOENT' }));
    child.on('close', (code, signal) => end({ code: code === null ? signal : code, missing: false }));
  });
}

/** Runs the command with our terminal, hands every signal on, and leaves as it left. */
function runCommand(script, args, env) {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ['--import', 'tsx', script, ...args], {
      cwd: ROOT,
      env,
      stdio: 'inherit',
    });
    // The terminal sends Ctrl-C to all of us and npm sends it once more: the command must take doubles for one.
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => child.kill(signal));
    watchNpm(() => child.kill('SIGTERM'));
    child.on('error', (error) => {
      say(`${script} could not be started: ${error.message}`);
      resolve(1);
    });
    child.on('exit', (code, signal) => {
      if (signal === null) return resolve(code);
      process.removeAllListeners(signal);
      process.kill(process.pid, signal);
    });
  });
}

/** A killed npm hands nothing on: what it started would run for ever. Other parents may leave as they like. */
function watchNpm(onGone) {
  const parent = process.ppid;
  if (!process.env.npm_lifecycle_event) return;
  const timer = setInterval(() => {
    if (process.ppid === parent) return;
    clearInterval(timer);
    onGone();
  }, 500);
  timer.unref();
}

async function main([name, ...args]) {
  const problem =
    nodeProblem({ version: process.version, abi: process.versions.modules }) ||
    platformProblem({ platform: process.platform, arch: process.arch, musl: usesMusl() });
  if (problem) throw new SetupError(problem);
  const command = Object.hasOwn(COMMANDS, name || '') ? COMMANDS[name] : null;
  if (!command)
    throw new SetupError(`Usage: node infra/bootstrap.mjs ${Object.keys(COMMANDS).join('|')} [arguments]`);
  await installDependencies(ROOT);
  const env = { ...process.env };
  for (const key of command.tools(args, env)) env[TOOLS[key].variable] = await ensureTool(TOOLS[key], env);
  return runCommand(command.script, args, env);
}

if (process.argv[1] && basename(process.argv[1]) === 'bootstrap.mjs') {
  main(process.argv.slice(2)).then(
    (code) => {
      process.exitCode = code;
    },
    (error) => {
      say(error instanceof SetupError ? error.message : error.stack);
      process.exitCode = 1;
    },
  );
}
