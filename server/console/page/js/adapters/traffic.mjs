/** Reads the traffic of each adapter off the metrics: one poll for all views, none while nobody looks. No DOM. */

import { Scrapes } from "../metrics.mjs";
import { every } from "../poll.mjs";
import { reads, scrape } from "../scrape.mjs";

/** Seconds over which rates and times are taken: long enough that a quiet adapter's figures do not flicker. */
export const WINDOW_S = 30;
const POLL_S = 4;
const BEYOND_THE_CAP = "_other";
const NOTHING_KNOWN = { running: NaN, waiting: NaN, perSecond: NaN, firstToken: NaN };

/** The figures of each adapter between two scrapes. */
export class Traffic {
  #running;
  #waiting;
  #requests;
  #firstSum;
  #firstCount;
  #isCapped;
  #seconds;

  /** scrape: the last. span: the window, or null while there is only one scrape. */
  constructor(scrape, span) {
    this.#running = scrape.sumBy("perft_adapter_requests_running", "adapter");
    this.#waiting = scrape.sumBy("perft_adapter_requests_waiting", "adapter");
    const by = (name) => span?.increaseBy(name, "adapter") ?? new Map();
    this.#requests = by("perft_adapter_requests_total");
    this.#firstSum = by("perft_adapter_time_to_first_token_seconds_sum");
    this.#firstCount = by("perft_adapter_time_to_first_token_seconds_count");
    const counted = ["perft_adapter_requests_running", "perft_adapter_requests_waiting", "perft_adapter_requests_total"];
    this.#isCapped = counted.some((name) => scrape.sum(name, { adapter: BEYOND_THE_CAP }) > 0);
    this.#seconds = span?.seconds ?? NaN;
  }

  /** {running, waiting, perSecond, firstToken (seconds)} of a name; NaN is not known. */
  of(name) {
    const hasSeries = [this.#running, this.#waiting, this.#requests, this.#firstCount].some((values) => values.has(name));
    if (!hasSeries && this.#isCapped) return NOTHING_KNOWN;
    return {
      running: this.#running.get(name) ?? 0,
      waiting: this.#waiting.get(name) ?? 0,
      perSecond: (this.#requests.get(name) ?? 0) / this.#seconds,
      firstToken: (this.#firstSum.get(name) ?? NaN) / (this.#firstCount.get(name) ?? NaN),
    };
  }
}

/** Asks for the metrics again and again, and takes what other parts of the page read. path: `/console/metrics`, or with
 * `?adapter=NAME`. told(scrapes) is called after each answer. Returns {stop}. */
export function watchMetrics(path, told, windowSeconds = WINDOW_S) {
  const scrapes = new Scrapes(windowSeconds);

  function take(found) {
    if (found === scrapes.last) return;
    if (scrapes.last !== null && found.at - scrapes.last.at > windowSeconds) scrapes.clear();
    scrapes.add(found);
    told(scrapes);
  }

  const took = ({ detail }) => detail.path === path && take(detail.scrape);
  reads.addEventListener("read", took);
  const poll = every(POLL_S, async () => take(await scrape(path, POLL_S - 1)));
  return {
    stop() {
      poll.stop();
      reads.removeEventListener("read", took);
    },
  };
}
