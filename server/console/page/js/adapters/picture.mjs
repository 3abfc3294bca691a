/** The device's pool as a picture: who holds which share of its rows, who came and who left. */

import { getJson } from "../api.mjs";
import { h, keyed, setText } from "../dom.mjs";
import * as format from "../format.mjs";
import { icon } from "../icons.mjs";
import { deviceRoute } from "./listing.mjs";
import { colourOf, hrefOf, routeOf } from "./names.mjs";
import { hue } from "./parts.mjs";
import { changesOf, poolOf } from "./pool.mjs";

const MOST_LISTED = 300;
const LEAVING_MS = 2500;
const MOST_EVENTS = 30;
const SHOWN_EVENTS = 6;
const SHOWN_HOLDERS = 12;
const SHOWN_ON_A_PHONE = 4;
const phone = matchMedia("(max-width: 760px)");
const MOST_LOOKUPS = 5;

/** What happened since this tab was opened, the newest first: {id, at, what, name, version, rows}. */
const events = [];
let eventsSeen = 0;
/** The last list of those on the device: {adapters, isAll}. */
let before = null;

export class PoolPicture {
  #bar = h("div", { class: "pool-bar", "aria-hidden": "true" });
  #summary = h("p", { class: "muted number" });
  #holders = h("ul", { class: "holders", "aria-label": "Who holds rows of the device's pool" });
  #more = h("button", { class: "button quiet small", type: "button", "aria-expanded": "false", on: { click: () => this.#toggle() } });
  #events = h("ol", { class: "events", "aria-label": "Last loads and evictions" });
  #evictions = h("span", { class: "muted small number" });
  #scrape = null;
  #leaving = new Map();
  #timers = new Set();
  #isWide = false;
  #isSeen;
  /** Settles once the picture was drawn, or could not be. */
  seen = new Promise((resolve) => {
    this.#isSeen = resolve;
  });

