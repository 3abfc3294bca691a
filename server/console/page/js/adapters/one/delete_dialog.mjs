/** Asks before a version, or an adapter with all of them, is deleted. */

import { getJson, sendJson } from "../../api.mjs";
import { h, replace, showDialog } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { session } from "../../session.mjs";
import { began } from "./drain.mjs";
import { routeOf } from "../names.mjs";
import { actionButton, curlBox, problemBox } from "../parts.mjs";

/** version: null deletes the adapter with all its versions; then its name has to be typed. */
export function confirmDelete(adapter, version, changed) {
  const title = version === null ? `Delete ${adapter.name}` : `Delete ${version.id}`;
  showDialog(title, (close) => build(adapter, version, changed, close));
}

function build(adapter, version, changed, close) {
  const ending = version === null ? adapter.versions : [version];
  const path = routeOf(adapter.name, version?.version);
  const problem = h("div", {});
  const remove = actionButton(
    { class: "button danger", id: "delete-confirm" },
    ["Delete"],
    async () => {
      const found = await sendJson("DELETE", path);
      began(ending);
      changed(found);
      close();
    },
    (error) => replace(problem, problemBox(error)),
  );
  const seconds = session.facts.limits?.drain_timeout_s;
  const timeout = Number.isFinite(seconds) ? ` for ${format.duration(seconds)}` : "";
  const requests = h("p", {});
  const say = (versions) => {
    const running = versions.reduce((sum, one) => sum + (one.requests_running ?? 0), 0);
    const some = h("strong", {}, running === 1 ? "1 request runs" : `${format.count(running)} requests run`);
    const now = running === 0 ? "No request of it runs now." : [some, ` now and may finish${timeout}; then what still runs is ended.`];
    replace(requests, "New requests are refused at once. ", now);
  };
  say(ending);
  getJson(routeOf(adapter.name)) // what was on the screen is some seconds old
    .then(({ versions }) => say(versions.filter((one) => ending.some(({ id }) => id === one.id))))
    .catch(() => {});
  return h(
    "div",
    { class: "grid" },
    h(
      "p",
      {},
      version === null
        ? `The name and ${adapter.versions.length === 1 ? "its only version" : `all its ${format.count(adapter.versions.length)} versions`} are deleted, on the device, the host and the disk. This cannot be undone.`
        : "It is deleted on the device, the host and the disk. This cannot be undone, and its number is never given again.",
    ),
    requests,
    version === null ? nameField(adapter.name, remove) : null,
    curlBox(() => ({ method: "DELETE", path })),
    problem,
    h("div", { class: "dialog-end" }, h("button", { class: "button", type: "button", on: { click: close } }, "Cancel"), remove),
  );
}

/** The button works once the name is typed. */
function nameField(name, button) {
  button.disabled = true;
  const input = h("input", {
    type: "text",
    id: "delete-name",
    autocomplete: "off",
    spellcheck: "false",
    autocapitalize: "off",
    on: {
      input: () => {
        button.disabled = input.value !== name;
      },
      keydown: (event) => {
        if (event.key === "Enter" && !button.disabled) button.click();
      },
    },
  });
  return h(
    "div",
    { class: "field" },
    h("label", { for: "delete-name" }, "Type ", h("bdi", { class: "mono typed-name" }, name), " to confirm"),
    input,
  );
}
