/** The adapters: the table of all (`#/adapters`), or one of them (`#/adapters/NAME`). */

import { mountList } from "../adapters/list/view.mjs";
import { mountOne } from "../adapters/one/view.mjs";

/** Show the view in `root`; name: of one adapter, or empty. Returns a function that ends it. */
export function mount(root, name, query) {
  return name === "" ? mountList(root, query) : mountOne(root, name);
}
