import { setTimeout as wait } from 'node:timers/promises';
import { z } from 'zod';
import { RivuletError } from '../../shared/errors.ts';
import { describeIssues, type Usage } from '../../shared/protocol.ts';
import type { Handler, HandlerRequest, HandlerResult } from '../handler.ts';
import { fitConversation } from './context-budget.ts';
import { errorFromNetwork, errorFromStatus, errorFromStream } from './openai-errors.ts';
import {
  type CompletionEvent,
  createCompletionReader,
  isEventStream,
  readWholeCompletion,
} from './openai-stream.ts';

/**
 * Answers through any OpenAI-compatible chat-completions endpoint, streaming.
 *
 * One call: send → (headers) → wait for the first token → tokens → finish reason → trailer (usage, `[DONE]`).
 * Up to the finish reason, silence, a cut connection and nonsense are errors; after it the answer is complete,
 * and nothing in the trailer can fail it any more. Time in which the reader of this generator is busy does not
 * count as silence of the model.
 */
export interface OpenAiOptions {
  /** See `chatCompletionsUrl`. */
  baseUrl: string;
  apiKey?: string | undefined;
  /** Used when the request names none. */
  model?: string | undefined;
  systemPrompt?: string | undefined;
  /** Tokens that system prompt, history and question may take together. */
  contextTokens: number;
  timeouts: OpenAiTimeouts;
  /** For tests; Node's own by default. */
  fetch?: typeof fetch;
}

export interface OpenAiTimeouts {
  /** From sending the request to the first token, reasoning included. */
  firstTokenMs: number;
  betweenTokensMs: number;
}

/** How long a finished answer waits for its usage and `[DONE]`, ms. Some servers leave the connection open. */
const TRAILER_MS = 2_000;
/** How long the body may take to end after `[DONE]`, ms: less than a new connection would. */
const LINGER_MS = 20;
/** How much is read of an error, and of an answer that came without streaming, bytes. */
const LONGEST_ERROR_BODY = 65_536;
const LONGEST_WHOLE_ANSWER = 4_194_304;

/** Makes the handler. Its only memory between calls is whether this server accepts `stream_options`. */
export function createOpenAiHandler(options: OpenAiOptions): Handler {
  const url = chatCompletionsUrl(options.baseUrl);
  const send = options.fetch ?? fetch;
  const headers = {
    'content-type': 'application/json',
    accept: 'text/event-stream',
    ...(options.apiKey ? { authorization: `Bearer ${options.apiKey}` } : {}),
  };
  let asksForUsage = true;

  return async function* answer(request, context) {
    const { messages, dropped } = await fitConversation(
      { systemPrompt: options.systemPrompt, history: request.history, question: request.contents },
      options.contextTokens,
    );
    if (dropped > 0) context.log.debug({ messageId: request.messageId, dropped }, 'history trimmed');
    const model = request.model ?? options.model;
    const body = { ...(model ? { model } : {}), messages, stream: true, ...chosenParameters(request) };

    const call = openCall(context.signal, options.timeouts);
    const post = (withUsage: boolean) =>
      call.waitFor(() =>
        send(url, {
          method: 'POST',
          headers: context.trace ? { ...headers, traceparent: context.trace } : headers,
          body: JSON.stringify(withUsage ? { ...body, stream_options: { include_usage: true } } : body),
          signal: call.signal,
          // A redirect would turn the POST into a GET; the operator should name the right address.
          redirect: 'manual',
        }),
      );
    try {
      const withUsage = asksForUsage;
      let response = await post(withUsage);
      if (withUsage && (response.status === 400 || response.status === 422)) {
        const refusal = await readBody(response, LONGEST_ERROR_BODY, call);
        if (!/stream_options|include_usage/.test(refusal))
          throw errorFromStatus(response.status, response.headers, refusal, options.apiKey);
        const { status } = response;
        response = await post(false);
        // A refusal may quote the user, who may have named a model `include_usage`: only the call without it tells.
        if (response.ok && asksForUsage) {
          context.log.info({ status }, 'the model server refuses stream_options; usage is off');
          asksForUsage = false;
        }
      }
      if (!response.ok) {
        // A refusal counts even when its text cannot be read.
        const refusal = await readBody(response, LONGEST_ERROR_BODY, call).catch((error) => {
          if (call.signal.aborted) throw error;
          return '';
        });
        throw errorFromStatus(response.status, response.headers, refusal, options.apiKey);
      }
      return yield* relay(response, call, options.apiKey);
    } finally {
      call.close();
    }
  };
}

