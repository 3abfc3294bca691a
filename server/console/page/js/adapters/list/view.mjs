/** The view of all adapters: search, table, pages, the pool's picture, uploads. */

import { getJson } from "../../api.mjs";
import { announce, h, replace, setText } from "../../dom.mjs";
import * as format from "../../format.mjs";
import { icon } from "../../icons.mjs";
import { every } from "../../poll.mjs";
import { session } from "../../session.mjs";
import { dropArea, uploadButton } from "../upload/dropping.mjs";
import { keyHint } from "../key_hint.mjs";
import { JobsPanel } from "../upload/jobs_panel.mjs";
import { jobs } from "../upload/jobs.mjs";
import { addressOf, inPlace, lastListing, listingOf, listRoute, PAGE, pagesOf } from "../listing.mjs";
import { PoolPicture } from "../pool/picture.mjs";
import { problemBox } from "../parts.mjs";
import { AdapterTable } from "./table.mjs";
import { Traffic, watchMetrics } from "../traffic.mjs";
import { welcome } from "./welcome.mjs";

const POLL_S = 5;
const TYPING_MS = 180;

/** Show the view in `root`; query: of the address. Returns a function that ends it. */
export function mountList(root, query) {
  let listing = listingOf(query);
  lastListing.address = addressOf(listing);
  let typing = null;
  let asked = null;
  let isUsers = true;
  let isHeld = false;
  const mayWatch = session.may("watch");
  const mayChange = session.may("change");

  const total = h("span", { class: "badge", id: "adapters-total", hidden: true });
  const search = h("input", {
    type: "search",
    id: "adapters-search",
    placeholder: "Search names and descriptions",
    value: listing.search,
    "aria-label": "Search names and descriptions",
    autocomplete: "off",
    spellcheck: "false",
    on: { input: typed },
  });
  const renew = h("button", { class: "button small", type: "button", id: "adapters-renew", hidden: true, on: { click: afresh } });
  const table = new AdapterTable(mayWatch, (sort) => go({ ...listing, sort, page: 1 }));
  const none = h("div", { class: "none" });
  const problem = h("div", {});
  const pool = new PoolPicture(mayWatch);
  const panel = new JobsPanel();
  const pager = new Pager((page) => go({ ...listing, page }));
  const upload = mayChange ? uploadButton() : keyHint();
  const head = h(
    "div",
    { class: "head" },
    h("h1", {}, "Adapters"),
    total,
    renew,
    h("div", { class: "head-end" }, h("div", { class: "search" }, icon("search"), search), upload),
  );
  const filled = h(
    "div",
    { class: "adapters-view" },
    pool.element,
    h("div", { class: "adapters-list" }, table.element, none, pager.element),
  );
  const start = h("div", { hidden: true });
  filled.hidden = true;
  replace(root, head, panel.element, problem, start, filled);

  function typed() {
    clearTimeout(typing);
    typing = setTimeout(() => go({ ...listing, search: search.value, page: 1 }, true), TYPING_MS);
  }

  function go(next, isTyped = false) {
    listing = next;
    isUsers = true;
    lastListing.address = addressOf(listing);
    history[isTyped ? "replaceState" : "pushState"](null, "", lastListing.address);
    table.element.setAttribute("aria-busy", "true");
    afresh();
  }

  /** Ask again, and show the answer in its own order even while somebody points at a row. */
  function afresh() {
    isHeld = false;
    asked?.abort();
    poll.now();
  }

  async function load() {
    const wanted = listing;
    asked = new AbortController();
    const { signal } = asked;
    let found;
    try {
      found = await getJson(listRoute(wanted), { signal });
    } catch (error) {
      if (error.name !== "AbortError") failed(error);
      throw error;
    }
    if (filled.hidden) await pool.seen;
    if (wanted !== listing || signal.aborted) return;
    if (found.data.length === 0 && wanted.page > 1) {
      go({ ...wanted, page: pagesOf(found.total) }, true);
      return;
    }
    draw(found, wanted);
  }

  function failed(error) {
    filled.classList.add("stale");
    if (error.status >= 400 && error.code !== "engine_unavailable") replace(problem, problemBox(error));
  }

  function draw(found, wanted) {
    replace(problem);
    filled.classList.remove("stale");
    table.element.removeAttribute("aria-busy");
    const isEmpty = found.total === 0 && !wanted.search.trim();
    if (isEmpty && start.hidden) replace(start, welcome(mayChange));
    start.hidden = !isEmpty;
    filled.hidden = isEmpty;
    search.parentElement.hidden = isEmpty;
    if (upload) upload.hidden = isEmpty;
    total.hidden = isEmpty;
    setText(total, wanted.search.trim() ? `${format.count(found.total)} found` : format.count(found.total));
    const isAll = found.total <= found.data.length;
    const { rows, left } =
      isHeld && table.isHeld ? inPlace(table.adapters, found.data, isAll) : { rows: found.data, left: 0 };
    isHeld = true;
    renew.hidden = left === 0;
    setText(renew, `${format.count(left)} new on this page: show`);
    table.show(rows, wanted.sort, `Adapters, page ${wanted.page} of ${pagesOf(found.total)}`);
    table.element.hidden = rows.length === 0;
    none.hidden = rows.length > 0;
    if (!none.hidden && !isEmpty)
      replace(
        none,
        noMatch(wanted.search, () => {
          search.value = "";
          search.focus();
          go({ ...listing, search: "", page: 1 }, true);
        }),
      );
    pager.show(wanted.page, found.total, found.data.length);
    if (isUsers && wanted.search.trim()) announce(`${found.total} adapters found`);
    isUsers = false;
  }

  const poll = every(POLL_S, load);
  const poolPoll = every(POLL_S, () => pool.look());
  const metrics = mayWatch
    ? watchMetrics("/console/metrics", (scrapes) => {
        table.showTraffic(new Traffic(scrapes.last, scrapes.window));
        pool.showMetrics(scrapes);
      })
    : null;
  const uploaded = () => {
    afresh();
    poolPoll.now();
  };
  jobs.addEventListener("end", uploaded);
  const endDrop = dropArea(root);
  return () => {
    clearTimeout(typing);
    asked?.abort();
    poll.stop();
    poolPoll.stop();
    metrics?.stop();
    pool.close();
    panel.close();
    endDrop();
    jobs.removeEventListener("end", uploaded);
  };
}

