/** One adapter in the upload's dialog: its name, its files, what is wrong with them. */

import { getJson } from "../../api.mjs";
import { h, setText } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { icon } from "../../icons.mjs";
import { session } from "../../session.mjs";
import { listRoute } from "../listing.mjs";
import { nameProblem } from "../names.mjs";
import { CONFIG, WEIGHTS } from "./picking.mjs";

const TYPING_MS = 250;
const MOST_LEFT_SHOWN = 6;

let drafts = 0;

/** proposal: of picking.mjs. name: proposed. remove(): leave it out. changed(): its name is another. */
export class Draft {
  #timer = null;
  #hint = h("p", { class: "hint small muted", role: "status" });
  #remove;

  constructor(proposal, name, remove, changed) {
    const id = `upload-name-${++drafts}`;
    this.proposal = proposal;
    this.#hint.id = `${id}-hint`;
    this.input = h("input", {
      type: "text",
      id,
      value: name,
      autocomplete: "off",
      spellcheck: "false",
      autocapitalize: "off",
      maxlength: 80,
      "aria-describedby": this.#hint.id,
      on: {
        input: () => {
          this.#check();
          changed();
        },
      },
    });
    this.#remove = h(
      "button",
      {
        class: "icon-button",
        type: "button",
        "aria-label": "Leave this one out",
        title: "Leave this one out",
        on: { click: remove },
      },
      icon("cross"),
    );
    this.element = h(
      "li",
      { class: "draft" },
      h(
        "div",
        { class: "draft-name" },
        h("div", { class: "field" }, h("label", { for: id }, "Name"), this.input),
        this.#remove,
      ),
      this.#hint,
      filesOf(proposal),
      proposal.problems.length
        ? h(
            "ul",
            { class: "note bad draft-problems" },
            proposal.problems.map((text) => h("li", { dir: "auto" }, text)),
          )
        : null,
    );
    if (name === "") this.#say(nameProblem(""), false);
    else this.#check(0);
  }

  get name() {
    return this.input.value.trim();
  }

  get canBeSent() {
    return this.proposal.problems.length === 0;
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  showRemove(isShown) {
    this.#remove.hidden = !isShown;
  }

  /** Whether it keeps the upload from being sent; then it says why. */
  check() {
    const problem = this.canBeSent ? nameProblem(this.name, session.facts.base) : null;
    this.input.setAttribute("aria-invalid", String(problem !== null));
    if (problem !== null) this.#say(problem, true);
    return problem !== null;
  }

  close() {
    clearTimeout(this.#timer);
  }

  #check(wait = TYPING_MS) {
    clearTimeout(this.#timer);
    if (!this.check()) this.#timer = setTimeout(() => this.#lookUp(), wait);
  }

  async #lookUp() {
    const name = this.name;
    let says;
    try {
      const found = await getJson(listRoute({ search: name, sort: "name", page: 1 }));
      const known = found.data.find((adapter) => adapter.name === name);
      if (known)
        says = `${name} exists, ${known.active === null ? "without an active version" : `@${known.active} is active`}: this becomes its next version.`;
      else says = found.has_more ? "" : `No adapter is called ${name} now: this makes one.`;
    } catch {
      says = ""; // the upload itself will say what is wrong
    }
    if (name === this.name) this.#say(says, false);
  }

  #say(text, isBad) {
    this.#hint.className = `hint small ${isBad ? "problem" : "muted"}`;
    setText(this.#hint, text);
  }
}

function filesOf(proposal) {
  const file = (name, size) =>
    h(
      "li",
      {},
      icon("file"),
      h("span", { class: "mono line", dir: "auto" }, name),
      h("span", { class: "muted number" }, format.bytes(size)),
    );
  const items = proposal.archive
    ? [file(proposal.source, proposal.archive.size)]
    : [proposal.config && file(CONFIG, proposal.config.size), proposal.weights && file(WEIGHTS, proposal.weights.size)];
  const left =
    proposal.left.slice(0, MOST_LEFT_SHOWN).join(", ") +
    (proposal.left.length > MOST_LEFT_SHOWN ? ` and ${proposal.left.length - MOST_LEFT_SHOWN} more` : "");
  return h(
    "div",
    { class: "draft-files" },
    proposal.source && !proposal.archive
      ? h("p", { class: "small muted" }, "from ", h("bdi", { class: "mono" }, `${proposal.source}/`))
      : null,
    h("ul", {}, items),
    left ? h("p", { class: "small muted left-out", dir: "auto" }, `Not sent: ${left}`) : null,
    proposal.notes.map((note) => h("p", { class: "small muted" }, note)),
  );
}
