/** The figures of one adapter at the top of its view. */

import { h, setText } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { activeOf } from "../names.mjs";
import { setKind, setTier, tier } from "../parts.mjs";

const FIRST = "perft_adapter_time_to_first_token_seconds";
const NO_SERIES = "Not used since the server started, or beyond the number of adapters that are counted by name";

export class Figures {
  #where = tier();
  #values = new Map();
  #hasMetrics = false;
  #wasUsed = false;

  constructor(mayWatch) {
    const figure = (key, title, hint, ...value) => {
      const element = h("dd", { class: "number" }, ...(value.length ? value : [format.UNKNOWN]));
      const under = h("span", { class: "muted small number" });
      this.#values.set(key, { element, under });
      return h("div", { class: "figure", title: hint }, h("dt", {}, title), element, h("dd", { class: "figure-under" }, under));
    };
    this.element = h(
      "dl",
      { class: "figures" },
      mayWatch
        ? [
            figure("rate", "Requests / s", "Requests that ended, over the last 30 seconds"),
            figure(
              "first",
              "First token",
              "Half of the requests of the last 30 seconds had their first token within this time",
            ),
            figure("tokens", "Tokens / s", "Generated, over the last 30 seconds"),
          ]
        : null,
      figure("running", "Running", "Requests in the engine"),
      mayWatch ? figure("waiting", "Waiting", "Requests that wait for the adapter, or for a free place in the engine") : null,
      figure("where", "Where", "Where the active version is", this.#where),
      figure("kind", "Kind", "Variant, experts for each token of all experts, bottleneck"),
      figure("used", "Last used", "Any version, since the server started"),
    );
  }

  show(adapter) {
    const active = activeOf(adapter);
    setTier(this.#where, active);
    this.#under("where", active ? `${format.count(active.rows)} rows` : "no active version");
    setKind(this.#values.get("kind").element, active);
    this.#under("kind", active?.expert_type ? `${active.expert_type} experts` : "");
    const used = Math.max(...adapter.versions.map((version) => version.last_used ?? -Infinity));
    this.#wasUsed = Number.isFinite(used);
    this.#set("used", format.ago(used));
    this.#under("used", Number.isFinite(used) ? new Date(used * 1000).toLocaleTimeString([], { hour12: false }) : "not since the start");
    this.#values.get("used").element.title = format.date(used);
    if (!this.#hasMetrics) this.#set("running", format.count(runningOf(adapter)));
  }

  showMetrics(scrapes) {
    const { last, window } = scrapes;
    const running = last.sum("perft_adapter_requests_running");
    this.#hasMetrics = Number.isFinite(running);
    this.element.title = this.#hasMetrics ? "" : NO_SERIES;
    if (!this.#hasMetrics) return;
    this.#set("running", format.count(running));
    this.#set("waiting", format.count(last.sum("perft_adapter_requests_waiting")));
    if (window === null) return;
    this.#set("rate", format.decimal(this.#rate(window, "perft_adapter_requests_total")));
    this.#set("tokens", format.decimal(this.#rate(window, "perft_adapter_generation_tokens_total")));
    const [half, most] = [window.quantile(FIRST, 0.5), window.quantile(FIRST, 0.95)];
    this.#set("first", format.duration(half));
    this.#under("first", Number.isFinite(most) ? `95 % within ${format.duration(most)}` : "no requests lately");
  }

  /** Without a series nothing happened, if it was never used; else it is beyond the number of names that are counted. */
  #rate(window, name) {
    const rate = window.rate(name);
    return Number.isNaN(rate) && !this.#wasUsed ? 0 : rate;
  }

  #set(key, text) {
    const { element } = this.#values.get(key);
    setText(element, text);
  }

  #under(key, text) {
    setText(this.#values.get(key).under, text);
  }
}

/** Requests of all versions; NaN where this key may not know. */
function runningOf(adapter) {
  return adapter.versions.reduce((sum, version) => sum + (version.requests_running ?? NaN), 0);
}
