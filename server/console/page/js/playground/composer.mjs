/** Takes the prompt and how it is to be answered. */

import { h, setText } from "../dom.mjs";
import { visible } from "../text.mjs";
import { CHAT, NO_SETTINGS, TEXT } from "./request.mjs";

const FIELDS = [
  ["temperature", "Temperature", { type: "number", min: "0", max: "2", step: "any" }],
  ["top_p", "Top p", { type: "number", min: "0", max: "1", step: "any" }],
  ["max_tokens", "Max tokens", { type: "number", min: "1", step: "1" }],
  ["seed", "Seed", { type: "number", step: "1" }],
];
const HINTS = {
  [CHAT]: "Enter asks, Shift+Enter begins a line, \u2191 in an empty prompt brings back the last.",
  [TEXT]: "The model goes on with the text as it is; a next prompt is added to the end. Enter asks, Shift+Enter begins a line.",
};

/** The form below the columns. */
export class Composer {
  #conversation;
  #recalled = null;

  constructor(conversation) {
    this.#conversation = conversation;
    this.prompt = h("textarea", { id: "prompt", rows: "3", placeholder: "Ask all columns the same", value: conversation.draft, spellcheck: "true",
      "aria-describedby": "prompt-hint", on: { keydown: (event) => this.#key(event), input: () => this.#typed() } });
    this.ask = h("button", { class: "button primary", type: "submit" }, "Ask");
    this.stop = h("button", { class: "button danger", type: "button", on: { click: () => conversation.stop() } }, "Stop");
    this.again = h("button", { class: "button", type: "button", on: { click: () => this.#valid() && conversation.again() } }, "Run again");
    this.hint = h("p", { id: "prompt-hint", class: "muted small composer-hint" });
    this.system = this.#field("system", "System prompt", h("textarea", { rows: "2", class: "short" }));
    this.element = h("form", { class: "composer card", "aria-label": "Prompt and settings", on: { submit: (event) => this.#submit(event) } },
      this.#settings(),
      h("label", { for: "prompt", class: "visually-hidden" }, "Prompt"), this.prompt,
      h("div", { class: "composer-end" }, this.hint, this.again, this.stop, this.ask));
  }

  #settings() {
    const stop = this.#field("stop", "Stop at", h("textarea", { rows: "2", class: "short", placeholder: "One a line; \\n is a line break" }));
    const numbers = FIELDS.map(([name, label, properties]) => this.#field(name, label, h("input", { ...properties, placeholder: "default" })));
    this.chosen = h("span", { class: "muted small" });
    const conversation = this.#conversation;
    const toggle = ({ target }) => (conversation.showsSettings = target.open);
    return h("details", { class: "settings", open: conversation.showsSettings, on: { toggle } }, h("summary", {}, "Settings ", this.chosen),
      h("div", { class: "settings-fields" }, this.system, stop, numbers));
  }

  #field(name, label, input) {
    input.id = `setting-${name}`;
    input.value = this.#conversation.settings[name];
    input.addEventListener("input", () => {
      this.#conversation.settings = { ...this.#conversation.settings, [name]: input.value };
      this.#drawChosen();
    });
    return h("div", { class: `field setting-${name}` }, h("label", { for: input.id }, label), input);
  }

  #drawChosen() {
    const names = { system: "system prompt", temperature: "temperature", top_p: "top p", max_tokens: "max tokens", seed: "seed", stop: "stop" };
    const chosen = Object.keys(NO_SETTINGS).filter((name) => this.#conversation.settings[name] !== "");
    setText(this.chosen, chosen.map((name) => ["system", "stop"].includes(name) ? names[name]
      : `${names[name]} ${visible(this.#conversation.settings[name])}`).join(", ") || "the server's defaults");
  }

  draw() {
    const { isRunning, columns, mode, lastPrompt } = this.#conversation;
    const focused = document.activeElement;
    this.ask.hidden = isRunning;
    this.stop.hidden = !isRunning;
    this.ask.disabled = columns.length === 0;
    this.again.disabled = isRunning || lastPrompt === null;
    if (isRunning && (focused === this.ask || focused === this.again)) this.stop.focus();
    if (!isRunning && focused === this.stop) this.prompt.focus();
    this.system.hidden = mode !== CHAT;
    setText(this.hint, HINTS[mode]);
    this.#drawChosen();
  }

  #typed() {
    this.#conversation.draft = this.prompt.value;
    this.#recalled = null;
  }

  #valid() {
    this.element.querySelector("details").open ||= !this.element.checkValidity();
    return this.element.reportValidity();
  }

  #submit(event) {
    event.preventDefault();
    const text = this.prompt.value;
    if (text.trim() === "" || this.#conversation.isRunning || !this.#valid()) return;
    this.prompt.value = "";
    this.#typed();
    this.#conversation.ask(text);
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) this.#submit(event);
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") this.#recall(event);
  }

  /** The prompts of this tab, one after the other, while the field has none of its own. */
  #recall(event) {
    const { prompts } = this.#conversation;
    if (this.prompt.value !== "" && this.#recalled === null) return;
    const at = (this.#recalled ?? prompts.length) + (event.key === "ArrowUp" ? -1 : 1);
    if (at < 0 || at > prompts.length) return;
    event.preventDefault();
    this.prompt.value = prompts[at] ?? "";
    this.#typed();
    this.#recalled = at === prompts.length ? null : at;
  }
}
