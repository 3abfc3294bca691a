/** Chooses where the marks of an axis are. */

const STEPS = [1, 2, 2.5, 5, 10];
const TIME_STEPS_S = [5, 10, 15, 30, 60, 120, 180, 300, 600];
const MOST_STEPS = 3;
const SHORTEST_AXIS_S = 60;

/** The marks of an axis from 0 to at least `largest`: {top, ticks}; three or four of them. whole: of whole numbers only. */
export function valueTicks(largest, whole = false) {
  const wanted = largest > 0 && Number.isFinite(largest) ? largest : 1;
  const power = 10 ** Math.floor(Math.log10(wanted / MOST_STEPS));
  const fits = (step) => wanted <= step * power * MOST_STEPS * (1 + 1e-9) && (!whole || Number.isInteger(step * power));
  const step = whole && wanted <= 2 ? 1 : (STEPS.find(fits) ?? 10) * power;
  const count = Math.max(2, Math.ceil(wanted / step - 1e-9));
  return { top: count * step, ticks: Array.from({ length: count + 1 }, (_, n) => Number((n * step).toPrecision(12))) };
}

/** Where a time axis of `seconds` up to `to` begins: with the first point (NaN: there is none) while that is later. */
export function axisBegin(first, to, seconds) {
  const latest = to - SHORTEST_AXIS_S;
  return Math.max(to - seconds, Number.isNaN(first) ? latest : Math.min(first, latest));
}

/** The marks of a time axis: [{at, text}], at most `most`; unix seconds, texts in the reader's time. */
export function timeTicks(from, to, most) {
  const step = TIME_STEPS_S.find((each) => (to - from) / each <= most) ?? TIME_STEPS_S.at(-1);
  const found = [];
  for (let at = Math.ceil(from / step) * step; at <= to; at += step) found.push({ at, text: clock(at, step < 60) });
  return found;
}

/** The time of day of unix seconds: "14:05" or "14:05:10". */
export function clock(unixSeconds, withSeconds = true) {
  const time = new Date(unixSeconds * 1000);
  const parts = [time.getHours(), time.getMinutes(), ...(withSeconds ? [time.getSeconds()] : [])];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}
