import { setTimeout as delay } from 'node:timers/promises';
import {
  Redis,
  type SentinelAddress,
  type SentinelConnectionOptions,
  SentinelConnector,
  SentinelIterator,
} from 'ioredis';

/**
 * Which master to believe. ioredis asks one sentinel, and for some seconds after a failover one that has not heard of
 * it yet still names the old master; when that is up again it takes writes, and loses them as soon as it is demoted.
 * Here every sentinel is asked, and the one with the latest failover is right: each failover has a number of its own,
 * the configuration epoch (https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/#configuration-epochs).
 */

const ASK_MS = 500; // a sentinel that takes longer is counted as away
const AGAIN_MS = 100;
const UNSETTLED_MS = 5_000; // then the best answer is believed, or a sentinel that errs would keep us out for ever

/** What one sentinel says of the master. */
export interface SentinelView {
  readonly sentinel: Partial<SentinelAddress>;
  /** Number of the latest failover it knows, 0 before the first. */
  readonly epoch: number;
  /** False while it is about to put another in the place of this master. */
  readonly settled: boolean;
}

/**
 * Who knows of the latest failover, and whether they may be believed yet.
 * @param knownEpoch the latest failover heard of before
 */
export function judge(
  views: readonly SentinelView[],
  knownEpoch: number,
): { latest: SentinelView[]; settled: boolean } {
  const epoch = Math.max(0, ...views.map((view) => view.epoch));
  const latest = views.filter((view) => view.epoch === epoch);
  return { latest, settled: epoch >= knownEpoch && latest.every((view) => view.settled) };
}

/** Reads the replies of `SENTINEL get-master-addr-by-name` and `SENTINEL master`. */
export function readView(
  sentinel: Partial<SentinelAddress>,
  address: readonly string[],
  facts: readonly string[],
): SentinelView {
  const read = (field: string) => facts[facts.indexOf(field) + 1] ?? '';
  // From the promotion on it names the new one, while the facts are the old one's until its replicas have followed.
  const isPromoted = address.join(':') !== `${read('ip')}:${read('port')}`;
  return {
    sentinel,
    epoch: Number(read('config-epoch')),
    settled: isPromoted || !/failover_in_progress|o_down/.test(read('flags')),
  };
}

/** ioredis' way to the master, after all sentinels have been asked. */
export class AgreedMaster extends SentinelConnector {
  #epoch = 0;

  override async connect(emit: (type: string, error: Error) => void) {
    this.connecting = true;
    const deadline = performance.now() + UNSETTLED_MS;
    for (;;) {
      const sentinels = this.#sentinels();
      let lastError = '';
      const answers = await Promise.all(
        sentinels.map((sentinel) =>
          this.#ask(sentinel).catch((error: Error) => {
            lastError = error.message;
            return null;
          }),
        ),
      );
      if (!this.connecting) throw new Error('Connection is closed.');
      const { latest, settled } = judge(
        answers.filter((view) => view !== null),
        this.#epoch,
      );
      if (latest.length === 0) throw new Error(`All sentinels are unreachable; the last error: ${lastError}`);
      if (!settled && performance.now() < deadline) {
        await delay(AGAIN_MS);
        continue;
      }
      if (!settled) emit('error', new Error('the sentinels have not settled on a master; taking the latest'));
      this.#epoch = latest[0]!.epoch;
      // ioredis asks one of these once more: it must not come to one that knows less, and listen to all of them later.
      this.sentinelIterator = new SentinelIterator(latest.map(({ sentinel }) => sentinel));
      try {
        return await super.connect(emit);
      } finally {
        for (const { host = '127.0.0.1', port = 26379 } of sentinels)
          this.sentinelIterator.add({ host, port });
      }
    }
  }

  /** The configured ones, and those that they have told ioredis of. */
  #sentinels(): Partial<SentinelAddress>[] {
    const all: Partial<SentinelAddress>[] = [];
    this.sentinelIterator.reset(false);
    for (let next = this.sentinelIterator.next(); !next.done; next = this.sentinelIterator.next())
      all.push(next.value);
    this.sentinelIterator.reset(false);
    return all;
  }

  /** @throws what kept it from answering */
  async #ask(sentinel: Partial<SentinelAddress>): Promise<SentinelView> {
    const options: SentinelConnectionOptions = this.options;
    const redis = new Redis({
      host: sentinel.host ?? '127.0.0.1',
      port: sentinel.port ?? 26379,
      ...(options.sentinelUsername ? { username: options.sentinelUsername } : {}),
      ...(options.sentinelPassword ? { password: options.sentinelPassword } : {}),
      ...(options.sentinelTLS ? { tls: options.sentinelTLS } : {}),
      connectTimeout: ASK_MS,
      commandTimeout: ASK_MS,
      retryStrategy: () => null,
      enableReadyCheck: false,
      disableClientInfo: true,
    });
    let reason: Error | undefined;
    redis.on('error', (error) => {
      reason ??= error;
    });
    try {
      const [address, facts] = (await Promise.all([
        redis.call('sentinel', 'get-master-addr-by-name', options.name!),
        redis.call('sentinel', 'master', options.name!),
      ])) as [string[], string[]];
      return readView(sentinel, address, facts);
    } catch (error) {
      throw reason ?? error; // the command only says that its connection is closed
    } finally {
      redis.disconnect();
    }
  }
}
