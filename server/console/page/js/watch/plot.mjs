/** Draws series of a ring in SVG: axes, lines with gaps, marks of restarts, the cursor. */

import { replace, svg } from "../dom.mjs";
import { timeTicks, valueTicks } from "./ticks.mjs";

export const HEIGHT = 168;
const LEFT = 50;
const RIGHT = 10;
const TOP = 10;
const BOTTOM = 22;
const PX_PER_TICK = 76;
const DENSE_POINTS_PER_PX = 1.5;

/** The picture. unit: {text, mark (the text of a mark of the axis, if another), whole}; top: the end of the value axis if it is fixed. */
export class Plot {
  #grid = svg("g", { class: "plot-grid" });
  #marks = svg("g", { class: "plot-marks" });
  #areas = svg("g", {});
  #lines = svg("g", { class: "plot-lines" });
  #cursor = svg("g", { class: "plot-cursor" });
  #nothing = svg("text", { class: "plot-nothing", "text-anchor": "middle", y: (HEIGHT - BOTTOM + TOP) / 2 + 4 });
  #paths = new Map();
  #width = 0;
  #scale = null;

  constructor(unit, { top = null, area = false } = {}) {
    Object.assign(this, { unit, top, area });
    this.element = svg("svg", { class: "plot", height: HEIGHT, "aria-hidden": "true", focusable: "false" },
      this.#grid, this.#areas, this.#lines, this.#marks, this.#nothing, this.#cursor);
  }

  /** Follow the width that the page gives it. Returns whether it changed. */
  resize(width) {
    if (width === this.#width) return false;
    this.#width = width;
    this.element.setAttribute("width", width);
    return true;
  }

  /** series: [{key, colour}]; from, to: unix seconds. */
  draw(ring, series, from, to) {
    if (this.#width <= LEFT + RIGHT) return;
    const first = Math.max(0, ring.firstAt(from) - 1);
    const largest = ring.largest(series.map(({ key }) => key), first);
    const { top, ticks } = valueTicks(this.top ?? largest, this.unit.whole);
    const [wide, high] = [this.#width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
    const x = (time) => LEFT + ((time - from) / (to - from)) * wide;
    const y = (value) => TOP + high * (1 - Math.min(value, top) / top);
    this.#scale = { x, y, from, to, wide };
    this.#drawGrid(ticks, from, to);
    this.#drawLines(ring, series, first);
    replace(this.#marks, ring.restartsSince(from).map((time) => svg("path", { d: `M${round(x(time))} ${TOP - 4}V${HEIGHT - BOTTOM}` },
      svg("title", {}, "the server was started again"))));
    this.#nothing.setAttribute("x", LEFT + wide / 2);
    this.#nothing.textContent = Number.isNaN(largest) ? "nothing observed" : "";
  }

  #drawGrid(ticks, from, to) {
    const { x, y } = this.#scale;
    const right = this.#width - RIGHT;
    const times = timeTicks(from, to, Math.max(2, Math.floor((right - LEFT) / PX_PER_TICK)))
      .filter(({ at }) => x(at) > LEFT + 18 && x(at) < right - 14);
    replace(this.#grid,
      ticks.map((tick) => [
        svg("path", { d: `M${LEFT} ${Math.round(y(tick)) + 0.5}H${right}`, class: tick === 0 ? "plot-base" : "" }),
        svg("text", { x: LEFT - 8, y: Math.round(y(tick)) + 4, "text-anchor": "end" }, (this.unit.mark ?? this.unit.text)(tick)),
      ]),
      times.map(({ at, text }) => [
        svg("path", { d: `M${Math.round(x(at)) + 0.5} ${HEIGHT - BOTTOM}v4`, class: "plot-base" }),
        svg("text", { x: round(x(at)), y: HEIGHT - 4, "text-anchor": "middle" }, text),
      ]));
  }

  #drawLines(ring, series, first) {
    const shown = new Set(series.map(({ key }) => key));
    this.#lines.classList.toggle("dense", ring.length - first > DENSE_POINTS_PER_PX * this.#scale.wide);
    for (const [key, { line, area }] of this.#paths) {
      if (shown.has(key)) continue;
      line.remove();
      area?.remove();
      this.#paths.delete(key);
    }
    for (const { key, colour, isDashed } of series) {
      const { line, area } = this.#paths.get(key) ?? this.#add(key, colour, isDashed);
      const pieces = ring.pieces(key, first).map((piece) => piece.map((index) => this.#point(ring, key, index)));
      line.setAttribute("d", pieces.map((points) => `M${points.join("L")}${points.length === 1 ? "h0.01" : ""}`).join(""));
      area?.setAttribute("d", pieces.map((points) => `M${points[0].split(" ")[0]} ${HEIGHT - BOTTOM}L${points.join("L")}V${HEIGHT - BOTTOM}Z`).join(""));
    }
  }

  #point(ring, key, index) {
    const { x, y } = this.#scale;
    return `${round(Math.max(LEFT, x(ring.timeAt(index))))} ${round(y(ring.valueAt(key, index)))}`;
  }

  #add(key, colour, isDashed) {
    const line = svg("path", { class: `plot-line colour-${colour}${isDashed ? " dashed" : ""}` });
    const area = this.area && !isDashed ? svg("path", { class: `plot-area colour-${colour}` }) : null;
    this.#lines.append(line);
    if (area) this.#areas.append(area);
    this.#paths.set(key, { line, area });
    return { line, area };
  }

  /** The time below a place, in CSS pixels from the left; null before the first drawing. */
  timeAt(px) {
    if (this.#scale === null) return null;
    const { from, to, wide } = this.#scale;
    return from + (Math.min(Math.max(px - LEFT, 0), wide) / wide) * (to - from);
  }

  /** Show the cursor at a point of the ring; -1: nowhere. */
  drawCursor(ring, series, index) {
    const time = ring.timeAt(index);
    if (this.#scale === null || Number.isNaN(time) || time < this.#scale.from) {
      replace(this.#cursor);
      return;
    }
    const { x, y } = this.#scale;
    replace(this.#cursor, svg("path", { d: `M${Math.round(x(time)) + 0.5} ${TOP - 4}V${HEIGHT - BOTTOM}` }),
      series.filter(({ key }) => !Number.isNaN(ring.valueAt(key, index)))
        .map(({ key, colour }) => svg("circle", { class: `colour-${colour}`, cx: round(x(time)), cy: round(y(ring.valueAt(key, index))), r: 3.5 })));
  }
}

function round(px) {
  return Math.round(px * 10) / 10;
}
