/** The adapters: the table of all (`#/adapters`), or one of them (`#/adapters/NAME`). */

import { mountList } from "../adapters/list/view.mjs";
import { hrefOf, nameProblem } from "../adapters/names.mjs";
import { mountOne } from "../adapters/one/view.mjs";
import { h, replace } from "../dom.mjs";
import { visible } from "../text.mjs";

/** Show the view in `root`; name: of one adapter, or empty. Returns a function that ends it. */
export function mount(root, name, query) {
  if (name === "") return mountList(root, query);
  if (nameProblem(name) === null) return mountOne(root, name);
  const link = h("a", { href: hrefOf() }, "All adapters");
  replace(root, h("h1", {}, "No such adapter"), h("p", { class: "muted" }, "No adapter can be called ", h("bdi", {}, visible(name)), "."), link);
  return () => {};
}
