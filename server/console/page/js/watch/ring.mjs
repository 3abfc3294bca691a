/** Keeps the last points of many series in memory: as many as it was made for, and never more. */

/** Points farther apart than this are not joined by a line: the server did not answer, or nobody looked. */
export const GAP_S = 6;
const MOST_NAMES = 160;

export class Ring {
  #times;
  #values = new Map();
  #next = 0;
  #length = 0;
  #restarts = [];

  constructor(capacity = 1000) {
    this.#times = new Float64Array(capacity);
  }

  get length() {
    return this.#length;
  }

  /** The names of the series, in the order of their first point. */
  names(prefix = "") {
    return [...this.#values.keys()].filter((name) => name.startsWith(prefix));
  }

  /** Add a point. time: unix seconds, later than the last; values: name -> number, a name without one has no value there. */
  push(time, values) {
    const capacity = this.#times.length;
    this.#times[this.#next] = time;
    for (const name of Object.keys(values)) {
      if (!this.#values.has(name) && this.#values.size < MOST_NAMES) this.#values.set(name, new Float64Array(capacity).fill(NaN));
    }
    for (const [name, kept] of this.#values) kept[this.#next] = values[name] ?? NaN;
    this.#next = (this.#next + 1) % capacity;
    this.#length = Math.min(this.#length + 1, capacity);
  }

  /** Note that the server was started again at a time. */
  markRestart(time) {
    this.#restarts.push(time);
    this.#restarts = this.#restarts.filter((each) => each >= this.timeAt(0));
  }

  restartsSince(time) {
    return this.#restarts.filter((each) => each >= time);
  }

  #at(index) {
    const capacity = this.#times.length;
    return (this.#next - this.#length + index + capacity) % capacity;
  }

  /** The time of a point; 0 is the oldest. NaN outside. */
  timeAt(index) {
    return index >= 0 && index < this.#length ? this.#times[this.#at(index)] : NaN;
  }

  /** A series' value at a point; NaN where there is none. */
  valueAt(name, index) {
    return index >= 0 && index < this.#length ? this.#values.get(name)?.[this.#at(index)] ?? NaN : NaN;
  }

  /** The index of the first point at `time` or later; the length if there is none. */
  firstAt(time) {
    let [low, high] = [0, this.#length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.timeAt(middle) < time) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** The index of the point nearest to a time; -1 if there is none. */
  nearest(time) {
    const after = this.firstAt(time);
    if (after === this.#length) return this.#length - 1;
    return after > 0 && time - this.timeAt(after - 1) < this.timeAt(after) - time ? after - 1 : after;
  }

  /** The points of a series from an index on, as pieces without a gap: [[index, ...], ...]. */
  pieces(name, from) {
    const found = [];
    let piece = null;
    for (let index = from; index < this.#length; index += 1) {
      if (Number.isNaN(this.valueAt(name, index))) piece = null;
      else if (piece !== null && this.timeAt(index) - this.timeAt(index - 1) <= GAP_S) piece.push(index);
      else found.push((piece = [index]));
    }
    return found;
  }

  /** The largest value of some series from an index on; NaN if there is none. */
  largest(names, from) {
    let largest = NaN;
    for (const name of names) {
      for (let index = from; index < this.#length; index += 1) {
        const value = this.valueAt(name, index);
        if (!(value <= largest) && !Number.isNaN(value)) largest = value;
      }
    }
    return largest;
  }
}
