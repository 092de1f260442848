/**
 * An AbortController whose signal is made when somebody asks for it. On Node 20 making one costs a few microseconds, and
 * what its listeners hold survives every scavenge until the next full collection: for a short answer that is a fifth of a
 * worker's time. Most answers are never aborted, and short ones never wait for anything that a signal could stop.
 */
export class LazyAbort {
  private controller: AbortController | null = null;
  aborted = false;
  reason: unknown;
  /** Called when it is aborted. */
  onAbort: (() => void) | null = null;

  get signal(): AbortSignal {
    if (!this.controller) {
      this.controller = new AbortController();
      if (this.aborted) this.controller.abort(this.reason);
    }
    return this.controller.signal;
  }

  /** Only the first call counts. */
  abort(reason: unknown): void {
    if (this.aborted) return;
    this.aborted = true;
    this.reason = reason;
    this.controller?.abort(reason);
    this.onAbort?.();
  }
}
