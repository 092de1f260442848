import { type AddressInfo, connect, createServer, type Socket } from 'node:net';

/**
 * A TCP proxy that can fall silent: it goes on accepting and holding connections but forwards nothing, as a
 * firewall that forgot a flow or a host that lost its network does. Nobody gets a reset.
 */
export interface SilentProxy {
  readonly port: number;
  readonly url: string;
  silence(): void;
  speak(): void;
  /** Silences only what exists now; new connections work. */
  forgetConnections(): void;
  stop(): Promise<void>;
}

/** @param delayMs that everything takes longer, each way */
export async function startProxy(targetPort: () => number, delayMs = 0): Promise<SilentProxy> {
  const pairs = new Set<{ near: Socket; far: Socket; forgotten: boolean }>();
  let silent = false;
  const server = createServer((near) => {
    const far = connect(targetPort(), '127.0.0.1');
    const pair = { near, far, forgotten: false };
    pairs.add(pair);
    const isMute = () => silent || pair.forgotten;
    const forward = (from: Socket, to: Socket) => {
      from.on('data', (chunk) => {
        const pass = () => {
          if (!isMute() && !to.destroyed) to.write(chunk);
        };
        if (delayMs > 0) setTimeout(pass, delayMs);
        else pass();
      });
      from.on('error', () => {});
      from.on('close', () => {
        pairs.delete(pair);
        if (!isMute())
          to.destroy(); // a silent network does not carry the end of a connection either
        else setTimeout(() => to.destroy(), 60_000).unref();
      });
    };
    forward(near, far);
    forward(far, near);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  const cut = (which: (pair: { forgotten: boolean }) => boolean) => {
    for (const pair of [...pairs])
      if (which(pair)) {
        pair.near.destroy();
        pair.far.destroy();
      }
  };
  return {
    port,
    url: `redis://127.0.0.1:${port}`,
    silence() {
      silent = true;
      // What was half sent cannot be continued later: these connections stay mute for ever.
      for (const pair of pairs) pair.forgotten = true;
    },
    speak() {
      silent = false;
    },
    forgetConnections() {
      for (const pair of pairs) pair.forgotten = true;
    },
    async stop() {
      cut(() => true);
      await new Promise<void>((resolve) => server.close(() => resolve()));
    },
  };
}
