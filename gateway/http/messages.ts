import { randomUUID } from 'node:crypto';
import { z } from 'zod';
import { type ErrorCode, RivuletError } from '../../shared/errors.ts';
import type { Groups } from '../../shared/groups.ts';
import type { MessageContents } from '../../shared/inbox.ts';
import {
  contentsSchema,
  describeIssues,
  groupIdSchema,
  IN_WORDS,
  messageIdSchema,
  parseUserId,
  userIdSchema,
} from '../../shared/protocol.ts';
import { isConnectionError } from '../../shared/redis.ts';
import type { Outcome, PostOffice } from '../post-office.ts';
import type { HttpAnswer, HttpCall } from '../socket-server.ts';
import { isApiKey } from './api-key.ts';
import { type HttpRoute, json } from './routes.ts';

/** The HTTP API for other systems: messages to people, and members of groups. */

/** Who a message is from when the caller does not say. Nobody can log in with a reserved id. */
const SYSTEM_SENDER = '0';

const recipients = {
  user: z.strictObject({ user: userIdSchema }),
  users: z.strictObject({ users: z.array(userIdSchema).min(1, 'users must not be empty') }),
  group: z.strictObject({ group: groupIdSchema }),
  all: z.strictObject({ all: z.literal(true, 'all must be true') }),
};

export const messageRequestSchema = z.strictObject({
  to: z.union([recipients.user, recipients.users, recipients.group, recipients.all]),
  contents: contentsSchema,
  messageId: messageIdSchema
    .optional()
    .meta({ description: 'Makes the call idempotent for a day; chosen for you when absent.' }),
  from: userIdSchema
    .optional()
    .meta({ description: `Who it is from; "${SYSTEM_SENDER}" (a system) when absent.` }),
});

export const messageAnswerSchema = z.strictObject({
  id: z.string().meta({ description: 'Inbox id; of the last recipient where there are several.' }),
  messageId: z.string(),
  online: z.int().min(0).meta({ description: 'Recipients with a live connection.' }),
  offline: z.int().min(0).meta({ description: 'Recipients who get it when they come online.' }),
});

export const membersRequestSchema = z.strictObject({
  group: groupIdSchema,
  add: z.array(userIdSchema).max(10_000).optional(),
  remove: z.array(userIdSchema).max(10_000).optional(),
});

export const membersAnswerSchema = z.strictObject({
  group: z.string(),
  count: z.int().min(0),
  userIds: z.array(z.string()).optional(),
});

export const errorAnswerSchema = z.strictObject({
  error: z.strictObject({ code: z.string(), message: z.string() }),
});

export interface MessageRouteParts {
  apiKeys: string[];
  office: PostOffice;
  groups: Groups;
  isDraining: () => boolean;
  messageBytes: number;
  mostUsers: number;
  onSent: () => void;
}

/** Ends a call with an error answer. */
class Refused extends Error {
  readonly answer: HttpAnswer;
  constructor(status: number, code: ErrorCode, message: string, headers: Record<string, string> = {}) {
    super(message);
    const answer = json(status, { error: { code, message } });
    this.answer = { ...answer, headers: { ...answer.headers, ...headers } };
  }
}

const unavailable = (message: string) => new Refused(503, 'internal', message, { 'retry-after': '1' });