/**
 * The address that is called. `/chat/completions` is added unless it is there already; before it, `/v1` unless
 * the path has a version segment of its own. A trailing slash makes no difference. So these are the same:
 * `http://host:11434`, `http://host:11434/`, `http://host:11434/v1`, `http://host:11434/v1/chat/completions`;
 * `https://host/compatible-mode/v1` and `https://host/v1beta/openai` are used as they are. For a server without
 * a version, give the whole address up to `/chat/completions`.
 */
export function chatCompletionsUrl(baseUrl: string): string {
  const url = new URL(baseUrl);
  let path = url.pathname.replace(/\/+$/, '');
  if (!path.endsWith('/chat/completions')) {
    if (!/\/v\d[^/]*(\/|$)/.test(path)) path += '/v1';
    path += '/chat/completions';
  }
  url.pathname = path;
  url.hash = '';
  return url.href;
}

/** What a user may choose. Anything else (tools, n, logprobs, …) would change the shape or the price of an answer. */
const parametersSchema = z.object({
  temperature: z.number().optional(),
  top_p: z.number().optional(),
  top_k: z.int().optional(),
  min_p: z.number().optional(),
  max_tokens: z.int().min(1).optional(),
  max_completion_tokens: z.int().min(1).optional(),
  stop: z.union([z.string(), z.array(z.string()).max(16)]).optional(),
  seed: z.int().optional(),
  presence_penalty: z.number().optional(),
  frequency_penalty: z.number().optional(),
  reasoning_effort: z.string().max(32).optional(),
});

function chosenParameters({ parameters }: HandlerRequest): z.infer<typeof parametersSchema> {
  const parsed = parametersSchema.safeParse(parameters ?? {});
  if (parsed.success) return parsed.data;
  throw new RivuletError('invalid_frame', `parameters.${describeIssues(parsed.error)}`, {
    temporary: false,
  });
}

/**
 * One HTTP call under its limits. `signal` aborts with the reason: the caller's, or a `model_timeout`. Only
 * `waitFor` counts as waiting for the model; `progress` grants the time between tokens anew.
 */
interface Call {
  readonly signal: AbortSignal;
  waitFor<T>(wait: () => Promise<T>): Promise<T>;
  progress(): void;
  /** The answer is complete: from here on, silence is not an error but the end. */
  finish(): void;
  close(): void;
}

function openCall(parent: AbortSignal, timeouts: OpenAiTimeouts): Call {
  parent.throwIfAborted();
  const controller = new AbortController();
  const { signal } = controller;
  const onParentAbort = () => controller.abort(parent.reason);
  parent.addEventListener('abort', onParentAbort, { once: true });
  const timeout = (message: string) =>
    controller.abort(new RivuletError('model_timeout', message, { temporary: true }));
  let allowance = timeouts.firstTokenMs;
  let silence = `The model sent no token within ${timeouts.firstTokenMs} ms.`;

  return {
    signal,
    async waitFor(wait) {
      const since = performance.now();
      const timer = setTimeout(() => timeout(silence), allowance);
      try {
        signal.throwIfAborted();
        return await wait();
      } catch (error) {
        // The abort is the cause, whatever it looks like from inside the HTTP client.
        throw signal.aborted ? signal.reason : errorFromNetwork(error);
      } finally {
        clearTimeout(timer);
        allowance = Math.max(0, allowance - (performance.now() - since));
      }
    },
    progress() {
      allowance = timeouts.betweenTokensMs;
      silence = `The model fell silent for ${timeouts.betweenTokensMs} ms in the middle of its answer.`;
    },
    finish() {
      allowance = Math.min(TRAILER_MS, timeouts.betweenTokensMs);
    },
    close() {
      parent.removeEventListener('abort', onParentAbort);
      // Ends the request if it still runs, and is nothing to a finished one: its connection is used again.
      controller.abort();
    },
  };
}

