/** Asks for the metrics: at most once a second, however often the reader goes from view to view. */

import { getText } from "./api.mjs";

const EVERY_MS = 1000;
let last = -Infinity;
let turn = null;

/** The metrics at a path. One view asks at a time: whoever still waits when another asks gets an AbortError, as who waits
 * when the page is hidden. Raises ApiError. */
export async function scrape(path) {
  turn?.abort();
  turn = new AbortController();
  await pause(last + EVERY_MS - performance.now(), turn.signal);
  if (document.hidden) throw new DOMException("hidden", "AbortError");
  last = performance.now();
  return await getText(path);
}

function pause(milliseconds, signal) {
  if (milliseconds <= 0) return null;
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
