/** Tells who may not change adapters why, and how they may. */

import { h, showDialog } from "../dom.mjs";
import { askForKey, session } from "../session.mjs";

/** Whether a key would help: none was given, and the refusal names the header that a key goes in. */
function lacksKey() {
  return session.facts.key === "none" && /\bAuthorization\b/.test(session.facts.why_not.change ?? "");
}

/** The button that asks for the admin key; null where none is missing. */
export function keyHint() {
  return lacksKey()
    ? h(
        "button",
        { class: "button quiet key-hint", type: "button", on: { click: askForKey } },
        "Type in the admin key to upload and change adapters",
      )
    : null;
}

/** Say why the files that were dropped are not uploaded. */
export function showWhyNot() {
  if (document.querySelector("dialog[open]")) return;
  showDialog("These files were not uploaded", (close) => {
    const another = () => {
      close();
      askForKey();
    };
    return h(
      "div",
      { class: "grid" },
      h("p", { dir: "auto" }, session.facts.why_not.change),
      h("p", { class: "muted" }, "Uploads need the admin key."),
      h(
        "div",
        { class: "dialog-end" },
        h("button", { class: "button", type: "button", on: { click: close } }, "Close"),
        h("button", { class: "button primary", type: "button", on: { click: another } }, "Type in a key"),
      ),
    );
  });
}
