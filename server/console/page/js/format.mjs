/** Writes numbers, sizes and times for people. A value that is not known is an en dash. */

export const UNKNOWN = "\u2013";

/** 12345 -> "12,345". */
export function count(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : UNKNOWN;
}

/** A rate or another number with three digits: 0.0123, 1.23, 12.3, 1,234. */
export function decimal(value) {
  if (!Number.isFinite(value)) return UNKNOWN;
  if (value === 0) return "0";
  if (Math.abs(value) >= 100) return count(value);
  return String(Number(value.toPrecision(3)));
}

/** A number for the mark of an axis: 0.25, 750, 7.5k, 600k, 1.2M. */
export function short(value) {
  if (!(Math.abs(value) >= 1000)) return decimal(value);
  const [unit, sign] = Math.abs(value) < 1e6 ? [1e3, "k"] : Math.abs(value) < 1e9 ? [1e6, "M"] : [1e9, "G"];
  return `${Number((value / unit).toPrecision(3))}${sign}`;
}

/** A rate with as many places as there is room for, so that a column of them lines up: 0, <0.01, 0.12, 9.87, 12.3, 1,234. */
export function rate(value) {
  if (!Number.isFinite(value)) return UNKNOWN;
  if (value === 0) return "0";
  if (value < 0.01) return "<0.01";
  if (value >= 99.95) return count(value);
  return value.toFixed(value < 9.995 ? 2 : 1);
}

/** Seconds as "850 \u00b5s", "12 ms", "1.2 s", "3 min", "5 h", "2 d". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return UNKNOWN;
  if (seconds === 0) return "0 ms";
  if (seconds < 1e-3) return `${decimal(seconds * 1e6)} \u00b5s`;
  if (seconds < 1) return `${decimal(seconds * 1e3)} ms`;
  if (seconds < 100) return `${decimal(seconds)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  return seconds < 48 * 3600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

/** Bytes as "12 B", "3.4 kB", "56 MB". */
export function bytes(value) {
  if (!Number.isFinite(value)) return UNKNOWN;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? value : Number(value.toPrecision(3))} ${units[unit]}`;
}

/** How long ago unix seconds are: "now", "12 s ago", "3 h ago". */
export function ago(unixSeconds) {
  if (!Number.isFinite(unixSeconds)) return UNKNOWN;
  const passed = Date.now() / 1000 - unixSeconds;
  return passed < 2 ? "now" : `${duration(passed < 100 ? Math.round(passed) : passed)} ago`;
}

/** Unix seconds as the reader's date and time. */
export function date(unixSeconds) {
  return Number.isFinite(unixSeconds) ? new Date(unixSeconds * 1000).toLocaleString() : UNKNOWN;
}

/** 0.123 -> "12.3 %". */
export function percent(share) {
  return Number.isFinite(share) ? `${Number((share * 100).toPrecision(3))} %` : UNKNOWN;
}
