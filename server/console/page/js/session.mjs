/** Knows what the key of this tab may do (GET /console/session), and asks for one. */

import { getJson, key } from "./api.mjs";
import { h, showDialog } from "./dom.mjs";

class Session extends EventTarget {
  /** The server's answer; null until there was one. */
  facts = null;

  /** Ask the server. Raises ApiError. */
  async refresh() {
    const asked = key.get();
    const facts = await getJson("/console/session");
    if (asked === key.get()) this.#take(facts);
  }

  #take(facts) {
    const changed = JSON.stringify(facts) !== JSON.stringify(this.facts);
    this.facts = facts;
    if (changed) this.dispatchEvent(new Event("change"));
  }

  may(what) {
    return this.facts?.may[what] ?? false;
  }

  /** Whether the tab has a key that the server does not know: it may have been started again with others. */
  get isStale() {
    return this.facts?.key === "unknown";
  }

  /** Use a key from now on; "": none. Returns whether the server knows it: if not, the tab keeps what it has. Raises ApiError. */
  async setKey(value) {
    const facts = await getJson("/console/session", { presented: value });
    if (facts.key === "unknown") return false;
    key.set(value);
    this.#take(facts);
    return true;
  }
}

export const session = new Session();

let forms = 0;

/** The form that takes a key; `done` is called once the server knows it. cancel: what the button Cancel does, null: there is none. */
export function keyForm(done, cancel = null) {
  const id = `key-${++forms}`;
  const input = h("input", { type: "password", id: `${id}-input`, class: "key-input", autocomplete: "off", spellcheck: "false",
    "aria-describedby": `${id}-hint ${id}-problem` });
  const problem = h("p", { id: `${id}-problem`, class: "problem", role: "alert" });
  async function use(value) {
    input.setAttribute("aria-invalid", "false");
    problem.textContent = "";
    try {
      if (await session.setKey(value)) {
        done();
        return;
      }
    } catch (error) {
      problem.textContent = error.message;
      return;
    }
    problem.textContent = "The server does not know this key.";
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
  const submit = (event) => {
    event.preventDefault();
    const value = input.value.trim();
    if (value) use(value);
  };
  const button = (text, click) => h("button", { class: "button", type: "button", on: { click } }, text);
  return h("form", { class: "grid", on: { submit } },
    h("div", { class: "field" }, h("label", { for: input.id }, "API key, metrics key or admin key"), input),
    h("p", { id: `${id}-hint`, class: "muted small" }, "It stays in this tab and is gone when the tab is closed. What it may not do is not offered."),
    problem,
    h("div", { class: "dialog-end" }, key.get() ? button("Forget the key", () => use("")) : null, cancel ? button("Cancel", cancel) : null,
      h("button", { class: "button primary", type: "submit" }, "Use this key")));
}

/** Ask for another key: in the form that the page shows, else in a dialog. why: said in the dialog. */
export function askForKey(why = "") {
  const shown = document.querySelector(".key-input");
  if (shown === null) showDialog("Key", (close) => [why ? h("p", {}, why) : null, keyForm(close, close)]);
  else shown.focus();
}
