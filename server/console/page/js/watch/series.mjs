/** Which charts and which big numbers there are, over the names that `derive.mjs` gives. */

import { bytes, count, duration, percent, rate, short } from "../format.mjs";
import { SLOW_S } from "./source.mjs";

const NUMBER = { text: rate, mark: short };
const WHOLE = { text: count, mark: short, whole: true };
const SECONDS = { text: duration };
const SHARE = { text: percent };
const LATENCIES = (key) => [
  { key: `${key}50`, label: "p50" }, { key: `${key}95`, label: "p95" }, { key: `${key}99`, label: "p99" },
];
const OVER = `over ${SLOW_S} s`;

const TOKENS = {
  title: "Tokens per second", unit: NUMBER, series: [{ key: "generation", label: "generated" }, { key: "prompt", label: "prompt" }],
};
const REQUESTS = { title: "Requests per second", hint: "that ended", unit: NUMBER, area: true, series: [{ key: "requests", label: "requests" }] };
const FIRST = { title: "Time to first token", hint: OVER, unit: SECONDS, series: LATENCIES("first") };
const BETWEEN = { title: "Inter-token latency", hint: OVER, unit: SECONDS, series: LATENCIES("between") };
const ERRORS = {
  title: "Errors per minute", hint: OVER, unit: NUMBER, prefix: ["error:", "http:"],
  labelOf: (name, prefix) => (prefix === "http:" ? `HTTP ${name}` : name === "abort" ? "abort (the client left)" : name),
};

/** All requests together. */
export const REQUEST_CHARTS = [
  TOKENS,
  REQUESTS,
  FIRST,
  BETWEEN,
  { title: "Running and waiting", unit: WHOLE, series: [
    { key: "running", label: "running" }, { key: "waiting", label: "waiting" }, { key: "engineWaiting", label: "waiting in the engine" },
  ] },
  { title: "KV cache in use", unit: SHARE, top: 1, area: true, series: [{ key: "cache", label: "in use" }] },
];

/** What the server does with adapters. */
export const RESIDENCY_CHARTS = [
  { title: "Rows of the device pool", unit: WHOLE, area: true, series: [
    { key: "rowsUsed", label: "taken" }, { key: "rowsTotal", label: "all", isDashed: true },
  ] },
  { title: "Loads and evictions per minute", hint: OVER, unit: NUMBER, prefix: ["load:", "evict:"],
    labelOf: (name, prefix) => (prefix === "evict:" ? `evicted from ${name}` : name === "ok" ? "loads" : `loads ${name}`) },
  { title: "Time to load, p95", hint: OVER, unit: SECONDS, series: [
    { key: "loadTime:device", label: "to the device" }, { key: "loadTime:host", label: "to the host" },
  ] },
  ERRORS,
  { title: "Uploads per minute", hint: OVER, unit: NUMBER, prefix: "upload:" },
  { title: "Store on disk", unit: { text: bytes }, area: true, series: [{ key: "storeBytes", label: "adapters" }] },
];

/** One adapter. */
export const ADAPTER_CHARTS = [
  { ...TOKENS, hint: "of requests that ended" },
  REQUESTS,
  FIRST,
  BETWEEN,
  { title: "Running and waiting", unit: WHOLE, series: [{ key: "running", label: "running" }, { key: "waiting", label: "waiting" }] },
  { ...ERRORS, prefix: "error:" },
];

const SHARED_NUMBERS = [
  ["Tokens/s", (now) => rate(now("generation"))],
  ["Requests/s", (now) => rate(now("requests"))],
  ["First token, p95", (now) => duration(now("first95"))],
  ["Between tokens, p95", (now) => duration(now("between95"))],
  ["Running", (now) => count(now("running"))],
  ["Waiting", (now) => count(now("waiting"))],
];
const FAILED_NUMBER = ["Failed/min", (now) => rate(now("errors")), (now) => (now("errors") > 0 ? "bad" : "")];

/** The big numbers, each [title, text of now, class of now]; now(name) is the last value of a name. */
export const NUMBERS = [...SHARED_NUMBERS, ["Pool rows", (now) => percent(now("rowsUsed") / now("rowsTotal"))], FAILED_NUMBER];
export const ADAPTER_NUMBERS = [...SHARED_NUMBERS, FAILED_NUMBER];

const MUST_BE_ZERO = [
  ["perft_residency_repairs_total", (n) => `Workers and server disagreed ${times(n)} about which adapters are loaded. This was mended, and is a defect.`],
  ["perft_step_load_bytes_total", (n) => `${bytes(n)} of adapters were loaded inside engine steps, which slows all requests. This is a defect.`],
];

/** What is wrong by the counters that must stay 0: sentences. */
export function troubles(scrape) {
  const found = MUST_BE_ZERO.map(([name, text]) => [scrape.sum(name), text]).filter(([value]) => value > 0).map(([value, text]) => text(value));
  if (scrape.sum("perft_moe_layers") === 0) found.push("No MoE layer carries the operator: adapters cannot be served.");
  return found;
}

function times(n) {
  return n === 1 ? "once" : `${count(n)} times`;
}
