/** Chooses a model for a column: the base, or one of thousands of adapters by search. */

import { getJson } from "../api.mjs";
import { h, keyed, setText, showDialog } from "../dom.mjs";
import { session } from "../session.mjs";
import { visible } from "../text.mjs";

const SHOWN = 30;
const TYPING_MS = 200;

/** Ask for a model; choose(model) is called with the base's name or an adapter's. */
export function pickModel(choose) {
  const search = h("input", { type: "search", id: "pick-search", autocomplete: "off", spellcheck: "false", placeholder: "Search names and descriptions" });
  const list = h("ul", { class: "pick-list", "aria-label": "Models" });
  const found = h("p", { class: "muted small", role: "status" }, "\u00a0");
  let calls = new AbortController();
  let timer = null;
  let isCurrent = false;
  let takesFirst = false;
  const base = session.facts.base.slice(0, 1).map((name) => ({ name, isBase: true }));

  async function load() {
    calls.abort();
    calls = new AbortController();
    const wanted = search.value.trim();
    const asked = new URLSearchParams({ versions: "active", limit: String(SHOWN) });
    if (wanted) asked.set("search", wanted);
    try {
      const page = await getJson(`/v1/adapters?${asked}`, { signal: calls.signal });
      isCurrent = true;
      show(page, base.filter(({ name }) => name.toLowerCase().includes(wanted.toLowerCase())));
    } catch (error) {
      if (error.name !== "AbortError") setText(found, visible(error.message));
    }
  }

  function show(page, bases) {
    keyed(list, [...bases, ...page.data], (item) => item.name, () => h("li", {}), (row, item) => {
      row.replaceChildren(rowOf(item, () => {
        dialog.close();
        choose(item.name);
      }));
    });
    const total = page.total ?? page.data.length;
    setText(found, total === 0 ? "No adapter has this in its name or description."
      : total > page.data.length ? `${page.data.length} of ${total.toLocaleString("en-US")} adapters. Search for the others.`
        : `${total} ${total === 1 ? "adapter" : "adapters"}`);
    if (takesFirst) list.querySelector("button")?.click();
    takesFirst = false;
  }

  search.addEventListener("input", () => {
    clearTimeout(timer);
    isCurrent = takesFirst = false;
    timer = setTimeout(load, TYPING_MS);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      const first = list.querySelector("button");
      if (event.key === "ArrowDown") first?.focus();
      else if (isCurrent) first?.click();
      else takesFirst = true;
    }
  });
  list.addEventListener("keydown", (event) => {
    const rows = [...list.querySelectorAll("button")];
    const to = rows.indexOf(document.activeElement) + { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (Number.isNaN(to)) return;
    event.preventDefault();
    (rows[to] ?? (to < 0 ? search : rows.at(-1))).focus();
  });
  const dialog = showDialog("Add a model", (close) => [
    h("div", { class: "field" }, h("label", { for: "pick-search" }, "Adapter"), search), list, found,
    h("div", { class: "dialog-end" }, h("button", { class: "button", type: "button", on: { click: close } }, "Cancel")),
  ], { onClose: () => {
    clearTimeout(timer);
    calls.abort();
  } });
  search.focus();
  load();
}

function rowOf(item, click) {
  const version = item.versions?.find((each) => each.version === item.active) ?? item.versions?.[0];
  const state = item.isBase ? "base" : item.active === null ? "none active" : version?.state === "ready" ? `@${item.active}` : version?.state ?? "";
  return h("button", { type: "button", class: "pick", on: { click } },
    h("span", { class: "pick-name" }, item.name), h("span", { class: `badge${version?.state === "failed" ? " bad" : ""}` }, state),
    h("span", { class: "pick-about muted small", dir: "auto" }, item.isBase ? "without an adapter" : visible(version?.description ?? "")));
}
