/** Shows one column: its head (model, version, what it is compared with), its turns, and the facts of its last answer. */

import { h, keyed, replace, setText } from "../dom.mjs";
import { count, duration, rate, UNKNOWN } from "../format.mjs";
import { icon } from "../icons.mjs";
import { visible } from "../text.mjs";
import { comparison, paint } from "./answer_text.mjs";
import { showCode } from "./code.mjs";
import { versionChoice } from "./versions.mjs";

const AT_THE_END_PX = 32;
const FACTS = ["First token", "Tokens/s", "Tokens", "Ended with", "Answered by"];

/** The view of a column. */
export class ColumnView {
  #conversation;
  #column;
  #log;
  #empty;
  #reference;
  #code;
  #facts = new Map();

  constructor(conversation, column) {
    [this.#conversation, this.#column] = [conversation, column];
    const { model } = column;
    this.#empty = h("p", { class: "column-empty muted" }, "Not asked yet");
    this.#log = h("div", { class: "column-log", tabindex: "0", role: "region", "aria-label": `Answers of ${model}` });
    this.#reference = h("button", { class: "button small quiet", type: "button", title: "The column that the others are compared with",
      "aria-label": `Reference: compare the others with ${model}`, on: { click: () => conversation.compareWith(column) } }, "Reference");
    this.#code = h("button", { class: "icon-button column-code", type: "button", disabled: true, title: "The request as code",
      "aria-label": `Code of the request to ${model}`, on: { click: () => showCode(model, column.last) } }, "</>");
    this.element = h("section", { class: "column", "aria-label": model, data: { model } },
      h("header", { class: "column-head" },
        h("h2", { class: "column-name", title: model }, model.split("@")[0]),
        h("button", { class: "icon-button column-remove", type: "button", title: "Remove", "aria-label": `Remove ${model}`,
          on: { click: () => this.#remove() } }, icon("cross")),
        h("div", { class: "column-tools" }, versionChoice(model, (wanted) => this.#become(wanted)), this.#reference, this.#code)),
      h("div", { class: "column-body" }, this.#empty, this.#log),
      h("dl", { class: "column-facts" }, FACTS.map((name) => this.#fact(name))));
  }

  #fact(name) {
    const value = h("dd", { class: "number" }, UNKNOWN);
    this.#facts.set(name, value);
    return h("div", {}, h("dt", {}, name), value);
  }

  #become(model) {
    const { columns } = this.#conversation;
    this.#keepingFocus(".column-version", () => this.#conversation.show(columns.map((column) => (column === this.#column ? model : column.model))));
  }

  #remove() {
    this.#keepingFocus(".column-remove", () => this.#conversation.remove(this.#column));
  }

  /** The column's element goes: focus the same control of the one that takes its place. */
  #keepingFocus(control, change) {
    const all = this.element.parentElement;
    const at = [...all.children].indexOf(this.element);
    change();
    (all.children[at] ?? all.lastElementChild)?.querySelector(control)?.focus();
  }

  /** Show the column as it is now. */
  draw() {
    const { turns, last } = this.#column;
    const isReference = this.#conversation.reference === this.#column;
    this.#drawReference(isReference);
    this.#code.disabled = last === null;
    this.#empty.hidden = turns.length > 0;
    const follows = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < AT_THE_END_PX;
    keyed(this.#log, turns, (turn) => turn, () => new TurnView().element, (element, turn) => {
      const other = isReference ? null : this.#conversation.reference?.turnOf(turn.ask) ?? null;
      element._view.draw(turn, other, this.#conversation.reference?.model, turn === last);
    });
    if (follows) this.#log.scrollTop = this.#log.scrollHeight;
    this.#drawFacts(last);
  }

  #drawReference(isReference) {
    this.element.classList.toggle("reference", isReference);
    this.#reference.setAttribute("aria-pressed", String(isReference));
    this.#reference.hidden = this.#conversation.columns.length < 2;
  }

  #drawFacts(turn) {
    const values = turn === null ? [] : [
      duration(turn.firstS), rate(turn.rate), count(turn.usage === null && turn.pieces === 0 ? NaN : turn.tokens),
      endOf(turn), turn.model === null ? UNKNOWN : visible(turn.model),
    ];
    FACTS.forEach((name, n) => setText(this.#facts.get(name), values[n] ?? UNKNOWN));
  }
}

/** With what a turn ended, in words. */
export function endOf(turn) {
  if (turn.isRunning) return "\u2026";
  if (turn.state === "failed") return turn.error.code ?? (turn.error.status ? `status ${turn.error.status}` : "no connection");
  return turn.state === "stopped" ? "stopped" : turn.reason ?? UNKNOWN;
}

class TurnView {
  #prompt = h("p", { class: "turn-prompt", dir: "auto" });
  #thought = h("div", { class: "turn-thought muted small", dir: "auto", hidden: true });
  #text = h("div", { class: "turn-text", dir: "auto" });
  #waits = h("p", { class: "turn-waits muted" }, "Waiting for the first token");
  #note = h("p", { class: "turn-note small", hidden: true });
  #error = h("div", { class: "note bad turn-error", hidden: true });
  #summary = h("p", { class: "turn-summary muted small number", hidden: true });
  #drawn = [];
  #found = null;

  constructor() {
    this.element = h("article", { class: "turn" }, this.#prompt, this.#thought, this.#text, this.#waits, this.#error, this.#note, this.#summary);
    this.element._view = this;
  }

  draw(turn, other, otherName, isLast) {
    setText(this.#prompt, visible(turn.prompt));
    this.#thought.hidden = turn.thought === "";
    setText(this.#thought, visible(turn.thought));
    const now = [turn.text, turn.state, other?.text, other?.state, otherName];
    if (now.some((value, n) => value !== this.#drawn[n])) {
      this.#drawn = now;
      this.#found = comparison(turn, other, otherName);
      paint(this.#text, this.#found.parts);
      this.#drawNote(this.#found.note);
    }
    this.#text.classList.toggle("growing", turn.state === "streaming");
    this.#waits.hidden = turn.state !== "waiting";
    this.#drawError(turn.error);
    this.#summary.hidden = isLast || turn.isRunning;
    setText(this.#summary, `${duration(turn.firstS)} to the first token, ${count(turn.tokens)} tokens, ${endOf(turn)}`);
  }

  #drawNote(note) {
    this.#note.hidden = note === null;
    if (note === null) return;
    this.#note.className = `turn-note small ${note.kind}`;
    setText(this.#note, note.text);
  }

  #drawError(error) {
    this.#error.hidden = error === null;
    if (error === null || this.#error.childElementCount > 0) return;
    replace(this.#error,
      h("p", { class: "turn-error-code" }, error.code ?? (error.status ? `Status ${error.status}` : "No connection")),
      h("p", { dir: "auto" }, visible(error.message)),
      error.requestId ? h("p", { class: "small" }, "Request ", h("code", {}, visible(error.requestId))) : null);
  }
}
