/** Builds the page's elements. Whatever text comes from a server or a model goes in as text: nothing here parses HTML. */

const SVG = "http://www.w3.org/2000/svg";

/** An element. Properties: `class`, `on` ({event: listener}), `data` ({name: value}), `value`, `checked`, `disabled` and the
 * like as properties, all others as attributes; null, undefined and false leave one out. Children: nodes, texts, lists of
 * them; null and false are left out. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

const AS_PROPERTY = new Set(["value", "checked", "disabled", "indeterminate", "open", "hidden", "selected", "multiple"]);

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "data") {
      for (const [key, item] of Object.entries(value)) element.dataset[key] = item;
    } else if (name.startsWith("on") || name === "style" || name === "srcdoc") {
      throw new Error(`found the property ${name}; use \`on\` for listeners and a class for looks`);
    } else if (AS_PROPERTY.has(name)) {
      element[name] = value ?? (name === "value" ? "" : false);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  append(element, children);
  return element;
}

function append(parent, children) {
  for (const child of children) {
    if (Array.isArray(child)) append(parent, child);
    else if (child !== null && child !== undefined && child !== false) parent.append(child);
  }
}

/** Put `children` in place of what the element has. */
export function replace(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

/** Set an element's text if it differs, so that nothing is read out or repainted in vain. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Bring the children of `parent` in line with `items`, keeping the element of each key: focus and selection stay.
 * create(item) makes an element; update(element, item) shows the item in it (also right after `create`). */
export function keyed(parent, items, keyOf, create, update) {
  const there = (parent._keyed ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, element] of there) {
    if (!wanted.has(key)) {
      element.remove();
      there.delete(key);
    }
  }
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let element = there.get(key);
    if (element === undefined) {
      element = create(item);
      there.set(key, element);
    }
    update(element, item);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
}

/** A dialog with a heading, shown at once. `build(close)` returns its content; it is gone once closed. */
export function showDialog(title, build, { wide = false, onClose = () => {} } = {}) {
  const heading = h("h2", { id: `dialog-${++dialogs}` }, title);
  const dialog = h("dialog", { class: wide ? "wide" : "", "aria-labelledby": heading.id });
  const close = () => dialog.close();
  dialog.append(h("div", { class: "dialog-body" }, heading, build(close)));
  dialog.addEventListener("close", () => {
    dialog.remove();
    onClose();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

let dialogs = 0;

/** Say something that went well or did not, for a while (`bad`: until it is dismissed). */
export function toast(text, kind = "good") {
  const dismiss = h("button", { class: "icon-button", type: "button", "aria-label": "Dismiss", on: { click: () => box.remove() } }, "\u00d7");
  const box = h("div", { class: `toast ${kind}`, role: kind === "bad" ? "alert" : "status" }, h("span", {}, text), dismiss);
  document.getElementById("toasts").append(box);
  if (kind !== "bad") setTimeout(() => box.remove(), 6000);
}

/** Read a text out to screen readers without showing it. */
export function announce(text) {
  setText(document.getElementById("announce"), text);
}