function noMatch(text, clear) {
  return h(
    "div",
    { class: "empty" },
    h("p", {}, "No adapter's name or description has ", h("bdi", { class: "sought" }, text.trim().slice(0, 80)), "."),
    h("button", { class: "button", type: "button", on: { click: clear } }, "Show all"),
  );
}

class Pager {
  constructor(go) {
    const turn = (by) => () => go(this.page + by);
    this.page = 1;
    this.range = h("span", { class: "muted number", id: "adapters-range" });
    this.back = h("button", { class: "button small", type: "button", on: { click: turn(-1) } }, "Previous");
    this.next = h("button", { class: "button small", type: "button", on: { click: turn(1) } }, "Next");
    this.pages = h("span", { class: "muted number" });
    this.element = h(
      "nav",
      { class: "pager", "aria-label": "Pages" },
      this.range,
      h("span", { class: "pager-end" }, this.back, this.pages, this.next),
    );
  }

  show(page, total, shown) {
    this.page = page;
    const first = (page - 1) * PAGE + 1;
    setText(
      this.range,
      shown ? `${format.count(first)}\u2013${format.count(first + shown - 1)} of ${format.count(total)}` : "",
    );
    setText(this.pages, `Page ${format.count(page)} of ${format.count(pagesOf(total))}`);
    this.back.disabled = page <= 1;
    this.next.disabled = page >= pagesOf(total);
    this.element.hidden = shown === 0;
    this.element.querySelector(".pager-end").hidden = pagesOf(total) === 1;
  }
}
