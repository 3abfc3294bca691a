/** The buttons that choose an adapter's files or folder on the reader's machine. */

import { h } from "../../dom.mjs";
import { icon } from "../../icons.mjs";
import { chosenFiles } from "./dropped.mjs";

/** Buttons that choose files or a folder. took(entries) gets what was chosen. */
export function chooseButtons(took) {
  const input = (properties, id) =>
    h("input", {
      type: "file",
      class: "visually-hidden",
      tabindex: "-1",
      id,
      ...properties,
      on: {
        change: (event) => {
          took(chosenFiles(event.target.files));
          event.target.value = "";
        },
      },
    });
  const files = input(
    { multiple: true, accept: ".json,.safetensors,.zip,.gz,.tgz", "aria-label": "Files of an adapter" },
    "upload-files",
  );
  const folder = input({ webkitdirectory: true, "aria-label": "Folder of an adapter" }, "upload-folder");
  const button = (target, name, label) =>
    h("button", { class: "button", type: "button", on: { click: () => target.click() } }, icon(name), label);
  return h(
    "div",
    { class: "choose" },
    button(files, "file", "Choose files or an archive"),
    button(folder, "folder", "Choose a folder"),
    files,
    folder,
  );
}