/** Yields the text of a response and returns how it ended. */
async function* relay(
  response: Response,
  call: Call,
  apiKey: string | undefined,
): AsyncGenerator<string, HandlerResult> {
  let usage: Usage | undefined;
  let finishReason: string | undefined;
  let hasText = false;
  let ended = false;

  try {
    for await (const events of completionEvents(response, call)) {
      for (const event of events) {
        switch (event.type) {
          case 'text':
            call.progress();
            hasText = true;
            yield event.text;
            call.signal.throwIfAborted();
            break;
          case 'progress':
            call.progress();
            break;
          case 'finish':
            // OpenRouter's way of saying that its own provider broke off.
            if (event.finishReason === 'error') throw errorFromStream(undefined, apiKey);
            finishReason = event.finishReason;
            call.finish();
            break;
          case 'usage':
            usage = event.usage;
            break;
          case 'end':
            ended = true;
            break;
          case 'error':
            throw errorFromStream(event.error, apiKey);
          case 'malformed':
            throw new RivuletError('model_error', `The model server sent nonsense: ${event.reason}.`, {
              temporary: true,
            });
          default:
            event satisfies never;
        }
      }
    }
  } catch (error) {
    // After the finish reason only the user's own abort still counts.
    if (finishReason === undefined || isForeignAbort(error, call)) throw error;
  }

  if (finishReason === undefined && !ended)
    throw new RivuletError('model_error', 'The connection to the model server was cut in the middle.', {
      temporary: true,
    });
  if (!hasText && finishReason !== 'content_filter')
    throw new RivuletError(
      'model_error',
      `The model gave an empty answer (${finishReason ?? 'no reason'}).`,
      // Its tokens went into thinking, or max_tokens is too small: they would again.
      { temporary: finishReason !== 'length' },
    );
  return { finishReason: finishReason ?? 'stop', usage };
}

/** True for an abort from outside: cancel, takeover, shutdown. Our own timeouts are RivuletErrors. */
function isForeignAbort(error: unknown, call: Call): boolean {
  return call.signal.aborted && error === call.signal.reason && !(error instanceof RivuletError);
}

/** The events of a response, as many at a time as one read brought. */
async function* completionEvents(response: Response, call: Call): AsyncGenerator<CompletionEvent[]> {
  const type = response.headers.get('content-type') ?? '';
  if (/\bhtml\b/i.test(type))
    throw new RivuletError(
      'model_error',
      'The model server answered with a web page; OPENAI_BASE_URL may be wrong.',
      { temporary: false },
    );
  const reader = response.body?.getReader();
  if (!reader) return;
  const decoder = new TextDecoder();
  const readEvents = createCompletionReader();
  // A server that does not stream answers in one piece; some label a stream so too.
  let whole = /\bjson\b/i.test(type) ? '' : null;
  for (;;) {
    const { done, value } = await call.waitFor(() => reader.read());
    // Not every server ends its last event before it ends the body.
    let text = decoder.decode(value, { stream: !done }) + (done ? '\n\n' : '');
    if (whole !== null) {
      whole += text;
      if (!isEventStream(whole)) {
        if (!done && whole.length < LONGEST_WHOLE_ANSWER) continue;
        yield [...readWholeCompletion(whole), { type: 'end' }];
        return;
      }
      text = whole;
      whole = null;
    }
    let events = readEvents(text);
    // What is cut in the middle of an event is cut, not nonsense.
    if (done) events = events.filter(({ type }) => type !== 'malformed');
    if (events.length > 0) yield events;
    if (done) return;
    if (events.some((event) => event.type === 'end')) return letEnd(reader);
  }
}

/**
 * The end of the body comes with `[DONE]` or a moment later. Seeing it lets the next call use the same
 * connection; without it, closing the call closes the connection.
 */
async function letEnd(reader: ReadableStreamDefaultReader<Uint8Array>): Promise<void> {
  const timer = new AbortController();
  const lingered = wait(LINGER_MS, undefined, { signal: timer.signal });
  await Promise.race([reader.read(), lingered]).catch(() => {});
  timer.abort();
  await lingered.catch(() => {});
}

/** At most `limit` bytes of a body, as text. The rest is not read. */
async function readBody(response: Response, limit: number, call: Call): Promise<string> {
  const reader = response.body?.getReader();
  if (!reader) return '';
  const decoder = new TextDecoder();
  let text = '';
  let bytes = 0;
  while (bytes < limit) {
    const { done, value } = await call.waitFor(() => reader.read());
    if (done) return text + decoder.decode();
    bytes += value.byteLength;
    text += decoder.decode(value, { stream: true });
  }
  await reader.cancel().catch(() => {});
  return text;
}
