/** Does something again and again, while somebody looks: never while the page is hidden, never twice at once. */

const LONGEST_PAUSE_S = 10;

/** Run `work` (async) now and `seconds` after each end; after failures later and later. Returns {stop, now}. */
export function every(seconds, work) {
  let timer = null;
  let failures = 0;
  let running = false;
  let stopped = false;

  async function round() {
    timer = null;
    if (stopped || running || document.hidden) return;
    running = true;
    try {
      await work();
      failures = 0;
    } catch (error) {
      if (!("status" in error) && error.name !== "AbortError") console.error(error);
      failures += 1;
    }
    running = false;
    schedule();
  }

  function schedule() {
    if (stopped || document.hidden || timer !== null) return;
    timer = setTimeout(round, 1000 * (failures ? Math.min(LONGEST_PAUSE_S, seconds * 2 ** (failures - 1)) : seconds));
  }

  function now() {
    clearTimeout(timer);
    timer = null;
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
