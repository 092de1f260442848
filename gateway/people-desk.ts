import { ERRORS, type ErrorCode } from '../shared/errors.ts';
import type { Groups } from '../shared/groups.ts';
import { type Inboxes, parseInboxId } from '../shared/inbox.ts';
import type { Keys } from '../shared/keys.ts';
import { type LiveNodes, readPresence } from '../shared/presence.ts';
import { type ClientFrameOf, parseUserId, type ServerFrame } from '../shared/protocol.ts';
import { type RedisConnection, retrying } from '../shared/redis.ts';
import { checkPolicies, type Policy, type Refusal } from './policy/policy.ts';
import type { PostOffice } from './post-office.ts';

/** Answers the frames about people: send, ack, join, leave, members, groups, presence. */

export type PeopleFrame = ClientFrameOf<
  'send' | 'ack' | 'join' | 'leave' | 'members' | 'groups' | 'presence'
>;

export interface PeopleDeskParts {
  redis: RedisConnection;
  keys: Keys;
  inboxes: Inboxes;
  groups: Groups;
  office: PostOffice;
  live: () => LiveNodes;
  policies: Policy[];
  /** Whether clients may join and leave by themselves. */
  groupsAreOpen: boolean;
  messageBytes: number;
  counters: { sent(): void; refused(code: ErrorCode): void };
}

const MEMBERS_SHOWN = 1_000;

export function createPeopleDesk(parts: PeopleDeskParts) {
  const { inboxes, groups, office, live, counters } = parts;

  async function send(user: string, frame: ClientFrameOf<'send'>): Promise<ServerFrame> {
    const { messageId, to, contents } = frame;
    const reject = (code: ErrorCode, extra: Omit<Refusal, 'code'> = {}): ServerFrame => {
      counters.refused(code);
      return { type: 'rejected', messageId, code, ...ERRORS[code], ...extra };
    };
    if (Buffer.byteLength(contents) > parts.messageBytes)
      return reject('payload_too_large', { message: `contents may have ${parts.messageBytes} bytes` });
    const message = { messageId, from: user, contents, sentAt: Date.now() };
    if ('user' in to) {
      const parsed = parseUserId(to.user);
      if ('reason' in parsed) return reject('invalid_frame', { message: `to.user: ${parsed.reason}` });
    } else if (!(await groups.has(to.group, user))) {
      return reject('forbidden', { message: `only members may write to group ${to.group}` });
    }
    const refusal = await checkPolicies(parts.policies, { userId: user, frame });
    if (refusal) {
      const { code, ...extra } = refusal;
      return reject(code, extra);
    }
    const outcome =
      'user' in to
        ? await office.toUser(to.user, message)
        : await office.toMany(
            to,
            async () => (await groups.members(to.group)).filter((member) => member !== user),
            { ...message, group: to.group },
          );
    counters.sent();
    return { type: 'sent', messageId, id: outcome.id, online: outcome.connections };
  }

  return {
    /** The answer, or null where there is none. */
    async handle(user: string, device: string, frame: PeopleFrame): Promise<ServerFrame | null> {
      switch (frame.type) {
        case 'send':
          return send(user, frame);
        case 'ack': {
          const id = parseInboxId(frame.id);
          if (!id) return { type: 'error', code: 'invalid_frame', message: 'id must be an inbox id' };
          await inboxes.ack(user, device, id);
          return null;
        }
        case 'join':
        case 'leave': {
          const { group } = frame;
          if (!parts.groupsAreOpen)
            return {
              type: 'error',
              code: 'forbidden',
              message: `${frame.type}: groups are managed by the operators of this server`,
            };
          if (frame.type === 'leave') {
            await groups.remove(group, [user]);
            return { type: 'left', group };
          }
          const added = await retrying(() => groups.add(group, [user]));
          if ('reason' in added)
            return { type: 'error', code: 'forbidden', message: `join: ${added.reason}` };
          return { type: 'joined', group, members: added.size };
        }
        case 'members': {
          const { group } = frame;
          if (!(await groups.has(group, user)))
            return { type: 'error', code: 'forbidden', message: `members: you are not in group ${group}` };
          return { type: 'members', group, ...(await groups.show(group, MEMBERS_SHOWN)) };
        }
        case 'groups':
          return { type: 'groups', groups: await groups.groupsOf(user) };
        case 'presence': {
          const userIds = [...new Set(frame.userIds)];
          const connections = await retrying(() => readPresence(parts, userIds, live()));
          const there = userIds.map((userId, index) => {
            return [userId, connections[index]!.map(({ device, node }) => ({ device, node }))] as const;
          });
          const online = Object.fromEntries(there.filter(([, devices]) => devices.length > 0)); // `__proto__` is a user id too
          return { type: 'presence', userIds: frame.userIds, online };
        }
        default:
          return frame satisfies never;
      }
    },
  };
}

export type PeopleDesk = ReturnType<typeof createPeopleDesk>;
