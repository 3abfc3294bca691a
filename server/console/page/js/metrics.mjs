/** Reads Prometheus' text format and computes rates and quantiles between two scrapes. */

const SAMPLE = /^([A-Za-z_:][A-Za-z0-9_:]*)(\{.*\})?\s+(\S+)/;
const LABEL = /([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { n: "\n" };
const NOTHING = [];

/** Every series is parsed once: a page of the same names comes again every second. */
const known = new Map();
const KNOWN_AT_MOST = 200_000;

function seriesOf(name, labels) {
  const text = name + labels;
  let series = known.get(text);
  if (series === undefined) {
    if (known.size >= KNOWN_AT_MOST) known.clear();
    const found = {};
    for (const [, label, value] of labels.matchAll(LABEL)) {
      found[label] = value.replace(/\\(.)/g, (_, character) => ESCAPED[character] ?? character);
    }
    series = { name, labels: found, text };
    known.set(text, series);
  }
  return series;
}

function numberOf(text) {
  if (text === "+Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}

/** One reading of the metrics. at: monotonic seconds. */
export class Scrape {
  #byName = new Map();
  #values = new Map();

  constructor(text, at = performance.now() / 1000) {
    this.at = at;
    for (const line of text.split("\n")) {
      if (line === "" || line.startsWith("#")) continue;
      const found = SAMPLE.exec(line);
      if (found === null) continue;
      const series = seriesOf(found[1], found[2] ?? "");
      this.#values.set(series.text, numberOf(found[3]));
      const same = this.#byName.get(series.name);
      if (same === undefined) this.#byName.set(series.name, [series]);
      else same.push(series);
    }
  }

  /** The series of a name, each {name, labels, text}. */
  series(name) {
    return this.#byName.get(name) ?? NOTHING;
  }

  valueOf(series) {
    return this.#values.get(series.text);
  }

  /** The sum over the series that have these labels; NaN where there is none. */
  sum(name, labels = {}) {
    let sum = NaN;
    for (const series of this.series(name)) {
      if (matches(series.labels, labels)) sum = (Number.isNaN(sum) ? 0 : sum) + this.#values.get(series.text);
    }
    return sum;
  }

  /** value of `label` -> the sum over the series with it. */
  sumBy(name, label, labels = {}) {
    const sums = new Map();
    for (const series of this.series(name)) {
      const value = series.labels[label];
      if (value !== undefined && matches(series.labels, labels)) {
        sums.set(value, (sums.get(value) ?? 0) + this.#values.get(series.text));
      }
    }
    return sums;
  }
}

function matches(found, wanted) {
  for (const name in wanted) if (found[name] !== wanted[name]) return false;
  return true;
}

/** What a counter went up by; from 0 if the server was started again in between. */
function rise(before, after) {
  return after < before ? after : after - before;
}

/** What happened between two scrapes. */
export class Span {
  constructor(before, after) {
    this.before = before;
    this.after = after;
    this.seconds = after.at - before.at;
  }

  /** How much a counter rose, over the series that have these labels; NaN where there is none. */
  increase(name, labels = {}) {
    let sum = NaN;
    for (const series of this.after.series(name)) {
      if (!matches(series.labels, labels)) continue;
      sum = (Number.isNaN(sum) ? 0 : sum) + rise(this.before.valueOf(series) ?? 0, this.after.valueOf(series));
    }
    return sum;
  }

  /** The increase of each value of a label: a Map. */
  increaseBy(name, label, labels = {}) {
    const sums = new Map();
    for (const series of this.after.series(name)) {
      const value = series.labels[label];
      if (value === undefined || !matches(series.labels, labels)) continue;
      const more = rise(this.before.valueOf(series) ?? 0, this.after.valueOf(series));
      sums.set(value, (sums.get(value) ?? 0) + more);
    }
    return sums;
  }

  /** A counter's increase per second. */
  rate(name, labels = {}) {
    return this.increase(name, labels) / this.seconds;
  }

  /** The mean of what a histogram observed; NaN if it observed nothing. */
  mean(histogram, labels = {}) {
    return this.increase(`${histogram}_sum`, labels) / this.increase(`${histogram}_count`, labels);
  }

  /** The q-quantile of what a histogram observed, linear within a bucket as Prometheus has it; NaN for nothing. */
  quantile(histogram, q, labels = {}) {
    const by = this.increaseBy(`${histogram}_bucket`, "le", labels);
    const buckets = [...by].map(([le, value]) => [numberOf(le), value]).sort((a, b) => a[0] - b[0]);
    const total = buckets.at(-1)?.[1] ?? 0;
    if (!(total > 0)) return NaN;
    const wanted = q * total;
    let [low, below] = [0, 0];
    for (const [high, upTo] of buckets) {
      if (upTo >= wanted) {
        if (high === Infinity) return low;
        return upTo === below ? high : low + ((high - low) * (wanted - below)) / (upTo - below);
      }
      [low, below] = [high, upTo];
    }
    return low;
  }
}

/** The last scrapes, for rates over a window. */
export class Scrapes {
  #kept = [];

  constructor(windowSeconds = 10) {
    this.windowSeconds = windowSeconds;
  }

  add(scrape) {
    this.#kept.push(scrape);
    while (this.#kept.length > 2 && this.#kept[1].at <= scrape.at - this.windowSeconds) this.#kept.shift();
  }

  clear() {
    this.#kept = [];
  }

  get last() {
    return this.#kept.at(-1) ?? null;
  }

  /** From the begin of the window (or the first scrape there is) to the last; null with fewer than two. */
  get window() {
    return this.#kept.length < 2 ? null : new Span(this.#kept[0], this.#kept.at(-1));
  }

  /** The last step; null with fewer than two. */
  get step() {
    return this.#kept.length < 2 ? null : new Span(this.#kept.at(-2), this.#kept.at(-1));
  }
}
