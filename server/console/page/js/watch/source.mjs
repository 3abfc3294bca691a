/** Reads the metrics while somebody looks at the page, and keeps the points of the last 15 minutes. */

import { connection } from "../connection.mjs";
import { Scrapes } from "../metrics.mjs";
import { every } from "../poll.mjs";
import { ALL, reads, scrape } from "../scrape.mjs";
import { ofAdapter, ofAll, wasRestarted } from "./derive.mjs";
import { GAP_S, Ring } from "./ring.mjs";

/** How often to read: for a view that shows it, and to have the last minutes once somebody opens Watch. */
export const SHOWN_S = 2;
export const KEPT_S = 4;
const QUICK_S = 6;
/** A rate over less than this says little. */
const SHORTEST_S = 3;
export const SLOW_S = 20;
const KEPT_ADAPTERS = 8;

/** The metrics of all requests (adapter ""), or of one adapter. Events: "point". */
class Source extends EventTarget {
  ring = new Ring();
  last = null;
  #quick = new Scrapes(QUICK_S);
  #slow = new Scrapes(SLOW_S);
  #poll = null;
  #readers = new Set();

  constructor(adapter) {
    super();
    this.adapter = adapter;
    this.path = adapter ? `${ALL}?adapter=${encodeURIComponent(adapter)}` : ALL;
  }

  /** What happened in the last SLOW_S seconds; null before there is enough. */
  get span() {
    return longEnough(this.#slow.window);
  }

  /** The value of a name now; NaN while the server does not answer. */
  now(name) {
    return this.ring.valueAt(name, this.ring.length - 1);
  }

  /** Read every so many seconds, SHOWN_S or more, until the function that is returned is called. */
  read(seconds) {
    const reader = { seconds };
    this.#readers.add(reader);
    if (this.#poll === null) this.#start();
    else this.#poll.now();
    return () => {
      this.#readers.delete(reader);
      if (this.#readers.size === 0) this.#stop();
    };
  }

  #start() {
    reads.addEventListener("read", this.#took);
    connection.addEventListener("back", this.#back);
    this.#poll = every(SHOWN_S, () => this.#ask());
  }

  #stop() {
    this.#poll?.stop();
    this.#poll = null;
    connection.removeEventListener("back", this.#back);
    reads.removeEventListener("read", this.#took);
    this.#forget();
  }

  /** Also what another part of the page has read. */
  #took = ({ detail }) => {
    if (detail.path === this.path) this.#take(detail.scrape);
  };

  #back = () => this.#poll?.now();

  #forget() {
    this.#quick.clear();
    this.#slow.clear();
  }

  async #ask() {
    const pace = Math.min(...[...this.#readers].map(({ seconds }) => seconds));
    try {
      const found = await scrape(this.path, pace - SHOWN_S / 2);
      if (found !== this.last) this.#take(found);
    } catch (error) {
      if (error.name !== "AbortError") this.#push(unixOf(performance.now() / 1000), {});
      throw error;
    }
  }

  #take(scrape) {
    const time = unixOf(scrape.at);
    if (this.last !== null && wasRestarted(this.last, scrape)) {
      this.ring.markRestart(time);
      this.#forget();
    } else if (this.last !== null && scrape.at - this.last.at > GAP_S) this.#forget();
    this.last = scrape;
    this.#quick.add(scrape);
    this.#slow.add(scrape);
    const derive = this.adapter ? ofAdapter.bind(null, this.adapter) : ofAll;
    this.#push(time, derive(scrape, longEnough(this.#quick.window), longEnough(this.#slow.window)));
  }

  #push(time, values) {
    this.ring.push(time, values);
    this.dispatchEvent(new Event("point"));
  }
}

function longEnough(span) {
  return span !== null && span.seconds >= SHORTEST_S ? span : null;
}

function unixOf(monotonic) {
  return performance.timeOrigin / 1000 + monotonic;
}

/** Unix seconds, never set back while the page is open. */
export function nowUnix() {
  return unixOf(performance.now() / 1000);
}

const kept = new Map();

/** The source of an adapter ("": all); its points are kept while other views are shown. */
export function sourceOf(adapter) {
  const found = kept.get(adapter) ?? new Source(adapter);
  kept.delete(adapter);
  kept.set(adapter, found);
  const oldest = [...kept.keys()].find((name) => name !== "");
  if (kept.size > KEPT_ADAPTERS) kept.delete(oldest);
  return found;
}
