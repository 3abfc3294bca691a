/** Does something again and again, while somebody looks: never while the page is hidden, never twice at once. */

const LONGEST_PAUSE_S = 10;
/** A pause is longer or shorter by up to this share: pages that once got their answers together would go on asking together. */
const SPREAD = 0.15;

/** Run `work` (async) now and about `seconds` after each end; after failures later and later. Returns {stop, now}: `now` runs it
 * at once, or once more right after the run in progress. */
export function every(seconds, work) {
  let timer = null;
  let failures = 0;
  let running = false;
  let again = false;
  let stopped = false;

  async function round() {
    timer = null;
    if (stopped || running || document.hidden) return;
    running = true;
    again = false;
    try {
      await work();
      failures = 0;
    } catch (error) {
      if (!("status" in error) && error.name !== "AbortError") console.error(error);
      if (error.name !== "AbortError") failures += 1;
    }
    running = false;
    if (again) now();
    else schedule();
  }

  function schedule() {
    if (stopped || document.hidden || timer !== null) return;
    const pause = failures ? Math.min(LONGEST_PAUSE_S, seconds * 2 ** (failures - 1)) : seconds;
    timer = setTimeout(round, 1000 * pause * (1 - SPREAD + 2 * SPREAD * Math.random()));
  }

  function now() {
    clearTimeout(timer);
    timer = null;
    again = running;
    return round();
  }

  function seen() {
    if (document.hidden) {
      clearTimeout(timer);
      timer = null;
    } else now();
  }

  document.addEventListener("visibilitychange", seen);
  now();
  return {
    now,
    stop() {
      stopped = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    },
  };
}
