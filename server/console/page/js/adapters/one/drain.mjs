/** Shows versions that are being deleted: how many requests still run, until when, and that they are gone. */

import { announce, h, keyed, setText, toast } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { session } from "../../session.mjs";

/** id -> what was seen of its drain: {at (unix seconds, or null: somebody else began it), most (requests)}. */
const drains = new Map();

/** This tab deleted these versions just now. */
export function began(versions) {
  for (const version of versions) drains.set(version.id, { at: Date.now() / 1000, most: version.requests_running ?? 0 });
}

export class DrainPanel {
  #list = h("ul", { class: "drains" });
  #shown = [];
  #name;
  #isWhole = false;

  constructor(name) {
    this.#name = name;
    this.element = h("section", { class: "card drain-card", "aria-label": "Being deleted", hidden: true }, this.#list);
  }

  get isBusy() {
    return this.#shown.length > 0;
  }

  /** isWhole: the adapter ends with all its versions. */
  show(versions, isWhole) {
    const draining = versions.filter((version) => version.state === "draining");
    const left = this.#shown.filter((version) => !draining.some((other) => other.id === version.id));
    for (const version of draining) {
      const seen = drains.get(version.id) ?? { at: null, most: 0 };
      drains.set(version.id, { ...seen, most: Math.max(seen.most, version.requests_running ?? 0) });
    }
    this.#shown = draining;
    this.#isWhole = isWhole && draining.length > 0;
    if (!isWhole) for (const version of left) gone(version.id);
    this.element.hidden = draining.length === 0;
    this.tick();
  }

  /** The adapter is gone. */
  ended() {
    if (this.#shown.length) gone(this.#name);
    this.#shown = [];
  }

  /** Bring the clock up to date. */
  tick() {
    keyed(this.#list, this.#shown.slice(0, 20), (version) => version.id, makeDrain, fillDrain);
  }
}

function gone(id) {
  drains.delete(id);
  toast(`${id} is gone.`);
  announce(`${id} is deleted`);
}

function makeDrain(version) {
  const progress = h("progress", { max: 1, "aria-label": `Requests of ${version.id} that have ended` });
  return h(
    "li",
    { data: { testid: `drain-${version.version}` } },
    h(
      "div",
      { class: "drain-head" },
      h("strong", {}, h("bdi", {}, version.id), " is being deleted"),
      h("span", { class: "number drain-running", role: "status" }),
    ),
    progress,
    h("p", { class: "muted small number" }),
  );
}

function fillDrain(item, version) {
  const [head, progress, until] = item.children;
  const { at, most } = drains.get(version.id);
  const running = version.requests_running ?? 0;
  setText(
    head.lastChild,
    running === 0
      ? "no request runs any more: its files are removed"
      : running === 1
        ? "1 request still runs"
        : `${format.count(running)} requests still run`,
  );
  progress.value = most === 0 ? 1 : (most - running) / most;
  setText(until, running === 0 ? "" : deadline(at, running === 1 ? ["It", "it is"] : ["They", "they are"]));
}

function deadline(at, [who, whoIs]) {
  const timeout = session.facts.limits?.drain_timeout_s ?? NaN;
  if (at === null)
    return Number.isFinite(timeout)
      ? `${who} may finish for ${format.duration(timeout)} from when the version was deleted; then ${whoIs} ended.`
      : "";
  const left = Math.max(0, at + timeout - Date.now() / 1000);
  const clock = new Date((at + timeout) * 1000).toLocaleTimeString([], { hour12: false });
  return left > 0
    ? `${who} may finish until ${clock}, ${remaining(left)} from now; then ${whoIs} ended.`
    : "The deadline has passed: what still runs is ended now.";
}

function remaining(seconds) {
  const [minutes, rest] = [Math.floor(seconds / 60), Math.floor(seconds % 60)];
  return minutes ? `${minutes} min ${String(rest).padStart(2, "0")} s` : `${rest} s`;
}
