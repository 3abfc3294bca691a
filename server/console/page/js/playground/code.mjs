/** Shows a request as curl and as a program with the openai client. */

import { urlOf } from "../api.mjs";
import { copyButton } from "../copy.mjs";
import { h, showDialog } from "../dom.mjs";
import { session } from "../session.mjs";
import { CHAT, PATHS } from "./request.mjs";
import { curlOf, KEY_VARIABLE, openaiOf } from "./snippets.mjs";

/** A dialog with the code of what a turn asked for. */
export function showCode(model, turn) {
  const needsKey = session.facts.needs_key;
  const curl = curlOf(urlOf(turn.path), turn.body, needsKey);
  const program = openaiOf(urlOf("/v1"), turn.body, needsKey, turn.path === PATHS[CHAT]);
  const hint = h("p", { class: "muted small" }, needsKey
    ? ["This server needs a key. Both read it from the environment: ", h("code", {}, `export ${KEY_VARIABLE}=...`)]
    : "This server needs no key. The openai client wants a text in its place.");
  showDialog(`The request to ${model}`, (close) => [
    hint, snippet("curl", curl), snippet("Python, openai", program),
    h("div", { class: "dialog-end" }, h("button", { class: "button", type: "button", on: { click: close } }, "Close")),
  ], { wide: true });
}

function snippet(title, code) {
  return h("section", { class: "snippet" },
    h("header", {}, h("h3", {}, title), copyButton(() => code, `the ${title} code`)),
    h("pre", { tabindex: "0", "aria-label": `${title} code` }, h("code", {}, code)));
}
