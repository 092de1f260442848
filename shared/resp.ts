import { SHORT } from './short-text.ts';

/**
 * A lean RESP2 codec for the connections that carry tokens. It does what ioredis does in less time by leaving out
 * what these connections do not need: a promise, an object and a write for each command, key prefixes, reply
 * transformers. Measured gain: see ARCHITECTURE.md. Format: the Redis serialization protocol specification.
 */

export type RespValue = string | number | null | RespError | RespValue[];

/** An error reply, as a value: whoever sent the command turns it into a rejection. */
export class RespError extends Error {}

const FIRST_BYTES = 32_768;
const MOST_KEPT = 262_144; // memory that one busy turn needed is not kept for ever
const CR = 13;
const LF = 10;

/** Commands as the server reads them, one after the other in one piece of memory, which is used again. */
export class CommandBuffer {
  private bytes = Buffer.allocUnsafeSlow(FIRST_BYTES);
  /** Bytes so far. */
  length = 0;

  add(parts: readonly (string | number)[]): void {
    this.head(42, parts.length); // *
    for (let index = 0; index < parts.length; index++) {
      const part = parts[index]!;
      this.bulk(typeof part === 'string' ? part : String(part));
    }
  }

  /** What was added. Good until `clear`. */
  view(): Buffer {
    return this.bytes.subarray(0, this.length);
  }

  /** @param inUse somebody still reads the view: its memory is not used again */
  clear(inUse: boolean): void {
    this.length = 0;
    if (inUse || this.bytes.length > MOST_KEPT) this.bytes = Buffer.allocUnsafeSlow(FIRST_BYTES);
  }

  private bulk(text: string): void {
    const { length } = text;
    this.reserve(length * 3 + 2);
    const before = this.length;
    if (length <= SHORT) {
      this.head(36, length); // $
      const { bytes } = this;
      let at = this.length;
      let index = 0;
      for (; index < length; index++) {
        const unit = text.charCodeAt(index);
        if (unit > 127) break;
        bytes[at++] = unit;
      }
      if (index === length) {
        this.length = at;
        this.endLine();
        return;
      }
      this.length = before;
    }
    // Written as if it were ASCII, which it mostly is: counting its bytes first would be another pass over it.
    this.head(36, length);
    const from = this.length;
    const written = this.bytes.write(text, from);
    if (written !== length) {
      const more = String(written).length - String(length).length; // digits
      if (more > 0) this.bytes.copyWithin(from + more, from, from + written);
      this.length = before;
      this.head(36, written);
    }
    this.length += written;
    this.endLine();
  }

  /** A kind and a number, which is not negative. */
  private head(kind: number, value: number): void {
    this.reserve(0);
    this.bytes[this.length++] = kind;
    if (value < 10) this.bytes[this.length++] = 48 + value;
    else if (value < 100) {
      this.bytes[this.length++] = 48 + Math.floor(value / 10);
      this.bytes[this.length++] = 48 + (value % 10);
    } else this.length += this.bytes.write(String(value), this.length);
    this.endLine();
  }

  private endLine(): void {
    this.bytes[this.length++] = CR;
    this.bytes[this.length++] = LF;
  }

  /** Makes room for so many bytes and a head. */
  private reserve(count: number): void {
    const needed = this.length + count + 32;
    if (needed <= this.bytes.length) return;
    const larger = Buffer.allocUnsafeSlow(Math.max(needed, this.bytes.length * 2));
    this.bytes.copy(larger, 0, 0, this.length);
    this.bytes = larger;
  }
}

const MOST_BULK = 512 * 1024 * 1024; // what Redis itself allows
const MOST_ITEMS = 16 * 1024 * 1024;

interface OpenArray {
  items: RespValue[];
  left: number;
}

/**
 * Reads replies from chunks of any size. It keeps where it is, inside nested arrays too, so that no byte is parsed
 * twice, however a large reply is cut.
 * @param onReply called with each whole reply, in order
 * @param isBare whether nobody reads the next reply: a string is then handed out as ''
 */
export function createParser(
  onReply: (reply: RespValue) => void,
  isBare: () => boolean = () => false,
): { push(chunk: Buffer): void } {
  let buffer: Buffer = Buffer.alloc(0);
  let position = 0;
  /** Bytes of the bulk string that is being read, or -1. */
  let bulk = -1;
  /** Chunks of a long bulk string, joined once they are enough. */
  let gathered: Buffer[] = [];
  let gatheredBytes = 0;
  const open: OpenArray[] = [];

  function complete(value: RespValue): void {
    for (;;) {
      const top = open[open.length - 1];
      if (!top) {
        onReply(value);
        return;
      }
      top.items.push(value);
      if (--top.left > 0) return;
      open.pop();
      value = top.items;
    }
  }

  function readNumber(from: number, to: number): number {
    let value = 0;
    let index = from;
    const negative = buffer[from] === 45;
    if (negative) index++;
    if (index >= to) throw new Error('RESP: a number is missing');
    for (; index < to; index++) {
      const digit = buffer[index]! - 48;
      if (digit < 0 || digit > 9) throw new Error('RESP: not a number');
      value = value * 10 + digit;
    }
    return negative ? -value : value;
  }

  function parse(): void {
    for (;;) {
      if (bulk >= 0) {
        if (buffer.length - position < bulk + 2) return;
        const bare = open.length === 0 && isBare();
        const value = bare ? '' : buffer.toString('utf8', position, position + bulk);
        position += bulk + 2;
        bulk = -1;
        complete(value);
        continue;
      }
      if (position >= buffer.length) return;
      const end = buffer.indexOf(CR, position + 1);
      if (end < 0 || end + 1 >= buffer.length) return;
      const start = position + 1;
      const kind = buffer[position]!;
      position = end + 2;
      switch (kind) {
        case 36: {
          // $ bulk string
          const length = readNumber(start, end);
          if (length > MOST_BULK) throw new Error(`RESP: a string of ${length} bytes`);
          if (length < 0) complete(null);
          else bulk = length;
          break;
        }
        case 42: {
          // * array
          const count = readNumber(start, end);
          if (count > MOST_ITEMS) throw new Error(`RESP: an array of ${count} items`);
          if (count < 0) complete(null);
          else if (count === 0) complete([]);
          else open.push({ items: [], left: count });
          break;
        }
        case 58: // : integer
          complete(readNumber(start, end));
          break;
        case 43: // + status
          complete(buffer.toString('utf8', start, end));
          break;
        case 45: // - error
          complete(new RespError(buffer.toString('utf8', start, end)));
          break;
        default:
          throw new Error(`RESP: a reply cannot start with byte ${kind}`);
      }
    }
  }

  return {
    push(chunk) {
      if (bulk >= 0 && gatheredBytes + buffer.length - position + chunk.length < bulk + 2) {
        gathered.push(chunk);
        gatheredBytes += chunk.length;
        return;
      }
      const rest = position < buffer.length ? [buffer.subarray(position)] : [];
      buffer = rest.length + gathered.length === 0 ? chunk : Buffer.concat([...rest, ...gathered, chunk]);
      gathered = [];
      gatheredBytes = 0;
      position = 0;
      parse();
      if (position >= buffer.length) {
        buffer = Buffer.alloc(0); // let the chunk go
        position = 0;
      }
    },
  };
}