export function createMessageRoutes(parts: MessageRouteParts): Record<string, Record<string, HttpRoute>> {
  const { office, groups } = parts;

  function guard(call: HttpCall): void {
    if (parts.apiKeys.length === 0)
      throw new Refused(404, 'forbidden', 'the HTTP API is off: API_KEYS is not set on this server');
    if (!isApiKey(call, parts.apiKeys))
      throw new Refused(401, 'unauthorized', 'an API key is needed: Authorization: Bearer <key>', {
        'www-authenticate': 'Bearer',
      });
    if (parts.isDraining())
      throw new Refused(503, 'shutting_down', 'this node is shutting down; try another one', {
        'retry-after': '1',
      });
  }

  function route(handle: (call: HttpCall) => Promise<HttpAnswer>): HttpRoute {
    return async (call) => {
      try {
        guard(call);
        return await handle(call);
      } catch (error) {
        if (error instanceof Refused) return error.answer;
        if (error instanceof RivuletError && error.code === 'invalid_frame')
          return new Refused(409, error.code, error.message).answer;
        if (!isConnectionError(error) && !(error instanceof RivuletError)) throw error;
        const message =
          error instanceof RivuletError ? error.message : 'the message store does not answer; try again';
        return unavailable(message).answer;
      }
    };
  }

  function checkUsers(field: string, users: string[]): void {
    const seen = new Set<string>();
    for (const [index, user] of users.entries()) {
      const parsed = parseUserId(user);
      if ('reason' in parsed) throw new Refused(400, 'invalid_frame', `${field}.${index}: ${parsed.reason}`);
      if (seen.has(user))
        throw new Refused(400, 'duplicate_recipient', `${field}.${index}: ${user} is named more than once`);
      seen.add(user);
    }
  }

  async function send(call: HttpCall): Promise<HttpAnswer> {
    const body = readJson(call);
    const { to, contents, from, messageId } = readRequest(body);
    const bytes = Buffer.byteLength(contents);
    if (bytes > parts.messageBytes)
      throw new Refused(
        413,
        'payload_too_large',
        `contents may have ${parts.messageBytes} bytes; these are ${bytes}`,
      );
    const message = {
      messageId: messageId ?? randomUUID(),
      from: from ?? SYSTEM_SENDER,
      contents,
      sentAt: Date.now(),
    };
    const outcome = await carry(to, message).catch((error) => {
      if (!isConnectionError(error)) throw error;
      throw unavailable(
        `the message store does not answer, so it is not known whether this was kept; sent again as messageId ${message.messageId} it ${'all' in to ? 'may be seen twice' : 'counts once'}`,
      );
    });
    parts.onSent();
    return json(202, {
      id: outcome.id,
      messageId: message.messageId,
      online: outcome.online,
      offline: outcome.offline,
    } satisfies z.infer<typeof messageAnswerSchema>);
  }

  async function carry(
    to: z.infer<typeof messageRequestSchema>['to'],
    message: MessageContents,
  ): Promise<Outcome> {
    if ('all' in to) {
      return office.toAll(message);
    }
    if ('group' in to) {
      const { group } = to;
      return office.toMany(
        to,
        async () => {
          const members = await groups.members(group);
          if (members.length === 0)
            throw new Refused(404, 'unknown_message', `to.group: group ${group} has no members`);
          return members.filter((member) => member !== message.from);
        },
        { ...message, group },
      );
    }
    if ('users' in to) {
      const { users } = to;
      if (users.length > parts.mostUsers)
        throw new Refused(
          413,
          'payload_too_large',
          `to.users may name ${parts.mostUsers} users; these are ${users.length}`,
        );
      checkUsers('to.users', users);
      return office.toMany(to, async () => users, message);
    }
    const parsed = parseUserId(to.user);
    if ('reason' in parsed) throw new Refused(400, 'invalid_frame', `to.user: ${parsed.reason}`);
    return office.toUser(to.user, message);
  }

  async function changeMembers(call: HttpCall): Promise<HttpAnswer> {
    const parsed = membersRequestSchema.safeParse(readJson(call), IN_WORDS);
    if (!parsed.success) throw new Refused(400, 'invalid_frame', describeIssues(parsed.error));
    const { group, add = [], remove = [] } = parsed.data;
    checkUsers('add', add);
    checkUsers('remove', remove);
    const removed = await groups.remove(group, remove);
    if (add.length === 0) return json(200, { group, count: removed.size });
    const added = await groups.add(group, add);
    if ('reason' in added) throw new Refused(409, 'forbidden', added.reason);
    return json(200, { group, count: added.size });
  }

  async function showMembers(call: HttpCall): Promise<HttpAnswer> {
    const parsed = groupIdSchema.safeParse(call.query.get('group') ?? undefined);
    if (!parsed.success) throw new Refused(400, 'invalid_frame', describeIssues(parsed.error));
    const members = (await groups.members(parsed.data)).sort();
    return json(200, { group: parsed.data, count: members.length, userIds: members });
  }

  return {
    '/v1/messages': { POST: route(send) },
    '/v1/groups/members': { GET: route(showMembers), POST: route(changeMembers) },
  };
}

/** For a call of the HTTP API whose body could not be read; null for all others. */
export function refuseApiBody(call: HttpCall, status: number, error: RivuletError): HttpAnswer | null {
  if (!call.path.startsWith('/v1/')) return null;
  return new Refused(status, error.code, error.message).answer;
}

function readJson(call: HttpCall): unknown {
  try {
    return JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(call.body));
  } catch {
    throw new Refused(400, 'invalid_frame', 'the body is not valid JSON');
  }
}

/** Reads the body so that a mistake in `to` is named by its field, which a union alone would not do. */
function readRequest(body: unknown): z.infer<typeof messageRequestSchema> {
  const whole = messageRequestSchema.safeParse(body, IN_WORDS);
  if (whole.success) return whole.data;
  const to = (body as { to?: unknown } | null)?.to;
  if (typeof body === 'object' && body !== null && whole.error.issues[0]?.path[0] === 'to') {
    if (to === undefined) throw new Refused(400, 'invalid_frame', 'to is missing');
    const named = Object.keys(recipients).filter(
      (key) => typeof to === 'object' && to !== null && key in to,
    ) as (keyof typeof recipients)[];
    if (named.length !== 1)
      throw new Refused(400, 'invalid_frame', 'to must have one of user, users, group, all');
    const parsed = recipients[named[0]!].safeParse(to);
    if (!parsed.success)
      throw new Refused(
        400,
        'invalid_frame',
        parsed.error.issues
          .slice(0, 3)
          .map((issue) => `to${issue.path.map((part) => `.${String(part)}`).join('')}: ${issue.message}`)
          .join('; '),
      );
  }
  throw new Refused(400, 'invalid_frame', describeIssues(whole.error));
}
