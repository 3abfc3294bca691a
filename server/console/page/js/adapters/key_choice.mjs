/** The choice of who may use an adapter: every key, only some, or the admin key alone. */

import { h } from "../dom.mjs";
import { session } from "../session.mjs";

let choices = 0;

/** allowed: as in the API (null: every key; []: the admin key alone); undefined: a further choice, to leave it as it is. */
export class KeyChoice {
  #radios = new Map();
  #boxes = new Map();
  #labels = h("div", { class: "key-labels" });

  constructor(allowed) {
    const group = `keys-${++choices}`;
    const chosen = allowed === undefined ? "same" : allowed === null ? "all" : allowed.length ? "some" : "none";
    const known = session.facts.key_labels ?? [];
    const everybody = session.facts.needs_key ? "Every key" : "Everyone";
    const gone = (allowed ?? []).filter((label) => !known.includes(label));
    for (const label of [...known, ...gone]) {
      const box = h("input", {
        type: "checkbox",
        checked: allowed?.includes(label) ?? false,
        on: { change: () => this.#radios.get("some").click() },
      });
      this.#boxes.set(label, box);
      this.#labels.append(
        h(
          "label",
          { class: "check" },
          box,
          h("bdi", { class: "mono" }, label),
          gone.includes(label) ? h("span", { class: "muted small" }, "(no key of this server)") : null,
        ),
      );
    }
    const radio = (value, title, hint) => {
      const input = h("input", {
        type: "radio",
        name: group,
        value,
        checked: value === chosen,
        on: { change: () => this.#draw() },
      });
      this.#radios.set(value, input);
      return h(
        "label",
        { class: "check choice" },
        input,
        h("span", {}, title, hint ? h("span", { class: "muted small" }, ` \u2013 ${hint}`) : null),
      );
    };
    this.element = h(
      "fieldset",
      { class: "keys" },
      h("legend", { class: allowed === undefined ? null : "visually-hidden" }, "Who may use it"),
      allowed === undefined ? radio("same", `As this name had it, or ${everybody.toLowerCase()} if it never existed`) : null,
      radio("all", everybody),
      this.#boxes.size ? [radio("some", "Only these keys"), this.#labels] : null,
      radio("none", "Only the admin key"),
    );
    this.#draw();
  }

  /** As the API takes it; undefined: as it is. */
  get value() {
    const chosen = [...this.#radios].find(([, input]) => input.checked)?.[0];
    if (chosen === "same") return undefined;
    if (chosen === "all") return null;
    return chosen === "none" ? [] : [...this.#boxes].filter(([, box]) => box.checked).map(([label]) => label);
  }

  #draw() {
    this.#labels.classList.toggle("off", this.#radios.get("some")?.checked !== true);
  }
}
