/** Tokens are short and mostly ASCII: a loop over such a text takes a fraction of what a native call does. */

/** Above so many UTF-16 units the native call is faster. */
export const SHORT = 48;

/** Bytes of a text as UTF-8. */
export function byteLength(text: string): number {
  if (text.length > SHORT) return Buffer.byteLength(text);
  for (let index = 0; index < text.length; index++)
    if (text.charCodeAt(index) > 127) return Buffer.byteLength(text);
  return text.length;
}

/** A text as a JSON string. */
export function quote(text: string): string {
  if (text.length > SHORT) return JSON.stringify(text);
  for (let index = 0; index < text.length; index++) {
    const unit = text.charCodeAt(index);
    if (unit < 32 || unit > 126 || unit === 34 || unit === 92) return JSON.stringify(text);
  }
  return `"${text}"`;
}
