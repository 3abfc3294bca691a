/** Shows how evenly an adapter's experts are used: a bar per expert, the share of the busiest, what it means. */

import { getJson } from "../api.mjs";
import { h, replace, setText, svg } from "../dom.mjs";
import { count, decimal, percent, UNKNOWN } from "../format.mjs";
import { session } from "../session.mjs";
import { judge } from "./evenness.mjs";

const HEIGHT = 150;
const TOP = 8;
const BOTTOM = 20;
const PX_PER_LABEL = 26;
const WIDEST_BAR = 110;
const OTHER = "_other";
const BADGES = { collapsed: ["bad", "collapsed"], uneven: ["", "uneven"], even: ["good", "even"], few: ["", "too few"], none: ["", "none yet"] };
const SINCE_START = "start";
const IN_WINDOW = "window";

export class Experts {
  #adapter;
  #config = null;
  #picture = svg("svg", { class: "experts-bars", height: HEIGHT, "aria-hidden": "true", focusable: "false" });
  #frame = h("div", { class: "experts-frame" }, this.#picture);
  #badge = h("span", { class: "badge" });
  #sentence = h("p", {});
  #facts = h("p", { class: "muted small number" });
  #rows = h("tbody", {});
  #period;
  #drawn = null;
  #observer = new ResizeObserver(() => this.#drawn && this.draw(...this.#drawn));

  constructor(adapter) {
    this.#adapter = adapter;
    this.#period = h("select", {
      class: "experts-period", "aria-label": "Since when tokens count", on: { change: () => this.#drawn && this.draw(...this.#drawn) },
    },
      h("option", { value: SINCE_START }, "since the server started"), h("option", { value: IN_WINDOW }, "in this window"));
    this.element = h("section", { class: "card experts", "aria-label": "Use of the experts" },
      h("header", { class: "chart-head" }, h("h2", {}, "How evenly the experts are used"), this.#badge, h("span", { class: "chart-time" }), this.#period),
      this.#frame, h("div", { class: "experts-words" }, this.#sentence, this.#facts,
      h("details", { class: "small" }, h("summary", {}, "As a table"), h("div", { class: "experts-table" }, h("table", {},
        h("caption", { class: "visually-hidden" }, "Tokens by expert"),
        h("thead", {}, h("tr", {}, ["Expert", "Tokens", "Share"].map((title, n) =>
          h("th", { scope: "col", class: n ? "number" : "" }, title)))), this.#rows)))));
    this.#observer.observe(this.#frame);
    this.#load();
  }

  end() {
    this.#observer.disconnect();
  }

  /** How many experts a token goes to is in the configuration, for who may read it. */
  async #load() {
    if (!session.may("use") || session.facts.base.includes(this.#adapter)) return;
    try {
      const adapter = await getJson(`/v1/adapters/${encodeURIComponent(this.#adapter)}`);
      this.#config = adapter.versions.find((version) => version.version === adapter.active) ?? null;
    } catch {
      return; // it is judged without
    }
    if (this.#drawn) this.draw(...this.#drawn);
  }

  /** Show the counts of the ring's last point, or what they rose by since `from` (unix seconds). */
  draw(ring, from) {
    this.#drawn = [ring, from];
    const { names, tokens } = this.#counts(ring, from);
    const config = this.#config;
    const found = judge(tokens, { perToken: config?.top_k ?? null, isOwn: config?.variant !== "E" });
    const [kind, word] = BADGES[found.kind];
    this.#badge.className = `badge ${kind}`;
    setText(this.#badge, word);
    const usesAll = config !== null && !["R", "E"].includes(config.variant);
    setText(this.#sentence, usesAll ? "Each token goes to all experts of this adapter, so there is nothing to count." : found.text);
    setText(this.#facts, `Busiest: ${found.busiest === null ? UNKNOWN : `expert ${names[found.busiest]}, ${percent(found.share)}`}. `
      + `Evenness: ${decimal(found.evenness)} of 1 (normalised entropy). Tokens counted: ${count(found.total)}, over all layers, `
      + "only in sampled engine steps (every 64th unless --expert-sampling says otherwise).");
    this.#drawBars(names, tokens, found.total);
    replace(this.#rows, names.map((name, n) => h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "number" }, count(tokens[n])),
      h("td", { class: "number" }, percent(found.total ? tokens[n] / found.total : NaN)))));
  }

  #counts(ring, from) {
    const names = ring.names("expert:").map((key) => key.slice("expert:".length)).sort((a, b) => (a === OTHER) - (b === OTHER) || a - b);
    const ends = this.#ends(ring, from, names);
    const value = (name, index) => ring.valueAt(`expert:${name}`, index) || 0;
    const tokens = names.map((name) => value(name, ends.last) - (this.#period.value === IN_WINDOW ? value(name, ends.first) : 0));
    return { names, tokens };
  }

  /** The last point with counts, and the first since `from` and since the last restart. */
  #ends(ring, from, names) {
    const key = `expert:${names[0]}`;
    let last = ring.length - 1;
    while (last > 0 && Number.isNaN(ring.valueAt(key, last))) last -= 1;
    let first = ring.firstAt(Math.max(from, ...ring.restartsSince(from)));
    while (first < last && Number.isNaN(ring.valueAt(key, first))) first += 1;
    return { first, last };
  }

  #drawBars(names, tokens, total) {
    const wide = Math.floor(this.#frame.clientWidth);
    if (wide === 0) return;
    this.#picture.setAttribute("width", wide);
    const bottom = HEIGHT - BOTTOM;
    const slot = Math.min(WIDEST_BAR, wide / Math.max(1, names.length));
    const gap = slot > 12 ? 4 : slot > 5 ? 2 : 0.5;
    const most = Math.max(...tokens, 1);
    const each = Math.ceil(PX_PER_LABEL / slot);
    const even = total / Math.max(1, names.length);
    const evenAt = Math.round(bottom - ((bottom - TOP) * even) / most) + 0.5;
    const wideOf = slot * names.length;
    replace(this.#picture,
      tokens.map((value, n) => {
        const high = ((bottom - TOP) * value) / most;
        return svg("rect", {
          class: value === most && total ? "busiest-bar" : "", x: n * slot + gap / 2, y: bottom - high, width: slot - gap,
          height: Math.max(high, value > 0 ? 1 : 0), rx: Math.min(2, slot / 6),
        },
          svg("title", {}, `expert ${names[n]}: ${count(value)} tokens, ${percent(total ? value / total : NaN)}`));
      }),
      svg("path", { class: "plot-base", d: `M0 ${bottom + 0.5}H${wideOf}` }),
      total ? svg("path", { class: "even-line", d: `M0 ${evenAt}H${wideOf}` }, svg("title", {}, "where all bars would end if all were used alike")) : null,
      names.map((name, n) => (n % each > 0 ? null
        : svg("text", { x: n * slot + slot / 2, y: HEIGHT - 5, "text-anchor": "middle" }, name === OTHER ? "64+" : name))));
  }
}
