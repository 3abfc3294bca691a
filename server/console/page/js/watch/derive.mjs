/** Computes the points that Watch draws from scrapes: for all requests together and for one adapter. */

const FINE = new Set(["stop", "length", "tool_calls", "content_filter", "repetition"]);
const QUANTILES = [["50", 0.5], ["95", 0.95], ["99", 0.99]];
/** Counters that never go down but with a restart. */
const STEADY = [
  "vllm:generation_tokens_total", "vllm:prompt_tokens_total", "perft_adapter_loads_total", "perft_uploads_total",
  "vllm:time_to_first_token_seconds_count", "http_requests_total",
];
const STARTED = "process_start_time_seconds";

/** Whether the server was started again between two scrapes. */
export function wasRestarted(before, after) {
  const [then, now] = [before.sum(STARTED), after.sum(STARTED)];
  if (!Number.isNaN(then) && !Number.isNaN(now)) return now > then;
  return STEADY.some((name) => after.sum(name) < before.sum(name));
}

function quantiles(into, key, span, histogram, labels) {
  if (span === null) return;
  for (const [suffix, q] of QUANTILES) into[key + suffix] = span.quantile(histogram, q, labels);
}

/** Increases per minute by a label's value, under `prefix` + value; values that never counted are left out. */
function perMinute(into, prefix, span, name, label, isWanted, labels = {}) {
  if (span === null) return;
  const total = span.after.sumBy(name, label, labels);
  for (const [value, increase] of span.increaseBy(name, label, labels)) {
    if (total.get(value) > 0 && isWanted(value)) into[prefix + value] = (into[prefix + value] ?? 0) + (increase / span.seconds) * 60;
  }
}

function errors(into, span, labels) {
  if (span === null) return;
  perMinute(into, "error:", span, "perft_adapter_requests_total", "finish_reason", (reason) => !FINE.has(reason), labels);
  into.errors = sum(Object.keys(into).filter((key) => key.startsWith("error:") && key !== "error:abort").map((key) => into[key]));
}

function sum(numbers) {
  return numbers.reduce((all, each) => all + each, 0);
}

function either(first, second) {
  return Number.isNaN(first) ? second : first;
}

/** All requests together. scrape: the last; quick, slow: the spans to it that rates and rarer things are read over, null
 * while there is none. Returns name -> number. */
export function ofAll(scrape, quick, slow) {
  const point = {
    running: either(scrape.sum("vllm:num_requests_running"), scrape.sum("perft_adapter_requests_running")),
    waiting: scrape.sum("perft_adapter_requests_waiting"),
    engineWaiting: scrape.sum("vllm:num_requests_waiting"),
    cache: scrape.sum("vllm:kv_cache_usage_perc"),
    rowsUsed: scrape.sum("perft_device_rows_used"),
    rowsTotal: scrape.sum("perft_device_rows_total"),
    storeBytes: scrape.sum("perft_store_bytes"),
  };
  if (quick !== null) {
    point.generation = either(quick.rate("vllm:generation_tokens_total"), quick.rate("perft_adapter_generation_tokens_total"));
    point.prompt = either(quick.rate("vllm:prompt_tokens_total"), quick.rate("perft_adapter_prompt_tokens_total"));
    point.requests = either(quick.rate("perft_adapter_requests_total"), 0);
  }
  quantiles(point, "first", slow, "vllm:time_to_first_token_seconds");
  quantiles(point, "between", slow, "vllm:inter_token_latency_seconds");
  perMinute(point, "load:", slow, "perft_adapter_loads_total", "result", () => true);
  perMinute(point, "evict:", slow, "perft_adapter_evictions_total", "tier", () => true);
  for (const tier of ["device", "host"]) {
    if (slow !== null) point[`loadTime:${tier}`] = slow.quantile("perft_adapter_load_seconds", 0.95, { tier });
  }
  errors(point, slow);
  perMinute(point, "http:", slow, "http_requests_total", "status", (status) => /^[45]/.test(status));
  perMinute(point, "upload:", slow, "perft_uploads_total", "result", () => true);
  return point;
}

/** One adapter; parameters and result as for `ofAll`. Its tokens are counted when a request ends: so its rates need the
 * longer span. */
export function ofAdapter(adapter, scrape, _quick, slow) {
  const labels = { adapter };
  const point = {
    running: scrape.sum("perft_adapter_requests_running", labels),
    waiting: scrape.sum("perft_adapter_requests_waiting", labels),
  };
  if (slow !== null) {
    point.generation = slow.rate("perft_adapter_generation_tokens_total", labels);
    point.prompt = slow.rate("perft_adapter_prompt_tokens_total", labels);
    point.requests = slow.rate("perft_adapter_requests_total", labels);
  }
  quantiles(point, "first", slow, "perft_adapter_time_to_first_token_seconds", labels);
  quantiles(point, "between", slow, "perft_adapter_inter_token_latency_seconds", labels);
  errors(point, slow, labels);
  for (const [expert, tokens] of scrape.sumBy("perft_expert_tokens_total", "expert", labels)) point[`expert:${expert}`] = tokens;
  return point;
}

/** What each adapter with series does, over a span: [{name, requests, generation, first, running, waiting}]. */
export function byAdapter(span) {
  const requests = span.increaseBy("perft_adapter_requests_total", "adapter");
  const generation = span.increaseBy("perft_adapter_generation_tokens_total", "adapter");
  const firstSum = span.increaseBy("perft_adapter_time_to_first_token_seconds_sum", "adapter");
  const firstCount = span.increaseBy("perft_adapter_time_to_first_token_seconds_count", "adapter");
  const running = span.after.sumBy("perft_adapter_requests_running", "adapter");
  const waiting = span.after.sumBy("perft_adapter_requests_waiting", "adapter");
  const names = new Set([...requests.keys(), ...running.keys(), ...waiting.keys()]);
  return [...names].map((name) => ({
    name,
    requests: (requests.get(name) ?? 0) / span.seconds,
    generation: (generation.get(name) ?? 0) / span.seconds,
    first: (firstSum.get(name) ?? 0) / (firstCount.get(name) ?? 0),
    running: running.get(name) ?? 0,
    waiting: waiting.get(name) ?? 0,
  }));
}
