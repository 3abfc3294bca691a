/** Copies text, also where the page has no secure context and so no clipboard API. */

import { announce, h } from "./dom.mjs";
import { icon } from "./icons.mjs";

const SHOWN_MS = 1500;

/** Put a text on the clipboard. Returns whether it is there. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

function copyBySelection(text) {
  const area = h("textarea", { class: "visually-hidden", readonly: true, value: text });
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  const focused = document.activeElement;
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  focused?.focus?.();
  return isDone;
}

/** A button that copies what `textOf` returns. what: names it for screen readers; shown beside the icon if `isShown`. */
export function copyButton(textOf, what, isShown = false) {
  const face = h("span", { class: "copy-face" }, icon("copy"));
  const button = h(
    "button",
    {
      class: isShown ? "button small quiet" : "icon-button small",
      type: "button",
      "aria-label": isShown ? null : `Copy ${what}`,
      title: isShown ? null : `Copy ${what}`,
      on: {
        click: async (event) => {
          event.stopPropagation();
          const isDone = await copyText(textOf());
          face.replaceChildren(icon(isDone ? "check" : "cross"));
          announce(isDone ? `Copied ${what}` : `The browser did not let this page copy ${what}`);
          setTimeout(() => face.replaceChildren(icon("copy")), SHOWN_MS);
        },
      },
    },
    face,
    isShown ? `Copy ${what}` : null,
  );
  return button;
}
