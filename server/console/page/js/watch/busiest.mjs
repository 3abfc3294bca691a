/** The list of the busiest adapters. The order is renewed every few seconds only, so that a row can be read and chosen. */

import { h, keyed, setText } from "../dom.mjs";
import { count, duration, rate } from "../format.mjs";
import { visible } from "../text.mjs";
import { byAdapter } from "./derive.mjs";
import { SLOW_S } from "./source.mjs";

const SHOWN = 10;
const ORDER_S = 5;
const OTHER = "_other";
const COLUMNS = [
  ["requests", "Requests/s", rate],
  ["generation", "Tokens/s", rate],
  ["first", "First token, mean", duration],
  ["running", "Running", count],
  ["waiting", "Waiting", count],
];

export class Busiest {
  #body = h("tbody", {});
  #found = h("p", { class: "muted small", role: "status" });
  #filter = h("input", { type: "search", "aria-label": "Filter by name", placeholder: "Filter by name", autocomplete: "off", spellcheck: "false",
    on: { input: () => this.#draw(true) } });
  #heads = new Map();
  #by = "generation";
  #order = [];
  #ordered = -Infinity;
  #rows = [];

  constructor() {
    const heads = COLUMNS.map(([key, title]) => {
      const head = h("th", { scope: "col", class: "number" }, h("button", { type: "button", on: { click: () => this.#sortBy(key) } }, title));
      this.#heads.set(key, head);
      return head;
    });
    this.element = h("section", { class: "busiest", "aria-label": "Busiest adapters" },
      h("div", { class: "head" }, h("h2", {}, "Busiest adapters"), h("span", { class: "muted small" }, `over ${SLOW_S} s`),
        h("div", { class: "head-end" }, this.#filter)),
      h("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": "Table of the busiest adapters" }, h("table", {},
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Adapter"), heads)), this.#body)), this.#found);
    this.#sortBy(this.#by);
  }

  #sortBy(key) {
    this.#by = key;
    for (const [name, head] of this.#heads) head.setAttribute("aria-sort", name === key ? "descending" : "none");
    this.#draw(true);
  }

  /** span: of the last seconds, or null. */
  update(span) {
    this.#rows = span === null ? [] : byAdapter(span);
    this.#draw(false);
  }

  #draw(isNew) {
    const wanted = this.#filter.value.trim().toLowerCase();
    const matching = this.#rows.filter(({ name }) => name.toLowerCase().includes(wanted));
    const busy = wanted ? matching : matching.filter(isBusy);
    if (isNew || performance.now() / 1000 - this.#ordered > ORDER_S) this.#reorder(busy);
    const byName = new Map(busy.map((row) => [row.name, row]));
    const rows = this.#order.map((name) => byName.get(name) ?? this.#rows.find((row) => row.name === name)).filter(Boolean);
    keyed(this.#body, rows, ({ name }) => name, ({ name }) => rowOf(name), (element, row) => {
      COLUMNS.forEach(([key, , text], n) => setText(element.children[n + 1], text(row[key])));
    });
    setText(this.#found, rows.length === 0 ? (wanted ? "No adapter with metrics of its own has this in its name." : "No requests in the last seconds.")
      : matching.length > rows.length ? `${rows.length} of ${count(matching.length)} with metrics of their own. Filter for the others.` : "\u00a0");
  }

  #reorder(rows) {
    const key = (row) => (Number.isNaN(row[this.#by]) ? -1 : row[this.#by]);
    const sorted = [...rows].sort((a, b) => key(b) - key(a) || b.requests - a.requests || (a.name < b.name ? -1 : 1));
    this.#order = sorted.slice(0, SHOWN).map(({ name }) => name);
    this.#ordered = performance.now() / 1000;
  }
}

function isBusy(row) {
  return row.requests > 0 || row.running > 0 || row.waiting > 0;
}

function rowOf(name) {
  const title = name === OTHER ? h("span", { class: "muted" }, "all others together") : h("a", { href: `#/watch/${encodeURIComponent(name)}` }, visible(name));
  return h("tr", {}, h("th", { scope: "row" }, title), COLUMNS.map(() => h("td", { class: "number" })));
}
