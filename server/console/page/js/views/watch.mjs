/** What the server does now: all requests together, or those of one adapter. */

import { connection } from "../connection.mjs";
import { h, replace, setText } from "../dom.mjs";
import { session } from "../session.mjs";
import { visible } from "../text.mjs";
import { Busiest } from "../watch/busiest.mjs";
import { Chart } from "../watch/chart.mjs";
import { Cursor } from "../watch/cursor.mjs";
import { Experts } from "../watch/experts.mjs";
import { ADAPTER_CHARTS, ADAPTER_NUMBERS, NUMBERS, REQUEST_CHARTS, RESIDENCY_CHARTS, troubles } from "../watch/series.mjs";
import { nowUnix, SHOWN_S, sourceOf } from "../watch/source.mjs";
import { axisBegin, clock } from "../watch/ticks.mjs";

const WINDOWS_MIN = [1, 5, 15];
const REDRAW_MS = 1000;

let minutes = 5;

/** Show the view in `root`; adapter: "" for all. Returns a function that ends it. */
export function mount(root, adapter) {
  const source = sourceOf(adapter);
  const cursor = new Cursor();
  const chartsOf = (all) => all.map((wanted) => new Chart(wanted, cursor));
  const groups = (adapter ? [ADAPTER_CHARTS] : [REQUEST_CHARTS, RESIDENCY_CHARTS]).map(chartsOf);
  const charts = groups.flat();
  const numbers = (adapter ? ADAPTER_NUMBERS : NUMBERS).map(numberOf);
  const busiest = adapter ? null : new Busiest();
  const experts = adapter ? new Experts(adapter) : null;
  const since = adapter ? h("span", { class: "muted small" }) : null;
  const restart = h("span", { class: "watch-restart small", role: "status" });
  const trouble = h("div", { class: "note warn watch-trouble", role: "status", hidden: true });
  replace(root,
    h("div", { class: "head" }, adapter ? titleOf(adapter) : h("h1", {}, "Watch"), h("div", { class: "head-end" }, since, restart, windowChoice(draw))),
    trouble,
    h("dl", { class: "numbers" }, numbers.map(({ element }) => element)),
    experts?.element,
    groups.map((group, n) => [n > 0 ? busiest?.element : null, h("div", { class: "charts" }, group.map(({ element }) => element))]));

  let frame = null;
  function draw() {
    frame ??= requestAnimationFrame(() => {
      frame = null;
      const to = nowUnix();
      const from = axisBegin(source.ring.timeAt(0), to, minutes * 60);
      for (const chart of charts) chart.draw(source.ring, from, to);
      experts?.draw(source.ring, from);
      if (since) setText(since, source.ring.timeAt(0) > to - minutes * 60 ? `Since ${clock(source.ring.timeAt(0))}, while this view was open` : "");
      const restarts = source.ring.restartsSince(from);
      setText(restart, restarts.length ? `The server was started again at ${clock(restarts.at(-1))}` : "");
    });
  }

  function took() {
    const now = (name) => source.now(name);
    for (const number of numbers) number.draw(now);
    busiest?.update(source.span);
    const found = source.last === null ? [] : adapter ? unknown(source, adapter) : troubles(source.last);
    trouble.hidden = found.length === 0;
    setText(trouble, found.join(" "));
    draw();
  }

  const ends = new AbortController();
  const listening = { signal: ends.signal };
  source.addEventListener("point", took, listening);
  cursor.addEventListener("move", () => charts.forEach((chart) => chart.drawCursor()), listening);
  const timer = setInterval(() => connection.state !== "ok" && !document.hidden && draw(), REDRAW_MS);
  took();
  const stop = source.read(SHOWN_S);
  return () => {
    ends.abort();
    stop();
    clearInterval(timer);
    cancelAnimationFrame(frame);
    charts.forEach((chart) => chart.end());
    experts?.end();
  };
}

function titleOf(adapter) {
  const isAdapter = !session.facts.base.includes(adapter);
  return [
    h("h1", { class: "watch-title" }, h("a", { href: "#/watch" }, "Watch"),
      h("span", { class: "muted", "aria-hidden": "true" }, "/"), h("span", {}, visible(adapter))),
    session.may("use") ? h("span", { class: "watch-links small" }, isAdapter ? h("a", { href: `#/adapters/${encodeURIComponent(adapter)}` }, "Versions") : null,
      h("a", { href: playgroundOf(adapter, isAdapter) }, "Open in the playground")) : null,
  ];
}

/** The adapter beside the base. */
function playgroundOf(adapter, isAdapter) {
  const models = isAdapter ? [session.facts.base[0], adapter] : [adapter];
  return `#/playground?${models.map((model) => `model=${encodeURIComponent(model)}`).join("&")}`;
}

function unknown(source, adapter) {
  const has = source.last.series("perft_adapter_requests_total").some(({ labels }) => labels.adapter === adapter)
    || source.last.sum("perft_adapter_requests_running", { adapter }) >= 0;
  return has ? [] : ["No metrics under this name: it was not asked since the server started, or more names were than may have "
    + "metrics of their own (--metrics-max-adapters)."];
}

function numberOf([title, text, kindOf = () => ""]) {
  const value = h("dd", { class: "number" });
  return {
    element: h("div", { class: "tile" }, h("dt", {}, title), value),
    draw(now) {
      setText(value, text(now));
      value.className = `number ${kindOf(now)}`;
    },
  };
}

function windowChoice(changed) {
  return h("fieldset", { class: "segments" }, h("legend", { class: "visually-hidden" }, "Minutes shown"),
    WINDOWS_MIN.map((each) => h("label", {},
      h("input", { type: "radio", name: "window", value: String(each), checked: each === minutes, on: { change: () => {
        minutes = each;
        changed();
      } } }), h("span", {}, `${each} min`))));
}
