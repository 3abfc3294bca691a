/** The table of an adapter's versions, the newest first. */

import { copyButton } from "../../copy.mjs";
import { h, keyed, setText } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { verbFor } from "./compare.mjs";
import { showComparison } from "./compare_dialog.mjs";
import { line, setKind, setLine, setState, setTier, stateMark, tier } from "../parts.mjs";
import { showVersion } from "./version_dialog.mjs";

const FIRST_SHOWN = 25;
const MORE = 100;
const COLUMNS = [
  ["Version", "v-version"],
  ["State", "v-state"],
  ["Kind", "v-kind"],
  ["Where", "v-where"],
  ["Rows", "v-rows number"],
  ["Size", "v-size number"],
  ["Running", "v-running number"],
  ["Last used", "v-used number"],
  ["Uploaded", "v-created number"],
  ["Digest", "v-digest"],
];

/** changed(adapter): something was changed, and this is the adapter now. deleted(adapter): a version is being deleted. */
export class VersionsTable {
  #body = h("tbody");
  #shown = FIRST_SHOWN;
  #adapter = null;
  #changed;
  #deleted;
  #mayChange;
  #more = h("button", { class: "button small", type: "button", on: { click: () => this.#showMore() } });
  count = h("span", { class: "badge" });

  constructor(mayChange, changed, deleted) {
    this.#mayChange = mayChange;
    this.#changed = changed;
    this.#deleted = deleted;
    const table = h(
      "table",
      { class: "versions" },
      h("caption", { class: "visually-hidden" }, "Versions, the newest first"),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          COLUMNS.map(([title, name]) => h("th", { scope: "col", class: name }, title)),
          h("th", { scope: "col", class: "v-actions" }, h("span", { class: "visually-hidden" }, "Actions")),
        ),
      ),
      this.#body,
    );
    this.element = h("div", {}, h("div", { class: "table-frame" }, table), h("div", { class: "more" }, this.#more));
  }

  show(adapter) {
    this.#adapter = adapter;
    const newest = [...adapter.versions].sort((a, b) => b.version - a.version);
    const shown = newest.filter(
      (version, i) => i < this.#shown || version.version === adapter.active || version.state === "draining",
    );
    setText(this.count, format.count(newest.length));
    keyed(
      this.#body,
      shown,
      (version) => version.version,
      (version) => this.#row(version),
      (row, version) => this.#fill(row, version),
    );
    this.#more.hidden = shown.length >= newest.length;
    setText(this.#more, `Show more (${format.count(newest.length - shown.length)})`);
  }

  #showMore() {
    this.#shown += MORE;
    this.show(this.#adapter);
  }

  #row({ version, digest }) {
    const now = () => this.#adapter.versions.find((one) => one.version === version);
    const act = (open) => () => now() && open(this.#adapter, now(), this.#changed, this.#deleted);
    const parts = {
      number: h("span", { class: "version-number number" }, `@${version}`),
      active: h("span", { class: "badge accent" }, "active"),
      description: line(""),
      state: stateMark(),
      where: tier(),
      activate: h("button", { class: "button small", type: "button", on: { click: act(showComparison) } }),
    };
    const label = `Details of version ${version}`;
    const details = h(
      "button",
      { class: "button small quiet", type: "button", "aria-label": label, on: { click: act(showVersion) } },
      "Details",
    );
    const cells = {
      "v-version": [
        h("div", { class: "version-line" }, parts.number, parts.active),
        h("div", { class: "under" }, parts.description),
      ],
      "v-state": [parts.state],
      "v-where": [parts.where],
      "v-digest": [
        h(
          "span",
          { class: "digest" },
          h("span", { class: "mono", title: digest }, digest.slice(0, 8)),
          copyButton(() => digest, `the digest of version ${version}`),
        ),
      ],
    };
    const row = h("tr", { data: { testid: `version-${version}` } });
    row._parts = parts;
    row._cells = {};
    for (const [, name] of COLUMNS) {
      const key = name.split(" ")[0];
      const isHead = key === "v-version";
      row._cells[key] = h(isHead ? "th" : "td", { class: name, scope: isHead ? "row" : null }, cells[key] ?? []);
      row.append(row._cells[key]);
    }
    row.append(h("td", { class: "v-actions" }, h("div", { class: "row-actions" }, parts.activate, details)));
    return row;
  }

  #fill(row, version) {
    const { _parts: parts, _cells: cells } = row;
    const { active } = this.#adapter;
    const isActive = version.version === active;
    row.classList.toggle("is-active", isActive);
    parts.active.hidden = !isActive;
    setLine(parts.description, version.reason ?? version.description);
    parts.description.classList.toggle("problem", version.reason !== null);
    setState(parts.state, version);
    setKind(cells["v-kind"], version);
    setTier(parts.where, version);
    setText(cells["v-rows"], format.count(version.rows));
    setText(cells["v-size"], format.bytes(version.size_bytes));
    setText(cells["v-running"], format.count(version.requests_running ?? NaN));
    cells["v-running"].classList.toggle("nothing", !(version.requests_running > 0));
    setText(cells["v-used"], format.ago(version.last_used ?? NaN));
    cells["v-used"].title = version.last_used ? format.date(version.last_used) : "Not used since the server started";
    setText(cells["v-created"], format.ago(version.created));
    cells["v-created"].title = format.date(version.created);
    parts.activate.hidden = isActive || version.state === "draining";
    const verb = this.#mayChange ? verbFor(active, version.version) : "Compare";
    setText(parts.activate, verb);
    parts.activate.setAttribute(
      "aria-label",
      `${verb} version ${version.version}${this.#mayChange ? "" : " with the active one"}`,
    );
  }
}
