/** Knows what the key of this tab may do (GET /console/session), and asks for one. */

import { getJson, key } from "./api.mjs";
import { h, showDialog } from "./dom.mjs";

class Session extends EventTarget {
  /** The server's answer; null until there was one. */
  facts = null;

  /** Ask the server. Raises ApiError. */
  async refresh() {
    const facts = await getJson("/console/session");
    const changed = JSON.stringify(facts) !== JSON.stringify(this.facts);
    this.facts = facts;
    if (changed) this.dispatchEvent(new Event("change"));
    return facts;
  }

  may(what) {
    return this.facts?.may[what] ?? false;
  }

  async setKey(value) {
    key.set(value);
    await this.refresh();
  }
}

export const session = new Session();

/** The form that takes a key; `done` is called once the server knows it. */
export function keyForm(done) {
  const input = h("input", { type: "password", id: "key-input", autocomplete: "off", spellcheck: "false", "aria-describedby": "key-hint key-problem" });
  const problem = h("p", { id: "key-problem", class: "problem", role: "alert" });
  async function use(value) {
    input.setAttribute("aria-invalid", "false");
    problem.textContent = "";
    try {
      await session.setKey(value.trim());
    } catch (error) {
      problem.textContent = error.message;
      return;
    }
    if (session.facts.key === "unknown") {
      key.set("");
      problem.textContent = "The server does not know this key.";
      input.setAttribute("aria-invalid", "true");
      input.focus();
      await session.refresh().catch(() => {});
    } else done();
  }
  const submit = (event) => {
    event.preventDefault();
    use(input.value);
  };
  const forget = key.get() ? h("button", { class: "button", type: "button", on: { click: () => use("") } }, "Forget the key") : null;
  return h("form", { class: "grid", on: { submit } },
    h("div", { class: "field" }, h("label", { for: "key-input" }, "API key, metrics key or admin key"), input),
    h("p", { id: "key-hint", class: "muted small" }, "It stays in this tab and is gone when the tab is closed. What it may not do is not offered."),
    problem,
    h("div", { class: "dialog-end" }, forget, h("button", { class: "button primary", type: "submit" }, "Use this key")));
}

/** Ask for another key in a dialog. */
export function askForKey() {
  showDialog("Key", (close) => keyForm(close));
}
