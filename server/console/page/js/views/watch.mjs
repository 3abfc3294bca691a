import { h, replace } from "../dom.mjs";

/** Show the view in `root`; returns a function that ends it. */
export function mount(root) {
  replace(root, h("h1", {}, "Watch"));
  return () => {};
}
