/** The page's icons: drawn with strokes in the text's colour, hidden from screen readers. */

import { svg } from "./dom.mjs";

const PATHS = {
  back: "M10 3 5 8l5 5",
  bolt: "M9 1.5 3.5 9H8l-1 5.5L12.5 7H8z",
  check: "M3 8.5 6.5 12 13 4.5",
  chevron: "M6 3l5 5-5 5",
  copy: "M5.5 5.5h8v8h-8z M10.5 5.5v-3h-8v8h3",
  cross: "M4 4l8 8M12 4l-8 8",
  download: "M8 2v8.5M4.5 7 8 10.5 11.5 7M2.5 13.5h11",
  file: "M4 1.5h5l3 3v10H4zM9 1.5v3h3",
  folder: "M1.5 3.5h4.5l1.5 2h7v8h-13z",
  lock: "M3.5 7.5h9v6.5h-9zM5.5 7.5V5a2.5 2.5 0 0 1 5 0v2.5",
  pin: "M5.5 1.5h5M6.5 1.5v5L4 9.5h8L9.5 6.5v-5M8 9.5V15",
  search: "M7 2.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9M10.5 10.5 14 14",
  trash: "M2.5 4.5h11M6 4.5v-2h4v2M4 4.5l.7 9.5h6.6l.7-9.5",
  upload: "M8 10.5V2M4.5 5.5 8 2l3.5 3.5M2.5 13.5h11",
};

/** An icon of 16 by 16 CSS pixels. Raises for a name that it does not have. */
export function icon(name) {
  if (!(name in PATHS)) throw new Error(`found no icon ${name}, expected one of ${Object.keys(PATHS).join(", ")}`);
  return svg(
    "svg",
    { class: "icon", viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true", focusable: "false" },
    svg("path", { d: PATHS[name] }),
  );
}
