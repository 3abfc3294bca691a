/** The dialog before an upload: what was found in the files, under which name, for whom. */

import { getJson } from "../api.mjs";
import { h, replace, setText, showDialog } from "../dom.mjs";
import * as format from "../format.mjs";
import { icon } from "../icons.mjs";
import { session } from "../session.mjs";
import { KeyChoice } from "./keychoice.mjs";
import { chooseButtons } from "./choosing.mjs";
import { jobs } from "./jobs.mjs";
import { listRoute } from "./listing.mjs";
import { nameProblem } from "./names.mjs";
import { CONFIG, pick, WEIGHTS } from "./picking.mjs";

const TYPING_MS = 250;
const MOST_LEFT_SHOWN = 6;

/** The dialog that is open, if one is. */
let open = null;

/** Ask how to upload. files: a promise of entries (see picking.mjs), or null: they are chosen in the dialog. name: of the
 * adapter whose next version it is; null: proposed from the files. */
export function showUpload(files, name) {
  if (open === null) {
    if (document.querySelector("dialog[open]")) return;
    open = new UploadDialog(name);
  }
  if (files !== null) open.take(files);
}

class UploadDialog {
  #name;
  #drafts = [];
  #list = h("ul", { class: "drafts" });
  #problem = h("p", { class: "note bad", role: "alert", hidden: true, dir: "auto" });
  #ask = h("div", { class: "drop-box" });
  #options = h("div", { class: "grid upload-options" });
  #activate = h("input", { type: "checkbox", id: "upload-activate", checked: true });
  #keys = new KeyChoice(undefined);
  #send = h("button", { class: "button primary", type: "submit" }, "Upload");

  constructor(name) {
    this.#name = name;
    const title = name === null ? "Upload an adapter" : `Upload a version of ${name}`;
    this.dialog = showDialog(title, (close) => this.#build(close), { wide: true, onClose: () => {
      open = null;
      for (const draft of this.#drafts) draft.close();
    } });
    this.#draw();
  }

  #build(close) {
    replace(this.#ask, icon("upload"), h("p", {}, "Drop the adapter\u2019s folder, its two files, or a .zip or .tar.gz here."),
      h("p", { class: "muted small" }, `Of a trainer\u2019s folder only ${CONFIG} and ${WEIGHTS} are sent.`),
      chooseButtons((entries) => this.take(Promise.resolve(entries))));
    replace(this.#options,
      h("label", { class: "check", for: "upload-activate" }, this.#activate, h("span", {}, "Activate at once: the bare name selects the new version")),
      this.#keys.element);
    const submit = (event) => {
      event.preventDefault();
      this.#submit(close);
    };
    return h("form", { class: "grid", novalidate: true, on: { submit } }, this.#problem, this.#list, this.#ask, this.#options,
      h("div", { class: "dialog-end" }, h("button", { class: "button", type: "button", on: { click: close } }, "Cancel"), this.#send));
  }

  /** files: a promise of entries. */
  async take(files) {
    let found;
    try {
      found = pick(await files, session.facts.limits?.max_adapter_bytes ?? Infinity);
    } catch (error) {
      found = { proposals: [], problem: error.message };
    }
    this.#problem.hidden = found.problem === null;
    setText(this.#problem, found.problem ?? "");
    const isOne = found.proposals.length === 1 && this.#drafts.length === 0;
    for (const proposal of found.proposals) {
      const draft = new Draft(proposal, isOne && this.#name !== null ? this.#name : proposal.name, () => this.#drop(draft), () => this.#draw());
      this.#drafts.push(draft);
      this.#list.append(draft.element);
    }
    this.#draw();
    this.#drafts.at(-1)?.focus();
  }

  #drop(draft) {
    draft.close();
    draft.element.remove();
    this.#drafts = this.#drafts.filter((other) => other !== draft);
    this.#draw();
    this.#send.focus();
  }

  #draw() {
    const ready = this.#drafts.filter((draft) => draft.canBeSent);
    const several = this.#drafts.length > 1;
    this.#ask.hidden = this.#drafts.length > 0;
    this.#list.hidden = !this.#options.hidden && this.#drafts.length === 0;
    this.#options.hidden = this.#drafts.length === 0;
    this.#send.hidden = this.#drafts.length === 0;
    this.#send.disabled = ready.length === 0;
    setText(this.#send, several ? `Upload ${ready.length} adapters` : "Upload");
    for (const draft of this.#drafts) draft.showRemove(several);
  }

  #submit(close) {
    const bad = this.#drafts.find((draft) => draft.check());
    if (bad !== undefined) {
      bad.focus();
      return;
    }
    const options = { activate: this.#activate.checked, allowed_keys: this.#keys.value };
    for (const draft of this.#drafts) if (draft.canBeSent) jobs.add(draft.name, draft.proposal, options);
    close();
  }
}

let drafts = 0;

/** One adapter that may be uploaded. */
class Draft {
  #timer = null;
  #hint = h("p", { class: "hint small muted", role: "status" });
  #remove;

  constructor(proposal, name, remove, changed) {
    const id = `upload-name-${++drafts}`;
    this.proposal = proposal;
    this.#hint.id = `${id}-hint`;
    this.input = h("input", { type: "text", id, value: name, autocomplete: "off", spellcheck: "false", autocapitalize: "off", maxlength: 80,
      "aria-describedby": this.#hint.id, on: { input: () => {
        this.#check();
        changed();
      } } });
    this.#remove = h("button", { class: "icon-button", type: "button", "aria-label": "Leave this one out", title: "Leave this one out", on: { click: remove } }, icon("cross"));
    this.element = h("li", { class: "draft" },
      h("div", { class: "draft-name" }, h("div", { class: "field" }, h("label", { for: id }, "Name"), this.input), this.#remove),
      this.#hint, filesOf(proposal), proposal.problems.length ? h("ul", { class: "note bad draft-problems" }, proposal.problems.map((text) => h("li", { dir: "auto" }, text))) : null);
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
      if (known) says = `${name} exists, ${known.active === null ? "without an active version" : `@${known.active} is active`}: this becomes its next version.`;
      else says = found.has_more ? "" : `${name} is a new adapter.`;
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
  const file = (name, size) => h("li", {}, icon("file"), h("span", { class: "mono line", dir: "auto" }, name), h("span", { class: "muted number" }, format.bytes(size)));
  const items = proposal.archive ? [file(proposal.source, proposal.archive.size)]
    : [proposal.config && file(CONFIG, proposal.config.size), proposal.weights && file(WEIGHTS, proposal.weights.size)];
  const left = proposal.left.slice(0, MOST_LEFT_SHOWN).join(", ") + (proposal.left.length > MOST_LEFT_SHOWN ? ` and ${proposal.left.length - MOST_LEFT_SHOWN} more` : "");
  return h("div", { class: "draft-files" },
    proposal.source && !proposal.archive ? h("p", { class: "small muted" }, "from ", h("bdi", { class: "mono" }, `${proposal.source}/`)) : null,
    h("ul", {}, items), left ? h("p", { class: "small muted left-out", dir: "auto" }, `Not sent: ${left}`) : null,
    proposal.notes.map((note) => h("p", { class: "small muted" }, note)));
}
