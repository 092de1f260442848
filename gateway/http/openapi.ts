import { z } from 'zod';
import type { HttpAnswer } from '../socket-server.ts';
import {
  errorAnswerSchema,
  membersAnswerSchema,
  membersRequestSchema,
  messageAnswerSchema,
  messageRequestSchema,
} from './messages.ts';

/** The OpenAPI description of the HTTP API. Its schemas are made from those that read the calls. */

const schema = (type: z.ZodType, io: 'input' | 'output') => {
  const { $schema, ...rest } = z.toJSONSchema(type, { io });
  return rest;
};

const SCHEMAS = {
  MessageRequest: schema(messageRequestSchema, 'input'),
  MessageAnswer: schema(messageAnswerSchema, 'output'),
  MembersRequest: schema(membersRequestSchema, 'input'),
  MembersAnswer: schema(membersAnswerSchema, 'output'),
  Error: schema(errorAnswerSchema, 'output'),
};

type Examples = Record<string, { value: unknown }>;

const content = (name: keyof typeof SCHEMAS, examples: Examples) => ({
  'application/json': { schema: { $ref: `#/components/schemas/${name}` }, examples },
});

const failure = (description: string, code: string, message: string) => ({
  description,
  content: content('Error', { example: { value: { error: { code, message } } } }),
});

const FAILURES = {
  400: failure('A field is wrong; the message names it.', 'invalid_frame', 'contents must not be empty'),
  401: failure('No API key, or a wrong one.', 'unauthorized', 'an API key is needed'),
  404: failure('The HTTP API is off, or the group has no members.', 'forbidden', 'the HTTP API is off'),
  413: failure('Too large.', 'payload_too_large', 'contents may have 16384 bytes; these are 20000'),
  503: failure('Try again, perhaps on another node.', 'shutting_down', 'this node is shutting down'),
};

function createOpenApi(limits: { messageBytes: number; mostUsers: number }) {
  return {
    openapi: '3.1.0',
    info: {
      title: 'Rivulet HTTP API',
      version: '1',
      description: `Messages to people. Contents may have ${limits.messageBytes} bytes; a call may name ${limits.mostUsers} users.`,
    },
    components: {
      securitySchemes: { apiKey: { type: 'http', scheme: 'bearer', description: 'One of API_KEYS.' } },
      schemas: SCHEMAS,
    },
    security: [{ apiKey: [] }],
    paths: {
      '/v1/messages': {
        post: {
          operationId: 'sendMessage',
          summary: 'Sends a message to a user, several users, a group, or everyone who is online.',
          description:
            'Kept in the inboxes before it is answered, except to all, which reaches only who is online. The same messageId again is answered like the first time and delivered once; to other users, to another group or to all it is an error, to another single user another message. Of all, a user counts once for each gateway that they are connected to.',
          requestBody: {
            required: true,
            content: content('MessageRequest', {
              user: {
                value: { to: { user: '20001' }, contents: 'Your order has shipped.', messageId: 'order-7' },
              },
              users: { value: { to: { users: ['20001', '20002'] }, contents: 'The shop opens at nine.' } },
              group: { value: { to: { group: 'team' }, contents: 'Stand-up in five minutes.' } },
              all: { value: { to: { all: true }, contents: 'Maintenance at midnight.' } },
            }),
          },
          responses: {
            202: {
              description: 'Accepted and durable.',
              content: content('MessageAnswer', {
                example: { value: { id: '1700000000000-0', messageId: 'order-7', online: 1, offline: 0 } },
              }),
            },
            409: failure(
              'The messageId went to other users, to another group or to all.',
              'invalid_frame',
              'this messageId was used',
            ),
            ...FAILURES,
          },
        },
      },
      '/v1/groups/members': {
        get: {
          operationId: 'listMembers',
          summary: 'The members of a group.',
          parameters: [{ name: 'group', in: 'query', required: true, schema: { type: 'string' } }],
          responses: {
            200: {
              description: 'Its members; none for a group that nobody is in.',
              content: content('MembersAnswer', {
                example: { value: { group: 'team', count: 2, userIds: ['20001', '20002'] } },
              }),
            },
            ...FAILURES,
          },
        },
        post: {
          operationId: 'changeMembers',
          summary: 'Removes and adds members; a group exists while it has some.',
          requestBody: {
            required: true,
            content: content('MembersRequest', {
              example: { value: { group: 'team', add: ['20001'], remove: ['20003'] } },
            }),
          },
          responses: {
            200: {
              description: 'How many are in it now.',
              content: content('MembersAnswer', { example: { value: { group: 'team', count: 2 } } }),
            },
            409: failure('It would be too large, or a user is in too many groups.', 'forbidden', 'full'),
            ...FAILURES,
          },
        },
      },
    },
  };
}

/** Served as a file, to whoever asks. */
export function openApiFile(limits: { messageBytes: number; mostUsers: number }): HttpAnswer {
  return {
    status: 200,
    headers: { 'content-type': 'application/json; charset=utf-8', 'x-content-type-options': 'nosniff' },
    body: JSON.stringify(createOpenApi(limits), null, 2),
  };
}
