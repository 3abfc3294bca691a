/** The view of one adapter: its figures, its versions, and what can be done with them. */

import { getJson } from "../../api.mjs";
import { h, replace, setText } from "../../dom.mjs";
import { icon } from "../../icons.mjs";
import { every } from "../../poll.mjs";
import { session } from "../../session.mjs";
import { visible } from "../../text.mjs";
import { confirmDelete } from "./delete_dialog.mjs";
import { DrainPanel } from "./drain.mjs";
import { dropArea, uploadButton } from "../upload/dropping.mjs";
import { Figures } from "./figures.mjs";
import { JobsPanel } from "../upload/jobs_panel.mjs";
import { jobs } from "../upload/jobs.mjs";
import { lastListing } from "../listing.mjs";
import { activeOf, hrefOf, playgroundOf, routeOf } from "../names.mjs";
import { actionButton, curlBox, line, lockMark, pinMark, problemBox, setLine, hue } from "../parts.mjs";
import { changeAccess, pin, pinFailed } from "./pinning.mjs";
import { watchMetrics } from "../traffic.mjs";
import { VersionsTable } from "./versions.mjs";

const POLL_S = 3;

/** Show the adapter `name` in `root`; returns a function that ends it. */
export function mountOne(root, name) {
  const mayChange = session.may("change");
  const mayWatch = session.may("watch");
  let adapter = null;
  let loadedAt = -Infinity;

  document.title = `${name} \u2013 Adapters \u2013 perft`;
  const marks = h("span", { class: "marks" });
  const title = h(
    "div",
    { class: "one-title" },
    h("a", { class: "back", href: lastListing.address, "aria-label": "All adapters" }, icon("back")),
    hue(name),
    h("h1", { class: "one-name" }, h("bdi", {}, name)),
    marks,
  );
  const try_ = h("a", { class: "button", href: playgroundOf(name) }, icon("bolt"), "Playground");
  const pinButton = actionButton(
    { class: "button" },
    [icon("pin"), h("span", {}, "Pin")],
    async () => show(await pin(adapter)),
    (error) => pinFailed(adapter, error),
  );
  const access = h(
    "button",
    { class: "button", type: "button", on: { click: () => changeAccess(adapter, show) } },
    icon("lock"),
    "Who may use it",
  );
  const remove = h(
    "button",
    { class: "button danger", type: "button", on: { click: () => confirmDelete(adapter, null, deleted) } },
    icon("trash"),
    "Delete",
  );
  const actions = h(
    "div",
    { class: "head-end" },
    try_,
    mayChange ? [pinButton, access, uploadButton(name, "Upload a version", "button"), remove] : null,
  );
  const description = h("p", { class: "one-description", dir: "auto", tabindex: "0" });
  const who = line("", "muted small");
  const fails = h("p", { class: "note bad", role: "status", dir: "auto", hidden: true });
  const figures = new Figures(mayWatch);
  const drains = new DrainPanel(name);
  const panel = new JobsPanel();
  const versions = new VersionsTable(mayChange, show, deleted);
  const problem = h("div", {});
  const body = h(
    "div",
    { class: "one-view", hidden: true },
    fails,
    description,
    who,
    figures.element,
    drains.element,
    h(
      "section",
      { "aria-labelledby": "versions-title" },
      h("div", { class: "section-head" }, h("h2", { id: "versions-title" }, "Versions"), versions.count),
      versions.element,
    ),
    mayChange
      ? curlBox(() => ({ method: "PATCH", path: routeOf(name), body: { pinned: !adapter.pinned } }), "Pin or unpin with curl")
      : null,
  );
  actions.hidden = true;
  replace(root, h("div", { class: "head" }, title, actions), panel.element, problem, body);

  function show(found) {
    adapter = found;
    loadedAt = performance.now() / 1000;
    replace(problem);
    body.hidden = false;
    actions.hidden = false;
    const active = activeOf(adapter);
    const state = JSON.stringify([adapter.pinned, adapter.allowed_keys, adapter.active]);
    if (marks._state !== state) {
      marks._state = state;
      replace(
        marks,
        adapter.active === null
          ? h("span", { class: "badge warn" }, "no active version")
          : h("span", { class: "badge accent" }, `@${adapter.active} active`),
        adapter.pinned ? pinMark() : null,
        adapter.allowed_keys ? lockMark(adapter.allowed_keys) : null,
      );
      setText(pinButton.lastChild, adapter.pinned ? "Unpin" : "Pin");
      try_.href = playgroundOf(adapter.active === null ? `${name}@${adapter.versions.at(-1)?.version}` : name);
    }
    pinButton.disabled = adapter.active === null && !adapter.pinned;
    const isEnding = adapter.versions.every((version) => version.state === "draining");
    for (const element of [...actions.querySelectorAll("button")]) element.hidden = isEnding;
    try_.hidden = isEnding;
    const text = visible(active?.description ?? "");
    setText(description, text);
    description.hidden = text === "";
    setLine(
      who,
      adapter.allowed_keys === null
        ? ""
        : adapter.allowed_keys.length
          ? `Only for ${adapter.allowed_keys.join(", ")}`
          : "Only for the admin key",
    );
    who.hidden = adapter.allowed_keys === null;
    setText(fails, active?.reason ? `@${active.version}, the active version, cannot be served: ${visible(active.reason)}` : "");
    fails.hidden = !active?.reason;
    figures.show(adapter);
    drains.show(adapter.versions, isEnding);
    versions.show(adapter);
  }

  /** The drain is what matters now: it is brought into sight. */
  function deleted(found) {
    show(found);
    drains.element.scrollIntoView({ block: "nearest" });
  }

  async function load() {
    drains.tick();
    const isDue = adapter === null || drains.isBusy || performance.now() / 1000 - loadedAt >= POLL_S;
    if (!isDue) return;
    try {
      show(await getJson(routeOf(name)));
    } catch (error) {
      if (error.code === "adapter_not_found") missing();
      else if (error.status >= 400 && error.code !== "engine_unavailable") replace(problem, problemBox(error));
      throw error;
    }
  }

  function missing() {
    const was = adapter;
    adapter = null;
    body.hidden = true;
    actions.hidden = true;
    replace(marks);
    marks._state = null;
    drains.ended();
    const says = was ? "It was deleted, with all its versions." : "There is no such adapter, or this key may not use it.";
    if (was || !problem.firstChild) {
      replace(
        problem,
        h(
          "div",
          { class: "card empty gone-note" },
          h("p", { role: "status" }, says),
          h("a", { class: "button", href: hrefOf() }, "All adapters"),
        ),
      );
    }
  }

  const poll = every(1, load);
  const metrics = mayWatch
    ? watchMetrics(`/console/metrics?adapter=${encodeURIComponent(name)}`, (scrapes) => figures.showMetrics(scrapes))
    : null;
  const uploaded = ({ detail }) => {
    loadedAt = -Infinity;
    if (detail.name === name) poll.now();
  };
  jobs.addEventListener("end", uploaded);
  const endDrop = dropArea(root, name);
  return () => {
    poll.stop();
    metrics?.stop();
    panel.close();
    endDrop();
    jobs.removeEventListener("end", uploaded);
  };
}
