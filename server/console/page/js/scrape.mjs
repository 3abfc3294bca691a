/** Asks for the metrics: at most once a second in all, however many parts of the page want them. */

import { getText, key } from "./api.mjs";

const EVERY_MS = 1000;
export const ALL = "/console/metrics";

/** Events: "read" after each answer, detail: {path, text, at (monotonic seconds)}. */
export const reads = new EventTarget();

let last = -Infinity;
let answer = null;
/** Who asks: for all adapters together, and for one of them. */
const asking = new Map();

/** The metrics at a path. Who asks while the same is asked for, or within a second of its answer, gets that answer. Whoever
 * still waits for one adapter when another is asked for gets an AbortError, as who waits when the page is hidden. Raises
 * ApiError. */
export function scrape(path) {
  const what = JSON.stringify([path, key.get()]);
  const kind = path === ALL ? "all" : "one";
  const before = asking.get(kind);
  if (before?.what === what) return before.answer;
  if (answer?.what === what && performance.now() - answer.at < EVERY_MS) return Promise.resolve(answer.text);
  before?.ends.abort();
  const ends = new AbortController();
  const mine = { what, ends, answer: read(path, what, ends.signal) };
  asking.set(kind, mine);
  const over = () => asking.get(kind) === mine && asking.delete(kind);
  mine.answer.then(over, over);
  return mine.answer;
}

async function read(path, what, signal) {
  while (performance.now() < last + EVERY_MS) await pause(last + EVERY_MS - performance.now(), signal);
  if (document.hidden) throw new DOMException("hidden", "AbortError");
  last = performance.now();
  const text = await getText(path);
  answer = { what, text, at: last };
  reads.dispatchEvent(new CustomEvent("read", { detail: { path, text, at: performance.now() / 1000 } }));
  return text;
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