  constructor(mayWatch) {
    this.element = h("section", { class: "card pool", "aria-labelledby": "pool-title", hidden: true },
      h("div", { class: "pool-head" }, h("h2", { id: "pool-title" }, mayWatch ? "Device pool" : "On the device"), this.#summary),
      this.#bar,
      h("div", { class: "pool-below" }, h("div", {}, this.#holders, this.#more),
        h("div", { class: "pool-events" }, h("div", { class: "pool-events-head" }, h("h3", {}, "Loads and evictions"), mayWatch ? this.#evictions : null), this.#events)));
  }

  /** Ask who is on the device, and show it. Raises ApiError. */
  async look() {
    const { data, total } = await getJson(deviceRoute(MOST_LISTED)).finally(this.#isSeen);
    const now = { adapters: data, isAll: total <= data.length };
    if (before !== null) {
      const { came, left } = changesOf(before, now);
      for (const occupant of came) this.#happened("loaded", occupant);
      await this.#theyLeft(left);
    }
    before = now;
    this.#draw();
  }

  showMetrics(scrapes) {
    this.#scrape = scrapes.last;
    const span = scrapes.window;
    const evicted = span?.increase("perft_adapter_evictions_total", { tier: "device" });
    setText(this.#evictions, Number.isFinite(evicted) ? `${format.count(evicted)} evicted in the last ${Math.round(span.seconds)} s` : "");
    if (before !== null) this.#draw();
  }

  close() {
    for (const timer of this.#timers) clearTimeout(timer);
  }

  /** Say of each that left whether it was evicted, deleted or replaced. */
  async #theyLeft(left) {
    await Promise.all(left.map(async (occupant, i) => {
      this.#happened(i < MOST_LOOKUPS ? await whyLeft(occupant) : "left", occupant);
    }));
  }

  #happened(what, occupant) {
    events.unshift({ ...occupant, id: ++eventsSeen, what, at: Date.now() / 1000 });
    events.length = Math.min(events.length, MOST_EVENTS);
    if (what === "loaded") return;
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
    this.#draw();
  }

  #draw() {
    const used = this.#scrape?.sum("perft_device_rows_used") ?? NaN;
    const total = this.#scrape?.sum("perft_device_rows_total") ?? NaN;
    const pool = poolOf(before.adapters, before.isAll, used, total);
    this.element.hidden = !(pool.whole > 0);
    setText(this.#summary, summaryOf(pool));
    keyed(this.#bar, this.#segments(pool), (segment) => segment.key, makeSegment, fillSegment);
    const most = phone.matches ? SHOWN_ON_A_PHONE : SHOWN_HOLDERS;
    const shown = this.#isWide ? pool.holders : pool.holders.slice(0, most);
    keyed(this.#holders, [...shown, ...restOf(pool)], (holder) => holder.key, makeHolder, (item, holder) => fillHolder(item, holder, pool));
    const hidden = pool.holders.length - most;
    this.#more.hidden = hidden <= 0;
    this.#more.setAttribute("aria-expanded", String(this.#isWide));
    setText(this.#more, this.#isWide ? "Show fewer" : `Show ${hidden} more`);
    this.#events.classList.toggle("any", events.length > 0);
    keyed(this.#events, events.length ? events.slice(0, SHOWN_EVENTS) : [{ id: 0 }], (event) => event.id, makeEvent, () => {});
  }

  #segments(pool) {
    const segments = pool.holders.map((holder) => ({ ...holder, kind: "holder" }));
    for (const { id, name, rows } of this.#leaving.values()) segments.push({ key: `leaving ${id}`, kind: "leaving", name, rows });
    segments.push(...restOf(pool));
    if (pool.free > 0) segments.push({ key: "free", kind: "free", title: `${format.count(pool.free)} rows free`, rows: pool.free });
    return segments;
  }
}

/** What holds rows and is not shown one by one. */
function restOf({ others, besides }) {
  const rest = [];
  if (others.rows > 0) rest.push({ key: "others", kind: "others", title: `${format.count(others.adapters)}${others.isAll ? "" : "+"} others`, rows: others.rows });
  if (besides > 0) {
    rest.push({ key: "besides", kind: "besides", rows: besides, title: others.isAll ? "Other versions, and loads under way" : "Further adapters and versions" });
  }
  return rest;
}

function summaryOf({ used, total, whole, pinned, count }) {
  const adapters = `${format.count(count)} ${count === 1 ? "adapter" : "adapters"}`;
  const held = Number.isFinite(total) ? `${format.count(used)} of ${format.count(total)} rows (${Math.round((100 * used) / whole)} %)` : `${format.count(used)} rows`;
  return [held, adapters, pinned ? `${format.count(pinned)} rows pinned` : null].filter(Boolean).join(" \u00b7 ");
}

function makeSegment(segment) {
  const label = h("span", { class: "segment-label" });
  const colour = segment.name === undefined ? "" : ` c${colourOf(segment.name)}`;
  const properties = { class: `segment ${segment.kind}${colour}` };
  const element = segment.kind === "holder" ? h("a", { ...properties, href: hrefOf(segment.name), tabindex: "-1" }) : h("span", properties);
  element.append(label);
  if (segment.kind === "leaving") requestAnimationFrame(() => element.classList.add("gone"));
  return element;
}

function fillSegment(element, { kind, name, names, version, rows, pinned, title }) {
  element.style.flexGrow = kind === "leaving" && element.classList.contains("gone") ? 0 : rows;
  element.classList.toggle("pinned", pinned === true);
  const text = title ?? `${name}${version ? `@${version}` : ""}`;
  setText(element.firstChild, kind === "free" ? "free" : title ?? name);
  element.title = kind === "leaving" ? `${text} left the device` : `${text}: ${format.count(rows)} rows${names?.length > 1 ? `, shared by ${names.join(", ")}`.slice(0, 300) : ""}`;
}

function makeHolder(holder) {
  const name = holder.kind ? h("span", { class: "holder-name" }) : h("a", { class: "holder-name", href: hrefOf(holder.name) });
  return h("li", {}, holder.kind ? h("span", { class: `hue ${holder.kind}`, "aria-hidden": "true" }) : hue(holder.name),
    name, h("span", { class: "holder-marks" }), h("span", { class: "holder-rows number" }));
}

function fillHolder(item, holder, pool) {
  const [, name, marks, rows] = item.children;
  setText(name, holder.title ?? `${holder.name}@${holder.version}`);
  name.title = holder.names?.join(", ").slice(0, 300) ?? holder.title;
  const shared = holder.names?.length > 1 ? `+${holder.names.length - 1}` : "";
  const state = `${holder.pinned} ${shared}`;
  if (item._state !== state) {
    item._state = state;
    marks.replaceChildren(...[
      shared ? h("span", { class: "badge", title: `The same content as ${holder.names.slice(1).join(", ")}`.slice(0, 300) }, shared, h("span", { class: "visually-hidden" }, " with the same content")) : null,
      holder.pinned ? h("span", { class: "mark", title: "Pinned: stays on the device" }, icon("pin"), h("span", { class: "visually-hidden" }, "pinned")) : null,
    ].filter(Boolean));
  }
  const share = Number.isFinite(pool.total) ? ` \u00b7 ${format.percent(Math.round((1000 * holder.rows) / pool.whole) / 1000)}` : "";
  setText(rows, `${format.count(holder.rows)} rows${share}`);
}

const WORDS = { loaded: "loaded", host: "evicted to host", disk: "evicted to disk", deleted: "deleted", replaced: "replaced", left: "left the device" };

function makeEvent({ id, at, what, name, version, rows }) {
  if (id === 0) return h("li", { class: "muted small" }, "None since this page was opened.");
  const time = new Date(at * 1000).toLocaleTimeString([], { hour12: false });
  return h("li", { class: what === "loaded" ? "came" : "left" }, h("time", { class: "number muted" }, time),
    h("a", { href: hrefOf(name), class: "holder-name" }, `${name}@${version}`), h("span", { class: "event-what" }, WORDS[what]),
    h("span", { class: "number muted" }, `${format.count(rows)} rows`));
}

/** Whether a version was evicted (and to where), deleted, or is only not the active one any more. */
async function whyLeft({ name, version }) {
  try {
    const { state, resident } = await getJson(routeOf(name, version));
    if (state === "draining") return "deleted";
    return resident === "device" ? "replaced" : resident;
  } catch (error) {
    return error.status === 404 ? "deleted" : "left";
  }
}
