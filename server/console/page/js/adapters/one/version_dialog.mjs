/** The dialog with all that is known of one version: facts, files, delete. */

import { getBlob, sendJson } from "../../api.mjs";
import { copyButton } from "../../copy.mjs";
import { h, replace, showDialog, toast } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { icon } from "../../icons.mjs";
import { session } from "../../session.mjs";
import { visible } from "../../text.mjs";
import { showComparison } from "./compare_dialog.mjs";
import { confirmDelete } from "./delete_dialog.mjs";
import { kindInWords, playgroundOf, routeOf } from "../names.mjs";
import { actionButton, curlBox, fact, problemBox } from "../parts.mjs";

const FILES = { config: "adapter_config.json", weights: "adapter_model.safetensors" };
const KEEP_BLOB_MS = 60_000;

/** changed(adapter): something was changed, and this is the adapter now. deleted(adapter): the version is being deleted. */
export function showVersion(adapter, version, changed, deleted) {
  showDialog(version.id, (close) => build(adapter, version, changed, deleted, close), { wide: true });
}

function build(adapter, version, changed, deleted, close) {
  const mayChange = session.may("change");
  const problem = h("div", {});
  const failed = (error) => replace(problem, problemBox(error));
  const isActive = adapter.active === version.version;
  const isAlone = adapter.versions.length === 1;
  const then = (open) => () => {
    close();
    open();
  };
  const button = (label, click, className = "button") =>
    h("button", { class: className, type: "button", on: { click } }, label);
  const deactivate = () =>
    actionButton(
      { class: "button" },
      ["Deactivate"],
      async () => {
        changed(await sendJson("PATCH", routeOf(adapter.name), { active: null, if_active: version.version }));
        close();
        toast(`${adapter.name} has no active version now; ${version.id} still answers by that name.`);
      },
      failed,
    );
  const isIdle = version.state !== "draining";
  return h(
    "div",
    { class: "grid" },
    version.reason ? h("p", { class: "note bad", dir: "auto" }, visible(version.reason)) : null,
    version.description
      ? h(
          "p",
          { class: "one-description", dir: "auto", tabindex: "0", "aria-label": "Description" },
          visible(version.description),
        )
      : null,
    h(
      "dl",
      { class: "facts" },
      fact("State", isActive ? `${version.state}, active` : version.state),
      fact("Kind", kindInWords(version)),
      fact("Where", `${version.resident}, ${format.count(version.rows)} rows`),
      fact("Size", format.bytes(version.size_bytes)),
      fact("Uploaded", `${format.date(version.created)} (${format.ago(version.created)})`),
      fact(
        "Last used",
        version.last_used
          ? `${format.date(version.last_used)} (${format.ago(version.last_used)})`
          : "not since the server started",
      ),
      fact("Running", format.count(version.requests_running ?? NaN)),
      fact(
        "Digest",
        h(
          "span",
          { class: "digest whole" },
          h("span", { class: "mono" }, version.digest),
          copyButton(() => version.digest, "the digest"),
        ),
      ),
    ),
    mayChange && isIdle
      ? h(
          "div",
          { class: "facts-files" },
          h(
            "div",
            { class: "downloads" },
            Object.keys(FILES).map((file) => downloadButton(version, adapter.name, file, failed)),
          ),
          curlBox(() => ({ path: `${routeOf(adapter.name, version.version)}/files/weights`, file: true })),
        )
      : null,
    mayChange && isActive && !isAlone
      ? h(
          "p",
          { class: "muted small" },
          "The active version can be deleted once another one is active, or with the whole adapter.",
        )
      : null,
    problem,
    h(
      "div",
      { class: "dialog-end" },
      mayChange && isIdle && (!isActive || isAlone)
        ? button(
            "Delete this version",
            then(() => confirmDelete(adapter, version, deleted)),
            "button danger",
          )
        : null,
      mayChange && isActive ? deactivate() : null,
      isIdle ? h("a", { class: "button", href: playgroundOf(version.id), on: { click: close } }, "Playground") : null,
      !isActive && isIdle
        ? button(
            mayChange ? "Compare and activate" : "Compare",
            then(() => showComparison(adapter, version, changed)),
          )
        : null,
      button("Close", close),
    ),
  );
}

/** The file comes with the key, which a plain link would not send. */
function downloadButton(version, name, file, failed) {
  const size = file === "weights" ? ` (${format.bytes(version.size_bytes)})` : "";
  return actionButton(
    { class: "button small" },
    [icon("download"), h("span", {}, `${FILES[file]}${size}`)],
    async (button) => {
      const label = button.lastChild;
      const text = label.textContent;
      label.textContent = "Downloading\u2026";
      try {
        const blob = await getBlob(`${routeOf(name, version.version)}/files/${file}`);
        const url = URL.createObjectURL(blob);
        h("a", { href: url, download: `${name}@${version.version}.${FILES[file]}` }).click();
        setTimeout(() => URL.revokeObjectURL(url), KEEP_BLOB_MS);
      } finally {
        label.textContent = text;
      }
    },
    failed,
  );
}
