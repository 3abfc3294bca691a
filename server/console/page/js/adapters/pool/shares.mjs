/** Draws the shares of the device's pool: the pieces of the bar, and the list that says the same in words. */

import { h, setText } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { colourOf, hrefOf } from "../names.mjs";
import { hue, pinMark } from "../parts.mjs";
import { shareOf } from "./pool.mjs";

/** The pieces of the bar that are no single adapter's. */
export function restOfBar(pool) {
  return rest(pool, "small", pool.small, (many) => `${many} small ones`);
}

/** The lines of the list that are no single adapter's. */
export function restOfList(pool) {
  return rest(pool, "others", pool.others, (many) => `${many} smaller adapters`);
}

function rest({ isAll, besides }, key, { rows, adapters }, titleOf) {
  const found = [];
  if (rows > 0) found.push({ key, kind: "others", rows, title: titleOf(`${format.count(adapters)}${isAll ? "" : "+"}`) });
  if (besides > 0) {
    const title = isAll ? "Other versions, and loads under way" : "Further adapters and versions";
    found.push({ key: "besides", kind: "besides", rows: besides, title });
  }
  return found;
}

/** The picture in one line. */
export function summaryOf({ used, total, whole, pinned, count }) {
  const adapters = `${format.count(count)} ${count === 1 ? "adapter" : "adapters"}`;
  const held = Number.isFinite(total)
    ? `${format.count(used)} of ${format.count(total)} rows (${shareOf(used, whole)})`
    : `${format.count(used)} rows`;
  return [held, adapters, pinned ? `${format.count(pinned)} rows pinned` : null].filter(Boolean).join(" \u00b7 ");
}

/** A piece of the bar. */
export function makeSegment(segment) {
  const label = h("span", { class: "segment-label" });
  const colour = segment.name === undefined ? "" : ` c${colourOf(segment.name)}`;
  const properties = { class: `segment ${segment.kind}${colour}` };
  const element =
    segment.kind === "holder" ? h("a", { ...properties, href: hrefOf(segment.name), tabindex: "-1" }) : h("span", properties);
  element.append(label);
  if (segment.kind === "leaving") requestAnimationFrame(() => leave(element));
  return element;
}

function leave(element) {
  element.classList.add("gone");
  element.style.flexGrow = 0;
}

export function fillSegment(element, { kind, name, names, version, rows, pinned, title }) {
  if (!element.classList.contains("gone")) element.style.flexGrow = rows;
  element.classList.toggle("pinned", pinned === true);
  const text = title ?? `${name}${version ? `@${version}` : ""}`;
  setText(element.firstChild, kind === "free" ? "free" : (title ?? name));
  element.title =
    kind === "leaving"
      ? `${text} left the device`
      : `${text}: ${format.count(rows)} rows${names?.length > 1 ? `, shared by ${names.join(", ")}`.slice(0, 300) : ""}`;
}

/** A line of the list that says the same as the bar. */
export function makeHolder(holder) {
  const name = holder.kind ? h("span", { class: "holder-name" }) : h("a", { class: "holder-name", href: hrefOf(holder.name) });
  return h(
    "li",
    {},
    holder.kind ? h("span", { class: `hue ${holder.kind}`, "aria-hidden": "true" }) : hue(holder.name),
    name,
    h("span", { class: "holder-marks" }),
    h("span", { class: "holder-rows number" }),
  );
}

export function fillHolder(item, holder, pool) {
  const [, name, marks, rows] = item.children;
  setText(name, holder.title ?? `${holder.name}@${holder.version}`);
  name.title = holder.names?.join(", ").slice(0, 300) ?? holder.title;
  const shared = holder.names?.length > 1 ? `+${holder.names.length - 1}` : "";
  const state = `${holder.pinned} ${shared}`;
  if (item._state !== state) {
    item._state = state;
    marks.replaceChildren(
      ...[
        shared
          ? h(
              "span",
              { class: "badge", title: `The same content as ${holder.names.slice(1).join(", ")}`.slice(0, 300) },
              shared,
              h("span", { class: "visually-hidden" }, " with the same content"),
            )
          : null,
        holder.pinned ? pinMark() : null,
      ].filter(Boolean),
    );
  }
  const share = Number.isFinite(pool.total) ? ` \u00b7 ${shareOf(holder.rows, pool.whole)}` : "";
  setText(rows, `${format.count(holder.rows)} rows${share}`);
}
