/** The choice of an adapter's version in the head of a column. */

import { getJson } from "../api.mjs";
import { h } from "../dom.mjs";
import { session } from "../session.mjs";

/** A select of the active version and all others; change(model) is called with NAME or NAME@version. For the base: a badge. */
export function versionChoice(model, change) {
  if (session.facts.base.includes(model)) return h("span", { class: "badge" }, "base");
  const [name, version = ""] = model.split("@");
  const select = h("select", {
    class: "column-version", "aria-label": `Version of ${name}`,
    on: { change: () => change(select.value === "" ? name : `${name}@${select.value}`) },
  }, version === "" ? h("option", { value: "" }, "active") : h("option", { value: version }, `@${version}`));
  load(name, version, select);
  return select;
}

async function load(name, version, select) {
  let adapter;
  try {
    adapter = await getJson(`/v1/adapters/${encodeURIComponent(name)}`);
  } catch {
    return; // the answer itself will say what is wrong
  }
  const active = h("option", { value: "" }, adapter.active === null ? "active: none" : `active: @${adapter.active}`);
  const versions = [...adapter.versions].sort((a, b) => b.version - a.version);
  const options = versions.map((each) =>
    h("option", { value: String(each.version) }, `@${each.version}${each.state === "ready" ? "" : `, ${each.state}`}`));
  if (version !== "" && !versions.some((each) => String(each.version) === version)) options.push(h("option", { value: version }, `@${version}`));
  select.replaceChildren(active, ...options);
  select.value = version;
}
