/** The device's pool as a picture: who holds which share of its rows, who came and who left. */

import { getJson } from "../../api.mjs";
import { h, keyed, setText } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { deviceRoute } from "../listing.mjs";
import { poolOf } from "./pool.mjs";
import { poolLog } from "./log.mjs";
import { fillHolder, fillSegment, makeHolder, makeSegment, restOfBar, restOfList, summaryOf } from "./shares.mjs";

const MOST_LISTED = 300;
const LEAVING_MS = 2500;
const SHOWN_HOLDERS = 12;
const SHOWN_ON_A_PHONE = 4;
const phone = matchMedia("(max-width: 760px)");

export class PoolPicture {
  #nobody = h("p", { class: "muted small" }, "No adapter is on the device now.");
  #bar = h("div", { class: "pool-bar", "aria-hidden": "true" });
  #summary = h("p", { class: "muted number" });
  #holders = h("ul", { class: "holders", "aria-label": "Who holds rows of the device's pool" });
  #more = h("button", {
    class: "button quiet small",
    type: "button",
    "aria-expanded": "false",
    on: { click: () => this.#toggle() },
  });
  #list = h("div", {}, this.#nobody, this.#holders, this.#more);
  #resized = () => this.#loosen();
  #events = h("ol", { class: "events", "aria-label": "Last loads and evictions" });
  #evictions = h("span", { class: "muted small number" });
  #scrape = null;
  #leaving = new Map();
  #timers = new Set();
  #isWide = false;
  #isLooked = false;
  #tallest = 0;
  #isSeen;
  /** Settles once the picture was drawn, or could not be. */
  seen = new Promise((resolve) => {
    this.#isSeen = resolve;
  });

  constructor(mayWatch) {
    window.addEventListener("resize", this.#resized);
    this.element = h(
      "section",
      { class: "card pool", "aria-labelledby": "pool-title", hidden: true },
      h(
        "div",
        { class: "pool-head" },
        h("h2", { id: "pool-title" }, mayWatch ? "Device pool" : "On the device"),
        this.#summary,
      ),
      this.#bar,
      h(
        "div",
        { class: "pool-below" },
        this.#list,
        h(
          "div",
          { class: "pool-events" },
          h("div", { class: "pool-events-head" }, h("h3", {}, "Loads and evictions"), mayWatch ? this.#evictions : null),
          this.#events,
        ),
      ),
    );
  }

  /** Ask who is on the device, and show it. Raises ApiError. */
  async look() {
    const { data, total } = await getJson(deviceRoute(MOST_LISTED)).finally(this.#isSeen);
    const left = await poolLog.take({ adapters: data, isAll: total <= data.length });
    for (const occupant of left) this.#leaves(occupant);
    this.#isLooked = true;
    this.#draw();
  }

  showMetrics(scrapes) {
    this.#scrape = scrapes.last;
    const span = scrapes.window;
    const evicted = span?.increase("perft_adapter_evictions_total", { tier: "device" });
    setText(
      this.#evictions,
      Number.isFinite(evicted) ? `${format.count(evicted)} evicted in the last ${Math.round(span.seconds)} s` : "",
    );
    if (this.#isLooked) this.#draw();
  }

  close() {
    window.removeEventListener("resize", this.#resized);
    for (const timer of this.#timers) clearTimeout(timer);
  }

  /** Show for a moment that it leaves. */
  #leaves(occupant) {
    this.#leaving.set(occupant.id, occupant);
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      this.#leaving.delete(occupant.id);
      this.#draw();
    }, LEAVING_MS);
    this.#timers.add(timer);
  }

  #toggle() {
    this.#isWide = !this.#isWide;
    this.#loosen();
    this.#draw();
  }

  /** The list keeps the height that it once had: what is below stays where it is while adapters come and go. */
  #steady() {
    this.#tallest = Math.max(this.#tallest, this.#list.offsetHeight);
    this.#list.style.minHeight = `${this.#tallest}px`;
  }

  #loosen() {
    this.#tallest = 0;
    this.#list.style.minHeight = "";
  }

  #draw() {
    const used = this.#scrape?.sum("perft_device_rows_used") ?? NaN;
    const total = this.#scrape?.sum("perft_device_rows_total") ?? NaN;
    const pool = poolOf(poolLog.list.adapters, poolLog.list.isAll, used, total);
    this.element.hidden = false;
    setText(this.#summary, summaryOf(pool));
    keyed(this.#bar, this.#segments(pool), (segment) => segment.key, makeSegment, fillSegment);
    const rest = restOfList(pool);
    const most = (phone.matches ? SHOWN_ON_A_PHONE : SHOWN_HOLDERS) - rest.length;
    const shown = this.#isWide ? pool.holders : pool.holders.slice(0, most);
    this.#nobody.hidden = shown.length + rest.length > 0;
    this.#holders.hidden = !this.#nobody.hidden;
    keyed(
      this.#holders,
      [...shown, ...rest],
      (holder) => holder.key,
      makeHolder,
      (item, holder) => fillHolder(item, holder, pool),
    );
    const hidden = pool.holders.length - most;
    this.#more.hidden = hidden <= 0;
    this.#more.setAttribute("aria-expanded", String(this.#isWide));
    setText(this.#more, this.#isWide ? "Show fewer" : `Show ${hidden} more`);
    poolLog.draw(this.#events);
    this.#steady();
  }

  #segments(pool) {
    const segments = pool.pieces.map((holder) => ({ ...holder, kind: "holder" }));
    for (const { id, name, rows } of this.#leaving.values())
      segments.push({ key: `leaving ${id}`, kind: "leaving", name, rows });
    segments.push(...restOfBar(pool));
    if (pool.free > 0)
      segments.push({ key: "free", kind: "free", title: `${format.count(pool.free)} rows free`, rows: pool.free });
    return segments;
  }
}
