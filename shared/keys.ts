/**
 * Every key name. Braces are hash tags: what one script touches lives in one Cluster slot, either the user's
 * or the node's. User and message ids cannot hold braces (see `protocol.ts`), so a tag cannot be forged.
 */
export interface Keys {
  readonly prefix: string;
  /** Stream: requests admitted by a gateway, read through the group `workers`. */
  requests(node: string): string;
  /** Sorted set: requests that wait out a backoff, score = due time in ms. */
  retries(node: string): string;
  /** Stream: requests that used up their attempts. */
  dead(node: string): string;
  /** Stream: frames for the sockets of a gateway. */
  replies(node: string): string;
  /** Hash: the record of a generation. */
  generation(user: string, messageId: string): string;
  /** Stream: the log of a generation, ids `<attempt>-<seq>`. */
  log(user: string, messageId: string): string;
  /** Hash: open generations of a user, message id → conversation id (or empty). */
  active(user: string): string;
  /** String: the generation that a chat of the AI SDK has, until a client has had all of it. */
  aiChat(user: string, chat: string): string;
  /** String: the last stop of that chat, for questions that are on their way in. No chat id holds a slash. */
  aiStop(user: string, chat: string): string;
  /** Hash: gateways with their leases. */
  nodes(): string;
  /** Hash: workers with their leases and what they run. */
  workers(): string;
  /** Stream: messages from people and systems. */
  inbox(user: string): string;
  /** Hash: how far each device of a user has acknowledged, how far the inbox was dropped, and its highest id. */
  cursors(user: string): string;
  /** Hashes: fingerprints of the messages that an inbox took, the newer and the older ones. */
  seen(user: string): string;
  seenBefore(user: string): string;
  /** Hash: connection → where it is. */
  connections(user: string): string;
  /** Hash: ban, lock and quota of a user, as an administrator set them. */
  access(user: string): string;
  /** Hash: conversations that a user has begun today. */
  quota(user: string): string;
  /** String: the outcome of a message to many, for its repetition. */
  sent(from: string, messageId: string): string;
  /** Set: members of a group. */
  group(group: string): string;
  /** Set: groups of a user. */
  groups(user: string): string;
  /** Stream: what administrators did. */
  audit(): string;
}

/** Builds the key names under one prefix, for example `chat:`. */
export function createKeys(prefix: string): Keys {
  return {
    prefix,
    requests: (node) => `${prefix}req:{${node}}`,
    retries: (node) => `${prefix}retry:{${node}}`,
    dead: (node) => `${prefix}dead:{${node}}`,
    replies: (node) => `${prefix}reply:{${node}}`,
    generation: (user, messageId) => `${prefix}gen:{${user}}:${messageId}`,
    log: (user, messageId) => `${prefix}log:{${user}}:${messageId}`,
    active: (user) => `${prefix}active:{${user}}`,
    aiChat: (user, chat) => `${prefix}ai:{${user}}:${chat}`,
    aiStop: (user, chat) => `${prefix}ai:{${user}}:stop/${chat}`,
    nodes: () => `${prefix}nodes`,
    workers: () => `${prefix}workers`,
    inbox: (user) => `${prefix}inbox:{${user}}`,
    cursors: (user) => `${prefix}cursors:{${user}}`,
    seen: (user) => `${prefix}seen:{${user}}`,
    seenBefore: (user) => `${prefix}seen-before:{${user}}`,
    connections: (user) => `${prefix}conns:{${user}}`,
    access: (user) => `${prefix}access:{${user}}`,
    quota: (user) => `${prefix}quota:{${user}}`,
    sent: (from, messageId) => `${prefix}sent:{${from}}:${messageId}`,
    group: (group) => `${prefix}group:{${group}}`,
    groups: (user) => `${prefix}groups:{${user}}`,
    audit: () => `${prefix}audit`,
  };
}
