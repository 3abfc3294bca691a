/** Small pieces that the views of adapters share. Whatever text comes from elsewhere is isolated: its direction and its
 * length change nothing around it. */

import { urlOf } from "../api.mjs";
import { copyButton } from "../copy.mjs";
import { h, replace, setText } from "../dom.mjs";
import { UNKNOWN } from "../format.mjs";
import { icon } from "../icons.mjs";
import { visible } from "../text.mjs";
import { adviceFor, partsOf } from "./advice.mjs";
import { curlOf } from "./curl.mjs";
import { colourOf, kindInWords, kindOf } from "./names.mjs";

const LINE_CHARACTERS = 300;
const TITLE_CHARACTERS = 1000;
const MOST_VIOLATIONS = 200;

/** One line of somebody's text, cut where the room ends. */
export function line(text, className = "") {
  const element = h("span", { class: `line ${className}`, dir: "auto" });
  setLine(element, text);
  return element;
}

export function setLine(element, text) {
  if (element._text === text) return;
  element._text = text;
  setText(element, visible((text ?? "").slice(0, LINE_CHARACTERS)));
  element.title = visible((text ?? "").slice(0, TITLE_CHARACTERS));
}

/** The square of an adapter's colour. */
export function hue(name) {
  return h("span", { class: `hue c${colourOf(name)}`, "aria-hidden": "true" });
}

/** Show what kind of adapter a version is: short to look at, in words on hover and for screen readers. null: none. */
export function setKind(element, version) {
  const short = (version && kindOf(version)) || "";
  const words = short && kindInWords(version);
  if (element._words === words) return;
  element._words = words;
  element.title = words;
  replace(
    element,
    short
      ? [h("span", { "aria-hidden": "true" }, short), h("span", { class: "visually-hidden" }, words)]
      : UNKNOWN,
  );
}

/** Where a version is: its icon says device, host or disk too. */
export function tier() {
  return h("span", { class: "tier" });
}

export function setTier(element, version) {
  element.className = `tier ${version?.resident ?? "none"}`;
  setText(element, version?.resident ?? "\u2013");
}

export function stateMark() {
  return h("span", {});
}

/** ready is calm; whatever needs somebody's eye is a badge. */
export function setState(element, version) {
  const state = version?.state ?? "not active";
  element.className = { ready: "calm-state", failed: "badge bad", draining: "badge warn" }[state] ?? "muted";
  element.title = version?.reason ?? "";
  setText(element, state);
}

export function pinMark() {
  return h(
    "span",
    { class: "mark", title: "Pinned: stays on the device" },
    icon("pin"),
    h("span", { class: "visually-hidden" }, "pinned"),
  );
}

export function lockMark(allowed) {
  const words = allowed.length ? `Only for the keys ${allowed.join(", ")}` : "Only for the admin key";
  return h(
    "span",
    { class: "mark", title: words.slice(0, LINE_CHARACTERS) },
    icon("lock"),
    h("span", { class: "visually-hidden" }, "restricted"),
  );
}

/** A command to look at and copy, closed at first. what: as in "the curl command". build() returns curlOf's options, with
 * a path in place of the URL; called when it is opened or copied. */
export function curlBox(build, title = "The same with curl") {
  const text = () => {
    const { path, ...options } = build();
    return curlOf({ ...options, url: urlOf(path) });
  };
  const code = h("code", {});
  const box = h(
    "details",
    { class: "curl", on: { toggle: () => setText(code, text()) } },
    h("summary", {}, title),
    h(
      "div",
      { class: "curl-body" },
      h("pre", { tabindex: "0", role: "region", "aria-label": "curl command" }, code),
      copyButton(text, "the curl command"),
    ),
  );
  box.refresh = () => box.open && setText(code, text());
  return box;
}

/** What the server said about an error, and what to do; every violation as an item of its own. */
export function problemBox(error) {
  const advice = adviceFor(error);
  const box = h("div", { class: "problem-box", role: "alert" });
  if (error.violations?.length) {
    const many = error.violations.length;
    box.append(
      h("p", { class: "problem-title" }, many === 1 ? "One thing is wrong with it:" : `${many} things are wrong with it:`),
    );
    box.append(
      h(
        "ol",
        { class: "violations", tabindex: "0", "aria-label": "Violations" },
        error.violations.slice(0, MOST_VIOLATIONS).map(violationItem),
      ),
    );
    if (many > MOST_VIOLATIONS)
      box.append(h("p", { class: "muted small" }, `and ${many - MOST_VIOLATIONS} more: copy the list to see them all`));
  } else box.append(h("p", { class: "problem-title", dir: "auto" }, error.message));
  if (advice) box.append(h("p", { class: "advice" }, advice));
  if (error.code || error.requestId) {
    box.append(
      h(
        "p",
        { class: "muted small mono" },
        [error.code, error.requestId ? `request ${error.requestId}` : null].filter(Boolean).join(" \u00b7 "),
      ),
    );
  }
  return box;
}

function violationItem(violation) {
  const { where, found, expected, todo } = partsOf(violation);
  const part = (label, text) =>
    text ? h("div", { class: "violation-part" }, h("span", { class: "violation-label" }, label), h("bdi", {}, text)) : null;
  const says = (text, word) => text.replace(new RegExp(`^${word}\\s+`), "");
  const isPlain = !/^found\s/.test(found) && !expected;
  return h(
    "li",
    {},
    where ? h("bdi", { class: "mono violation-where" }, where) : null,
    isPlain
      ? h("div", {}, h("bdi", {}, found))
      : [part("Found", says(found, "found")), part("Expected", says(expected, "expected"))],
    part("Hint", todo),
  );
}

/** A term and its value, as a pair of a description list. */
export function fact(term, ...value) {
  return h("div", { class: "fact" }, h("dt", {}, term), h("dd", {}, ...value));
}

/** A button that cannot be pressed while what it does is under way. work: async; its errors go to `failed`. */
export function actionButton(properties, children, work, failed) {
  const button = h(
    "button",
    {
      type: "button",
      ...properties,
      on: {
        click: async () => {
          if (button.getAttribute("aria-disabled") === "true") return;
          button.setAttribute("aria-disabled", "true");
          try {
            await work(button);
          } catch (error) {
            failed(error);
          } finally {
            button.removeAttribute("aria-disabled");
          }
        },
      },
    },
    ...children,
  );
  return button;
}
