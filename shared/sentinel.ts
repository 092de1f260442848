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
  /** host:port */
  readonly master: string;
  /** Number of the latest failover it knows, 0 before the first. */
  readonly epoch: number;
  /** False while it is about to put another in the place of this master. */
  readonly settled: boolean;
}

/**
 * The sentinels in the order in which to believe them, and whether the first may be believed yet.
 * @param knownEpoch the latest failover heard of before
 */
export function rankViews(
  views: readonly SentinelView[],
  knownEpoch: number,
): { ranked: SentinelView[]; settled: boolean } {
  const ranked = views.toSorted((a, b) => b.epoch - a.epoch || Number(a.settled) - Number(b.settled));
  const latest = ranked[0]?.epoch ?? 0;
  return {
    ranked,
    settled:
      ranked.length === 0 ||
      (latest >= knownEpoch && ranked.every((view) => view.settled || view.epoch < latest)),
  };
}

/**
 * Reads the replies of `SENTINEL get-master-addr-by-name` and `SENTINEL master`.
 * @returns null when this sentinel does not know the master
 */
export function readView(
  sentinel: Partial<SentinelAddress>,
  address: readonly string[] | null,
  facts: readonly string[],
): SentinelView | null {
  if (!address) return null;
  const read = (field: string) => facts[facts.indexOf(field) + 1] ?? '';
  const master = address.join(':');
  // From the promotion on it names the new one, while the facts are the old one's until its replicas have followed.
  const isPromoted = master !== `${read('ip')}:${read('port')}`;
  return {
    sentinel,
    master,
    epoch: Number(read('config-epoch')),
    settled: isPromoted || !/failover_in_progress|o_down/.test(read('flags')),
  };
}

/** ioredis' way to the master, after all sentinels have been asked. */
export class AgreedMaster extends SentinelConnector {
  #epoch = 0;

  override async connect(emit: (type: string, error: Error) => void) {
    this.connecting = true;
    const deadline = Date.now() + UNSETTLED_MS;
    for (;;) {
      const sentinels = this.#sentinels();
      const answers = await Promise.all(sentinels.map((sentinel) => this.#ask(sentinel)));
      if (!this.connecting) throw new Error('Connection is closed.');
      const { ranked, settled } = rankViews(
        answers.filter((view) => view !== null),
        this.#epoch,
      );
      if (ranked.length === 0) throw new Error('All sentinels are unreachable'); // and nobody waits for them here
      if (!settled && Date.now() < deadline) {
        await delay(AGAIN_MS);
        continue;
      }
      if (!settled)
        emit('error', new Error(`the sentinels have not settled on a master; taking ${ranked[0]!.master}`));
      this.#epoch = ranked[0]!.epoch;
      const trusted = ranked.map((view) => view.sentinel);
      this.sentinelIterator = new SentinelIterator([
        ...trusted,
        ...sentinels.filter((sentinel) => !trusted.includes(sentinel)),
      ]);
      return super.connect(emit);
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

  async #ask(sentinel: Partial<SentinelAddress>): Promise<SentinelView | null> {
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
    redis.on('error', () => {}); // the commands are rejected
    try {
      const [address, facts] = (await Promise.all([
        redis.call('sentinel', 'get-master-addr-by-name', options.name!),
        redis.call('sentinel', 'master', options.name!),
      ])) as [string[] | null, string[]];
      return readView(sentinel, address, facts);
    } catch {
      return null;
    } finally {
      redis.disconnect();
    }
  }
}
