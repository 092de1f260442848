/** What the tests see of bootstrap.mjs, which stays plain JavaScript so that it can speak on old Node versions. */
export interface Tool {
  title: string;
  variable: string;
  names: string[];
  places?: string[];
  apt: string[];
  brew: string;
  service?: string;
  atLeast?: [number, number];
  otherwise: string;
}
interface LockFile {
  packages: Record<
    string,
    {
      version?: string;
      integrity?: string;
      optional?: boolean;
      os?: string[];
      cpu?: string[];
      libc?: string[];
    }
  >;
}
type Environment = Record<string, string | undefined>;

export class SetupError extends Error {}
export const TOOLS: Record<'redis' | 'chromium' | 'haproxy' | 'nginx' | 'openssl', Tool>;
export const COMMANDS: Record<
  'start' | 'test' | 'bench' | 'faults',
  { script: string; tools(args: string[], env: Environment): (keyof typeof TOOLS)[] }
>;
export function nodeProblem(node: { version: string; abi: string }): string | null;
export function platformProblem(host: { platform: string; arch: string; musl: boolean }): string | null;
export function dependencyProblem(
  lock: LockFile,
  installed: LockFile | null,
  host: { platform: string; arch: string },
): string | null;
export function describeNpmFailure(result: {
  code: number | string;
  output: string;
  missing: boolean;
}): string;
export function findTool(tool: Tool, env: Environment): string | null;
export function parseServerVersion(text: string): [number, number] | null;
export function planInstall(
  tool: Tool,
  host: { root: boolean; apt: boolean; sudo: boolean; brew: boolean },
): { how: string; file: string; args: string[]; advice?: undefined } | { advice: string };
