/** The table of adapters: a row for each, kept in its place while its values change. */

import { h, keyed, setText } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { ariaSort, nextSort } from "../listing.mjs";
import { activeOf, hrefOf } from "../names.mjs";
import { line, lockMark, pinMark, setKind, setLine, setState, setTier, stateMark, hue, tier } from "../parts.mjs";

/** key, head, title, sort of the API, class; watch: only for keys that may read the metrics. */
const COLUMNS = [
  { key: "name", head: "Name", sort: "name", class: "c-name" },
  { key: "active", head: "Active", title: "The version that the bare name selects", class: "c-active number" },
  { key: "state", head: "State", class: "c-state" },
  {
    key: "where",
    head: "Where",
    title: "Where the active version is: on the device, in host memory, on disk",
    class: "c-where",
  },
  {
    key: "rows",
    head: "Rows",
    title: "Rows of the device's pool that the active version takes",
    sort: "rows",
    class: "c-rows number",
  },
  { key: "running", head: "Running", title: "Requests in the engine", sort: "running", class: "c-running number" },
  {
    key: "waiting",
    head: "Waiting",
    title: "Requests that wait for the adapter, or for a free place in the engine",
    class: "c-waiting number",
    watch: true,
  },
  {
    key: "rate",
    head: "Req/s",
    title: "Requests that ended per second, over the last 30 seconds",
    class: "c-rate number",
    watch: true,
  },
  {
    key: "first",
    head: "First token",
    title: "Mean time to the first token, over the last 30 seconds",
    class: "c-first number",
    watch: true,
  },
  { key: "used", head: "Last used", sort: "last_used", class: "c-used number" },
  {
    key: "created",
    head: "Uploaded",
    title: "When the active version was uploaded",
    sort: "created",
    class: "c-created number",
  },
];

/** sorted(sort): somebody chose another order. mayWatch: whether there are metrics. */
export class AdapterTable {
  #heads = new Map();
  #columns;
  #body = h("tbody");
  #caption = h("caption", { class: "visually-hidden" });
  #traffic = null;
  #sort = "name";
  adapters = [];

  constructor(mayWatch, sorted) {
    this.#columns = COLUMNS.filter((column) => mayWatch || !column.watch);
    const heads = this.#columns.map((column) => {
      const click = () => sorted(nextSort(this.#sort, column.sort));
      const head = h(
        "th",
        { scope: "col", class: column.class, title: column.title },
        column.sort ? h("button", { type: "button", on: { click } }, column.head) : column.head,
      );
      this.#heads.set(column, head);
      return head;
    });
    this.table = h("table", { class: "adapters" }, this.#caption, h("thead", {}, h("tr", {}, heads)), this.#body);
    this.element = h("div", { class: "table-frame" }, this.table);
  }

  /** Whether somebody points at a row or has the focus in one: then no row should move. */
  get isHeld() {
    return this.#body.matches(":hover") || this.#body.contains(document.activeElement);
  }

  show(adapters, sort, caption) {
    this.adapters = adapters;
    this.#sort = sort;
    setText(this.#caption, caption);
    for (const [column, head] of this.#heads) {
      const value = ariaSort(sort, column.sort);
      if (value === null) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", value);
    }
    keyed(
      this.#body,
      adapters,
      (adapter) => adapter.name,
      (adapter) => this.#row(adapter),
      (row, adapter) => this.#fill(row, adapter),
    );
  }

  /** traffic: Traffic, or null. */
  showTraffic(traffic) {
    this.#traffic = traffic;
    for (const row of this.#body.children) this.#fillTraffic(row, row._adapter);
  }

  #row(adapter) {
    const parts = {
      name: h("a", { class: "name", href: hrefOf(adapter.name) }, h("bdi", {}, adapter.name)),
      marks: h("span", { class: "marks" }),
      brief: h("span", { class: "brief" }),
      kind: h("span", { class: "kind" }),
      description: line(""),
      state: stateMark(),
      where: tier(),
    };
    const cells = {
      name: [
        h("div", { class: "name-line" }, hue(adapter.name), parts.name, parts.marks),
        h("div", { class: "under" }, parts.brief, parts.kind, parts.description),
      ],
      state: [parts.state],
      where: [parts.where],
    };
    const row = h("tr", {
      class: "link",
      data: { testid: `adapter-${adapter.name}` },
      on: { click: (event) => follow(event, parts.name) },
    });
    row._parts = parts;
    row._cells = {};
    for (const column of this.#columns) {
      const cell = h(
        column.key === "name" ? "th" : "td",
        { class: column.class, scope: column.key === "name" ? "row" : null },
        cells[column.key],
      );
      row._cells[column.key] = cell;
      row.append(cell);
    }
    return row;
  }

  #fill(row, adapter) {
    row._adapter = adapter;
    const { _parts: parts, _cells: cells } = row;
    const active = activeOf(adapter);
    const shown = active ?? adapter.versions.at(-1) ?? null;
    const marks = `${adapter.pinned} ${JSON.stringify(adapter.allowed_keys)}`;
    if (row._marks !== marks) {
      row._marks = marks;
      parts.marks.replaceChildren(
        ...[adapter.pinned ? pinMark() : null, adapter.allowed_keys ? lockMark(adapter.allowed_keys) : null].filter(Boolean),
      );
    }
    parts.name.title = adapter.name;
    setText(
      parts.brief,
      active === null ? "not active" : active.state === "ready" ? `@${active.version}` : `@${active.version} ${active.state}`,
    );
    setKind(parts.kind, shown);
    setLine(parts.description, shown?.reason ?? shown?.description);
    parts.description.classList.toggle("problem", Boolean(shown?.reason));
    setText(cells.active, adapter.active === null ? format.UNKNOWN : `@${adapter.active}`);
    row.classList.toggle("gone", adapter.isGone === true);
    setState(parts.state, active ?? (shown?.state === "draining" ? shown : null));
    setTier(parts.where, active);
    if (adapter.isGone) {
      parts.state.className = "badge";
      setText(parts.state, "gone");
      setText(parts.brief, "gone");
      setTier(parts.where, null);
    }
    setText(cells.rows, active ? format.count(active.rows) : format.UNKNOWN);
    setText(cells.used, format.ago(shown?.last_used ?? NaN));
    cells.used.title = shown?.last_used ? format.date(shown.last_used) : "Not used since the server started";
    setText(cells.created, format.ago(shown?.created ?? NaN));
    cells.created.title = format.date(shown?.created ?? NaN);
    this.#fillTraffic(row, adapter);
  }

  #fillTraffic(row, adapter) {
    const { _cells: cells } = row;
    const figures = this.#traffic?.of(adapter.name);
    const running = figures?.running ?? activeOf(adapter)?.requests_running ?? NaN;
    setNumber(cells.running, running, format.count);
    if (cells.waiting === undefined) return;
    setNumber(cells.waiting, figures?.waiting ?? NaN, format.count);
    setNumber(cells.rate, figures?.perSecond ?? NaN, format.decimal);
    setText(cells.first, format.duration(figures?.firstToken ?? NaN));
  }
}

/** Nothing is grey, so that what happens stands out. */
function setNumber(cell, value, write) {
  cell.classList.toggle("nothing", !(value > 0));
  setText(cell, write(value));
}

/** A click anywhere in a row follows its link, unless somebody selects text or asks for a new tab on the link itself. */
function follow(event, link) {
  if (event.target.closest("a, button") || event.defaultPrevented || String(getSelection())) return;
  if (event.ctrlKey || event.metaKey) window.open(link.href, "_blank", "noopener");
  else link.click();
}
