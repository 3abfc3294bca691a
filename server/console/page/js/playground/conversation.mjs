/** Owns what is asked and answered in the playground: one history per column. It goes on while another view is shown, and
 * is gone with the tab. */

import { ApiError, stream } from "../api.mjs";
import { bodyOf, CHAT, lacksTemplate, NO_SETTINGS, PATHS, read, TEXT } from "./request.mjs";

export const MOST_COLUMNS = 5;
const MOST_PROMPTS = 100;

/** One question to one model and its answer. state: "waiting", "streaming", "done", "stopped" or "failed". */
class Turn {
  constructor(ask, prompt, path, body) {
    Object.assign(this, {
      ask, prompt, path, body, state: "waiting", text: "", thought: "", model: null, reason: null, usage: null, error: null,
      pieces: 0, firstS: NaN, lastS: NaN,
    });
    this.began = performance.now() / 1000;
  }

  get isRunning() {
    return this.state === "waiting" || this.state === "streaming";
  }

  /** Whether the model is to remember it. */
  get counts() {
    return this.text !== "" && this.state !== "failed";
  }

  /** Tokens of the answer: the server's count, until it came the pieces. */
  get tokens() {
    return this.usage?.completion_tokens ?? this.pieces;
  }

  /** Tokens per second after the first; NaN with fewer than two. */
  get rate() {
    return this.tokens > 1 && this.lastS > this.firstS ? (this.tokens - 1) / (this.lastS - this.firstS) : NaN;
  }

  take(event) {
    const { text, thought, reason, usage, model } = read(event);
    if (model !== null) this.model = model;
    if (usage !== null) this.usage = usage;
    if (reason !== null) this.reason = reason;
    if (text === "" && thought === "") return;
    this.lastS = performance.now() / 1000 - this.began;
    if (this.state === "waiting") [this.state, this.firstS] = ["streaming", this.lastS];
    this.text += text;
    this.thought += thought;
    this.pieces += 1;
  }
}

/** One model and what it was asked. Events: "change". */
export class Column extends EventTarget {
  turns = [];
  #end = new AbortController();

  /** model: as in a request: the base, NAME or NAME@version. */
  constructor(model) {
    super();
    this.model = model;
  }

  get last() {
    return this.turns.at(-1) ?? null;
  }

  turnOf(ask) {
    return this.turns.find((turn) => turn.ask === ask) ?? null;
  }

  /** Ask no more, and stop what is asked. */
  end() {
    this.#end.abort();
  }

  changed() {
    this.dispatchEvent(new Event("change"));
  }

  async ask(number, prompt, mode, settings, signal) {
    const before = this.turns.filter((turn) => turn.counts);
    const turn = new Turn(number, prompt, PATHS[mode], bodyOf(mode, this.model, before, prompt, settings));
    this.turns.push(turn);
    this.changed();
    try {
      for await (const event of stream(turn.path, turn.body, AbortSignal.any([signal, this.#end.signal]))) {
        turn.take(event);
        this.changed();
      }
      turn.state = "done";
    } catch (error) {
      turn.state = error.name === "AbortError" ? "stopped" : "failed";
      if (turn.state === "failed") turn.error = error instanceof ApiError ? error : new ApiError(0, { message: String(error) });
    }
    this.changed();
    return turn;
  }
}

/** All columns. Events: "columns" (which there are, the reference), "state" (running or not, the mode, a notice), "end" of
 * a column's answer (detail: {column, turn}). */
export class Conversation extends EventTarget {
  columns = [];
  mode = CHAT;
  settings = { ...NO_SETTINGS };
  showsSettings = false;
  draft = "";
  prompts = [];
  notice = "";
  reference = null;
  #number = 0;
  #stop = null;

  get isRunning() {
    return this.#stop !== null;
  }

  get isEmpty() {
    return this.columns.every((column) => column.turns.length === 0);
  }

  /** The prompt asked last; null before the first. */
  get lastPrompt() {
    return this.columns.map((column) => column.turnOf(this.#number)).find(Boolean)?.prompt ?? null;
  }

  add(model) {
    if (this.columns.length >= MOST_COLUMNS) return;
    this.columns.push(new Column(model));
    this.reference ??= this.columns[0];
    this.#tell("columns");
  }

  remove(column) {
    column.end();
    this.columns = this.columns.filter((other) => other !== column);
    if (this.reference === column) this.reference = this.columns[0] ?? null;
    this.#tell("columns");
  }

  compareWith(column) {
    this.reference = column;
    this.#tell("columns");
  }

  /** Ask these models and no others; columns of those that are there stay. */
  show(models) {
    const there = [...this.columns];
    const at = there.indexOf(this.reference);
    this.columns = models.slice(0, MOST_COLUMNS).map((model) => {
      const found = there.findIndex((column) => column.model === model);
      return found < 0 ? new Column(model) : there.splice(found, 1)[0];
    });
    there.forEach((column) => column.end());
    if (!this.columns.includes(this.reference)) this.reference = this.columns[at] ?? this.columns[0] ?? null;
    this.#tell("columns");
  }

  choose(mode) {
    this.mode = mode;
    this.notice = "";
    this.#tell("state");
  }

  async ask(prompt) {
    if (this.isRunning || this.columns.length === 0) return;
    if (this.prompts.at(-1) !== prompt) this.prompts = [...this.prompts, prompt].slice(-MOST_PROMPTS);
    this.#number += 1;
    await this.#run(prompt);
  }

  /** Ask the last prompt anew, in the place of the answers to it. */
  async again() {
    const prompt = this.lastPrompt;
    if (this.isRunning || prompt === null) return;
    this.#forgetLast();
    await this.#run(prompt);
  }

  stop() {
    this.#stop?.abort();
  }

  reset() {
    this.stop();
    this.columns = this.columns.map((column) => new Column(column.model));
    this.reference = this.columns[0] ?? null;
    this.notice = "";
    this.#tell("columns");
    this.#tell("state");
  }

  async #run(prompt) {
    const stop = (this.#stop = new AbortController());
    const number = this.#number;
    const asked = this.columns.map(async (column) => {
      const turn = await column.ask(number, prompt, this.mode, this.settings, stop.signal);
      if (this.columns.includes(column)) this.dispatchEvent(new CustomEvent("end", { detail: { column, turn } }));
      return turn;
    });
    this.#tell("state");
    const turns = await Promise.all(asked);
    if (this.#stop === stop) this.#stop = null;
    const refused = turns.find((turn) => turn.state === "failed" && lacksTemplate(turn.error));
    if (refused && this.mode === CHAT && !stop.signal.aborted) {
      this.mode = TEXT;
      this.notice = refused.error.message;
      this.#forgetLast();
      await this.#run(prompt);
    } else this.#tell("state");
  }

  #forgetLast() {
    for (const column of this.columns) {
      column.turns = column.turns.filter((turn) => turn.ask !== this.#number);
      column.changed();
    }
  }

  #tell(what) {
    this.dispatchEvent(new Event(what));
  }
}
