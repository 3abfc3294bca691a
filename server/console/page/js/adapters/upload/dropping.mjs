/** Where files can be dropped: all of a view, while it is shown; and the buttons that choose them. */

import { h } from "../../dom.mjs";
import { icon } from "../../icons.mjs";
import { session } from "../../session.mjs";
import { showWhyNot } from "../key_hint.mjs";
import { droppedFiles, hasFiles } from "./dropped.mjs";
import { showUpload } from "./upload_dialog.mjs";

/** Let files be dropped anywhere on the page; whose key may not upload is told why. name: of the adapter whose next version
 * they are, if it is clear. Returns a function that ends it. */
export function dropArea(root, name = null) {
  const mayUpload = session.may("change");
  const veil = h(
    "div",
    { class: "drop-veil", "aria-hidden": "true" },
    h(
      "div",
      { class: "drop-veil-text" },
      icon("upload"),
      !mayUpload
        ? "You may not upload here"
        : name === null
          ? "Drop to upload"
          : ["Drop to upload as a version of ", h("bdi", {}, name)],
    ),
  );
  let depth = 0;
  const show = (isOver) => {
    if (isOver) (document.querySelector("dialog[open] .dialog-body") ?? root).append(veil);
    else veil.remove();
  };
  const listeners = {
    dragenter(event) {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth += 1;
      show(true);
    },
    dragleave(event) {
      if (!hasFiles(event)) return;
      depth = Math.max(0, depth - 1);
      if (depth === 0) show(false);
    },
    dragover(event) {
      if (!hasFiles(event)) return;
      event.preventDefault();
      event.dataTransfer.dropEffect = "copy";
    },
    drop(event) {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      show(false);
      if (mayUpload) showUpload(droppedFiles(event.dataTransfer), name);
      else showWhyNot();
    },
  };
  for (const [type, listener] of Object.entries(listeners)) document.addEventListener(type, listener);
  return () => {
    show(false);
    for (const [type, listener] of Object.entries(listeners)) document.removeEventListener(type, listener);
  };
}

/** The button that opens the upload's dialog. */
export function uploadButton(name = null, label = "Upload an adapter", className = "button primary") {
  return h("button", { class: className, type: "button", on: { click: () => showUpload(null, name) } }, icon("upload"), label);
}
