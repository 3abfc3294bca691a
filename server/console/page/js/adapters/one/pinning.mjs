/** Pins and unpins an adapter, and sets who may use it. */

import { getJson, sendJson } from "../../api.mjs";
import { h, replace, showDialog, toast } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { KeyChoice } from "../key_choice.mjs";
import { deviceRoute } from "../listing.mjs";
import { activeOf, hrefOf, routeOf } from "../names.mjs";
import { actionButton, curlBox, problemBox, hue } from "../parts.mjs";

const MOST_LISTED = 1000;

/** Pin it, or unpin it if it is pinned. Returns the adapter as it is then. Raises ApiError. */
export async function pin(adapter) {
  const found = await sendJson("PATCH", routeOf(adapter.name), { pinned: !adapter.pinned });
  toast(
    found.pinned ? `${found.name} is pinned: its active version stays on the device.` : `${found.name} may be evicted again.`,
  );
  return found;
}

/** Say why it could not be pinned; if others leave it no room, which ones. */
export function pinFailed(adapter, error) {
  const list = h("div", {});
  const needs = activeOf(adapter)?.rows ?? NaN;
  showDialog(`${adapter.name} could not be ${adapter.pinned ? "unpinned" : "pinned"}`, (close) =>
    h(
      "div",
      { class: "grid" },
      problemBox(error),
      list,
      h("div", { class: "dialog-end" }, h("button", { class: "button", type: "button", on: { click: close } }, "Close")),
    ),
  );
  if (error.code === "device_full") showPinned(list, needs);
}

async function showPinned(list, needs) {
  let found;
  try {
    found = await getJson(deviceRoute(MOST_LISTED));
  } catch {
    return;
  }
  const pinned = found.data.filter((adapter) => adapter.pinned);
  const close = () => list.closest("dialog").close();
  replace(
    list,
    h("h3", {}, `It needs ${format.count(needs)} rows beside what is pinned:`),
    h(
      "ul",
      { class: "holders one-column" },
      pinned.map((adapter) =>
        h(
          "li",
          {},
          hue(adapter.name),
          h("a", { class: "holder-name", href: hrefOf(adapter.name), on: { click: close } }, adapter.name),
          h("span", { class: "holder-rows number" }, `${format.count(activeOf(adapter)?.rows ?? NaN)} rows`),
        ),
      ),
    ),
  );
}

/** changed(adapter): who may use it was changed, and this is the adapter now. */
export function changeAccess(adapter, changed) {
  showDialog(`Who may use ${adapter.name}`, (close) => {
    const choice = new KeyChoice(adapter.allowed_keys);
    const problem = h("div", {});
    const save = actionButton(
      { class: "button primary" },
      ["Save"],
      async () => {
        changed(await sendJson("PATCH", routeOf(adapter.name), { allowed_keys: choice.value }));
        close();
        toast(`Who may use ${adapter.name} was changed.`);
      },
      (error) => replace(problem, problemBox(error)),
    );
    const curl = curlBox(() => ({ method: "PATCH", path: routeOf(adapter.name), body: { allowed_keys: choice.value } }));
    return h(
      "div",
      { class: "grid", on: { input: () => curl.refresh() } },
      choice.element,
      h(
        "p",
        { class: "muted small" },
        "A key sees only what it may use. Requests that run go on. The admin key may use everything.",
      ),
      curl,
      problem,
      h("div", { class: "dialog-end" }, h("button", { class: "button", type: "button", on: { click: close } }, "Cancel"), save),
    );
  });
}
