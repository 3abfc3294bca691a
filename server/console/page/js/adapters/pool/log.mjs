/** Keeps what happened on the device since this tab was opened: who was loaded, evicted, deleted. */

import { getJson } from "../../api.mjs";
import { h, keyed } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { session } from "../../session.mjs";
import { hrefOf, routeOf } from "../names.mjs";
import { changesOf } from "./pool.mjs";

const MOST_KEPT = 30;
const SHOWN = 6;
const MOST_LOOKUPS = 5;
/** Seconds after which two looks are too far apart to say when something happened. */
const LONGEST_GAP_S = 30;

class PoolLog {
  /** The last list of those on the device: {adapters, isAll}; null before the first. */
  list = null;
  /** The newest first: {id, key, at, what, name, version, rows}. */
  #events = [];
  #count = 0;
  #at = -Infinity;
  #whose = null;

  /** Take the next list. Returns those who left: each {id, name, version, rows}. */
  async take(list) {
    const now = performance.now() / 1000;
    const whose = JSON.stringify([session.facts.label, session.facts.may]);
    if (whose !== this.#whose) this.#events = [];
    const isNext = whose === this.#whose && now - this.#at < LONGEST_GAP_S;
    const { came, left } = isNext ? changesOf(this.list, list) : { came: [], left: [] };
    Object.assign(this, { list });
    this.#at = now;
    this.#whose = whose;
    for (const occupant of came) this.#add("loaded", occupant);
    const why = await Promise.all(left.map((occupant, i) => (i < MOST_LOOKUPS ? whyLeft(occupant) : "left")));
    left.forEach((occupant, i) => this.#add(why[i], occupant));
    return left;
  }

  /** Show the last of it in `element`. */
  draw(element) {
    const shown = this.#events.length ? this.#events.slice(0, SHOWN) : [{ key: 0 }];
    keyed(
      element,
      shown,
      (event) => event.key,
      makeEvent,
      () => {},
    );
  }

  #add(what, occupant) {
    this.#count += 1;
    this.#events.unshift({ ...occupant, key: this.#count, what, at: Date.now() / 1000 });
    this.#events.length = Math.min(this.#events.length, MOST_KEPT);
  }
}

export const poolLog = new PoolLog();

const WORDS = {
  loaded: "loaded",
  host: "evicted to host",
  disk: "evicted to disk",
  deleted: "deleted",
  replaced: "replaced",
  left: "left the device",
};

function makeEvent({ key, at, what, name, version, rows }) {
  if (key === 0) return h("li", { class: "muted small" }, "No loads or evictions since this page was opened.");
  const time = new Date(at * 1000).toLocaleTimeString([], { hour12: false });
  return h(
    "li",
    { class: what === "loaded" ? "came" : "left" },
    h("time", { class: "number muted" }, time),
    h("a", { href: hrefOf(name), class: "holder-name" }, `${name}@${version}`),
    h("span", { class: "event-what" }, WORDS[what]),
    h("span", { class: "number muted" }, `${format.count(rows)} rows`),
  );
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
