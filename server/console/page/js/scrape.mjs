/** Asks for the metrics: at most once a second in all, however many parts of the page want them. */

import { getText, key } from "./api.mjs";
import { Scrape } from "./metrics.mjs";

const EVERY_MS = 1000;
export const ALL = "/console/metrics";

/** Events: "read" after each answer, detail: {path, scrape}. */
export const reads = new EventTarget();

let last = -Infinity;
/** Who asks, and what came last: for all adapters together, and for one of them. */
const asking = new Map();
const answers = new Map();

/** The metrics at a path, a Scrape. Who asks while the same is asked for, or within `fresh` seconds of its answer, gets that
 * answer. Whoever still waits for one adapter when another is asked for gets an AbortError, as who waits when the page is
 * hidden. Raises ApiError. */
export function scrape(path, fresh = EVERY_MS / 1000) {
  const what = JSON.stringify([path, key.get()]);
  const kind = path === ALL ? "all" : "one";
  const before = asking.get(kind);
  if (before?.what === what) return before.answer;
  const known = answers.get(kind);
  if (known?.what === what && performance.now() / 1000 - known.scrape.at < fresh) return Promise.resolve(known.scrape);
  before?.ends.abort();
  const ends = new AbortController();
  const mine = { what, ends, answer: read(path, what, kind, ends.signal) };
  asking.set(kind, mine);
  const over = () => asking.get(kind) === mine && asking.delete(kind);
  mine.answer.then(over, over);
  return mine.answer;
}

async function read(path, what, kind, signal) {
  while (performance.now() < last + EVERY_MS) await pause(last + EVERY_MS - performance.now(), signal);
  if (document.hidden) throw new DOMException("hidden", "AbortError");
  last = performance.now();
  const found = new Scrape(await getText(path));
  answers.set(kind, { what, scrape: found });
  reads.dispatchEvent(new CustomEvent("read", { detail: { path, scrape: found } }));
  return found;
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
