/** A chart: its title, the picture, a legend with the values now or at the cursor, and the same as a table. */

import { h, keyed, replace, setText } from "../dom.mjs";
import { UNKNOWN } from "../format.mjs";
import { visible } from "../text.mjs";
import { Plot } from "./plot.mjs";
import { clock } from "./ticks.mjs";

const COLOURS = 8;
const TABLE_ROWS = 15;
const KEY_STEPS = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };

/** wanted: {title, hint, unit, series: [{key, label, isDashed}], prefix (of further series, by their names), labelOf(name),
 * top, area}. cursor: shared by all charts of a view. */
export class Chart {
  #wanted;
  #cursor;
  #plot;
  #time = h("span", { class: "chart-time muted small number" });
  #legend = h("ul", { class: "legend" });
  #none = h("p", { class: "legend", hidden: true }, "none so far");
  #table = h("div", { class: "chart-table", hidden: true, tabindex: "0" });
  #drawn = null;
  #series = [];
  #colours = new Map();
  #observer;

  constructor(wanted, cursor) {
    [this.#wanted, this.#cursor] = [wanted, cursor];
    const { title, unit } = wanted;
    this.#plot = new Plot(unit, wanted);
    this.frame = h("div", {
      class: "chart-frame", role: "slider", tabindex: "0", "aria-label": `${title}: a time to read`,
      "aria-valuemin": "0", "aria-valuemax": "0", "aria-valuenow": "0", "aria-valuetext": "no values yet",
      on: {
        pointermove: (event) => this.#point(event), pointerdown: (event) => this.#point(event), pointerleave: () => cursor.set(null),
        keydown: (event) => this.#key(event), blur: () => cursor.set(null),
      },
    }, this.#plot.element);
    this.switch = h("button", { class: "button small quiet", type: "button", "aria-pressed": "false", "aria-label": `${title} as a table`,
      on: { click: () => this.#toggle() } }, "Table");
    this.#table.setAttribute("aria-label", `${title}, as a table`);
    this.element = h("section", { class: "card chart", "aria-label": title },
      h("header", { class: "chart-head" }, h("h2", {}, title),
        wanted.hint ? h("span", { class: "muted small", title: wanted.hint }, wanted.hint) : null, this.#time, this.switch),
      this.frame, this.#table, this.#legend, this.#none);
    this.#observer = new ResizeObserver(([{ contentRect }]) => {
      if (this.#plot.resize(Math.floor(contentRect.width)) && this.#drawn) this.draw(...this.#drawn);
    });
    this.#observer.observe(this.frame);
  }

  end() {
    this.#observer.disconnect();
  }

  /** Show the points from `from` to `to` (unix seconds). */
  draw(ring, from, to) {
    this.#drawn = [ring, from, to];
    this.#series = this.#allSeries(ring);
    if (this.#table.hidden) this.#plot.draw(ring, this.#series, from, to);
    else this.#drawTable();
    const first = ring.firstAt(from);
    this.frame.setAttribute("aria-valuemax", String(Math.max(0, ring.length - 1 - first)));
    this.drawCursor();
  }

  #allSeries(ring) {
    const { series = [], prefix, labelOf = (name) => name } = this.#wanted;
    const prefixes = prefix === undefined ? [] : [].concat(prefix);
    const more = prefixes.flatMap((each) => ring.names(each).map((key) => ({ key, label: labelOf(key.slice(each.length), each) })));
    return [...series, ...more].map((each) => ({ ...each, colour: this.#colourOf(each.key) }));
  }

  /** A series keeps its colour, whichever others come. */
  #colourOf(key) {
    if (!this.#colours.has(key)) this.#colours.set(key, Math.min(this.#colours.size + 1, COLOURS));
    return this.#colours.get(key);
  }

  /** Show the values at the cursor, or now. */
  drawCursor() {
    if (this.#drawn === null) return;
    const [ring, from] = this.#drawn;
    const { time } = this.#cursor;
    const index = time === null ? -1 : ring.nearest(time);
    if (this.#table.hidden) this.#plot.drawCursor(ring, this.#series, index);
    const read = index >= 0 ? index : ring.length - 1;
    setText(this.#time, index >= 0 ? clock(ring.timeAt(index)) : "");
    keyed(this.#legend, this.#series, ({ key }) => key, ({ colour, label, isDashed }) => h("li", {},
      h("span", { class: `swatch colour-${colour}${isDashed ? " dashed" : ""}` }), h("span", {}, visible(label)), h("span", { class: "legend-value number" })),
    (item, { key }) => setText(item.lastElementChild, this.#wanted.unit.text(ring.valueAt(key, read))));
    this.#none.hidden = this.#series.length > 0;
    this.#legend.hidden = !this.#none.hidden;
    if (document.activeElement !== this.frame || index < 0) return;
    this.frame.setAttribute("aria-valuenow", String(Math.max(0, index - ring.firstAt(from))));
    this.frame.setAttribute("aria-valuetext", `${clock(ring.timeAt(index))}: ${this.#spoken(ring, index)}`);
  }

  #spoken(ring, index) {
    return this.#series.map(({ key, label }) => {
      const value = this.#wanted.unit.text(ring.valueAt(key, index));
      return `${visible(label)} ${value === UNKNOWN ? "no value" : value}`;
    }).join(", ") || "none";
  }

  #point(event) {
    this.#cursor.set(this.#plot.timeAt(event.clientX - this.frame.getBoundingClientRect().left));
  }

  #key(event) {
    if (event.key === "Escape") this.#cursor.set(null);
    const step = KEY_STEPS[event.key];
    if (step === undefined || this.#drawn === null) return;
    event.preventDefault();
    const [ring, from] = this.#drawn;
    const at = this.#cursor.time === null ? ring.length : ring.nearest(this.#cursor.time);
    this.#cursor.set(ring.timeAt(Math.min(Math.max(at + step, ring.firstAt(from)), ring.length - 1)));
  }

  #toggle() {
    this.#table.hidden = !this.#table.hidden;
    this.frame.hidden = !this.#table.hidden;
    this.switch.setAttribute("aria-pressed", String(this.frame.hidden));
    if (this.#drawn) this.draw(...this.#drawn);
  }

  #drawTable() {
    const [ring, from, to] = this.#drawn;
    const { unit } = this.#wanted;
    const rows = [];
    for (let n = 0, last = -1; n < TABLE_ROWS; n += 1) {
      const index = ring.nearest(to - (n * (to - from)) / TABLE_ROWS);
      if (index < 0 || index === last || ring.timeAt(index) < from) continue;
      rows.push((last = index));
    }
    replace(this.#table, h("table", {}, h("caption", { class: "visually-hidden" }, this.#wanted.title),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Time"),
        this.#series.map(({ label }) => h("th", { scope: "col", class: "number" }, visible(label))))),
      h("tbody", {}, rows.map((index) => h("tr", {}, h("th", { scope: "row", class: "number" }, clock(ring.timeAt(index))),
        this.#series.map(({ key }) => h("td", { class: "number" }, unit.text(ring.valueAt(key, index)))))))));
  }
}
