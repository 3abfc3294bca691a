/** The dialog that shows what differs between the active version and another, and activates it. */

import { getJson, sendJson } from "../../api.mjs";
import { h, replace, showDialog, toast } from "../../dom.mjs";
import { session } from "../../session.mjs";
import { visible } from "../../text.mjs";
import { compare, verbFor, whatHappened } from "./compare.mjs";
import { activeOf, playgroundOf, routeOf } from "../names.mjs";
import { actionButton, curlBox, problemBox } from "../parts.mjs";

/** changed(adapter): it was activated, or somebody else changed it meanwhile. */
export function showComparison(adapter, version, changed) {
  const mayChange = session.may("change");
  const verb = mayChange ? verbFor(adapter.active, version.version) : "Compare";
  const id = `${adapter.name}@${version.version}`;
  const title = { Activate: `Activate ${id}`, "Roll back": `Roll back to ${id}`, Compare: `${id}, compared` }[verb];
  showDialog(title, (close) => new Comparison(adapter, version, verb, changed, close).element, { wide: true });
}

class Comparison {
  #note = h("div", { class: "note warn", role: "alert", hidden: true });
  #table = h("div", { class: "table-frame compare-frame", role: "region", "aria-label": "Comparison", tabindex: "0" });
  #links = h("div", {});
  #curl = curlBox(() => ({ method: "PATCH", path: routeOf(this.adapter.name), body: this.#change() }));

  constructor(adapter, version, verb, changed, close) {
    Object.assign(this, { adapter, version, changed, close });
    this.problem = h("div", {});
    const failed = (error) => this.#failed(error);
    const activate =
      verb === "Compare" ? null : actionButton({ class: "button primary" }, [verb], () => this.#activate(), failed);
    this.element = h(
      "div",
      { class: "grid" },
      this.#note,
      this.#table,
      verb === "Compare"
        ? null
        : h(
            "p",
            { class: "muted small" },
            "Requests that run keep the version that they began with. The new one is loaded to the host before it becomes active.",
          ),
      verb === "Compare" ? null : this.#curl,
      this.problem,
      h(
        "div",
        { class: "dialog-end spread" },
        this.#links,
        h("button", { class: "button", type: "button", on: { click: close } }, activate ? "Cancel" : "Close"),
        activate,
      ),
    );
    this.#draw();
  }

  #change() {
    return { active: this.version.version, if_active: this.adapter.active };
  }

  async #activate() {
    replace(this.problem);
    const adapter = await sendJson("PATCH", routeOf(this.adapter.name), this.#change());
    this.changed(adapter);
    this.close();
    toast(`${adapter.name}@${adapter.active} is active now.`);
  }

  async #failed(error) {
    if (error.code !== "active_changed") {
      replace(this.problem, problemBox(error));
      return;
    }
    const expected = this.adapter.active;
    try {
      this.adapter = await getJson(routeOf(this.adapter.name));
    } catch (second) {
      replace(this.problem, problemBox(second));
      return;
    }
    this.changed(this.adapter);
    this.version = this.adapter.versions.find((one) => one.version === this.version.version) ?? this.version;
    replace(this.#note, whatHappened(this.adapter.name, expected, this.adapter));
    this.#note.hidden = false;
    this.#draw();
    this.#curl.refresh();
  }

  #draw() {
    const active = activeOf(this.adapter);
    this.#drawRows(active, compare(active, this.version));
    const models = [active, this.version].filter(Boolean).map((one) => one.id);
    replace(
      this.#links,
      h("a", { class: "button", href: playgroundOf(...new Set(models)), on: { click: this.close } }, "Ask both side by side"),
    );
    if (session.may("change")) this.#withConfigs(active);
  }

  /** The configurations say more than the API's object: they are added once they are here. */
  async #withConfigs(active) {
    const read = (version) => getJson(`${routeOf(this.adapter.name, version.version)}/files/config`).catch(() => null);
    const configs = await Promise.all([active === null ? null : read(active), read(this.version)]);
    if (active?.version === activeOf(this.adapter)?.version) this.#drawRows(active, compare(active, this.version, configs));
  }

  #drawRows(active, rows) {
    const mark = (row) => (row.differs ? "differs" : "same");
    const value = (text, row) =>
      h(
        "td",
        {},
        h("div", { class: row.field === "digest" ? "mono compare-value" : "compare-value", dir: "auto" }, visible(text)),
      );
    const [differing, same] = [rows.filter((row) => row.differs), rows.filter((row) => !row.differs)];
    const body = (some) =>
      some.map((row) =>
        h("tr", { class: mark(row) }, h("th", { scope: "row" }, row.title), value(row.before, row), value(row.after, row)),
      );
    const head = h(
      "thead",
      {},
      h(
        "tr",
        {},
        h("th", { scope: "col" }, "What differs"),
        h("th", { scope: "col" }, active ? `@${active.version}, active now` : "none active"),
        h("th", { scope: "col" }, `@${this.version.version}`),
      ),
    );
    const isAlike = !differing.some((row) => row.matters);
    replace(
      this.#table,
      h(
        "table",
        { class: "compare" },
        head,
        h("tbody", {}, body(differing)),
        same.length
          ? h(
              "tbody",
              { class: "same-rows" },
              h(
                "tr",
                {},
                h(
                  "th",
                  { colspan: 3, scope: "rowgroup", class: "muted" },
                  isAlike ? "All else is the same:" : "The same in both:",
                ),
              ),
              body(same),
            )
          : null,
      ),
    );
  }
}
