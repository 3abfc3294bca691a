/** The dialog before an upload: what was found in the files, under which name, for whom. */

import { h, replace, setText, showDialog } from "../../dom.mjs";
import { icon } from "../../icons.mjs";
import { session } from "../../session.mjs";
import { KeyChoice } from "../key_choice.mjs";
import { chooseButtons } from "./choosing.mjs";
import { Draft } from "./draft.mjs";
import { jobs } from "./jobs.mjs";
import { curlBox } from "../parts.mjs";
import { CONFIG, pick, WEIGHTS } from "./picking.mjs";

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
  #curl = curlBox(() => ({ path: "/v1/adapters", form: this.#fields() }));
  #send = h("button", { class: "button primary", type: "submit" }, "Upload");

  constructor(name) {
    this.#name = name;
    const title = name === null ? "Upload an adapter" : `Upload a version of ${name}`;
    this.dialog = showDialog(title, (close) => this.#build(close), {
      wide: true,
      onClose: () => {
        open = null;
        for (const draft of this.#drafts) draft.close();
      },
    });
    this.#draw();
  }

  #build(close) {
    replace(
      this.#ask,
      icon("upload"),
      h("p", {}, "Drop the adapter\u2019s folder, its two files, or a .zip or .tar.gz here."),
      h("p", { class: "muted small" }, `Of a trainer\u2019s folder only ${CONFIG} and ${WEIGHTS} are sent.`),
      chooseButtons((entries) => this.take(Promise.resolve(entries))),
    );
    replace(
      this.#options,
      h(
        "label",
        { class: "check", for: "upload-activate" },
        this.#activate,
        h("span", {}, "Activate at once: the bare name selects the new version"),
      ),
      this.#keys.element,
      this.#curl,
    );
    const submit = (event) => {
      event.preventDefault();
      this.#submit(close);
    };
    return h(
      "form",
      { class: "grid", novalidate: true, on: { submit, input: () => this.#curl.refresh() } },
      this.#problem,
      this.#list,
      this.#ask,
      this.#options,
      h(
        "div",
        { class: "dialog-end" },
        h("button", { class: "button", type: "button", on: { click: close } }, "Cancel"),
        this.#send,
      ),
    );
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
      const draft = new Draft(
        proposal,
        isOne && this.#name !== null ? this.#name : proposal.name,
        () => this.#drop(draft),
        () => this.#draw(),
      );
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
    this.#curl.hidden = several;
    this.#send.disabled = ready.length === 0;
    setText(this.#send, several ? `Upload ${ready.length} adapters` : "Upload");
    for (const draft of this.#drafts) draft.showRemove(several);
  }

  /** The form's fields as curl takes them, of the first adapter. */
  #fields() {
    const { name, proposal } = this.#drafts[0];
    const keys = this.#keys.value;
    return [
      ["name", name],
      ["activate", String(this.#activate.checked)],
      ...(keys === undefined ? [] : [["allowed_keys", JSON.stringify(keys)]]),
      ...(proposal.archive
        ? [["file", `@${proposal.source}`]]
        : [
            ["config", `@${CONFIG}`],
            ["weights", `@${WEIGHTS}`],
          ]),
    ];
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
