/** Starts the page: which view is shown, who is there, whether the server answers. */

import { key } from "./api.mjs";
import { connection } from "./connection.mjs";
import { h, replace, setText } from "./dom.mjs";
import { every } from "./poll.mjs";
import { askForKey, keyForm, session } from "./session.mjs";
import { startTheme } from "./theme.mjs";
import * as adapters from "./views/adapters.mjs";
import * as playground from "./views/playground.mjs";
import * as watch from "./views/watch.mjs";
import { KEPT_S, sourceOf } from "./watch/source.mjs";

const USERS = "API keys and the admin key";
/** path -> a view: title; needs: what the key must be allowed; keys: which are; mount(root, rest, query) returns a function that ends it. */
const VIEWS = new Map([
  ["adapters", { title: "Adapters", needs: "use", keys: USERS, mount: adapters.mount }],
  ["playground", { title: "Playground", needs: "use", keys: USERS, mount: playground.mount }],
  ["watch", { title: "Watch", needs: "watch", keys: "the metrics key and the admin key", mount: watch.mount }],
]);
const SESSION_S = 10;
const STALE = "The server does not know this tab's key any more. A server that was started again may have another admin key.";

const main = document.getElementById("main");
let unmount = null;
let shown = null;
let stopReading = null;
/** The key that was said to be unknown already. */
let staleKey = null;

function offered() {
  return [...VIEWS].filter(([, view]) => session.may(view.needs));
}

/** `#/adapters/poet?a=b` as ["adapters", "poet", URLSearchParams of a=b]. */
function place() {
  const [path, ...query] = location.hash.replace(/^#\//, "").split("?");
  const [name, ...rest] = path.split("/");
  return [name, rest.map(decode).join("/"), new URLSearchParams(query.join("?"))];
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function show() {
  const facts = session.facts;
  if (facts === null) return;
  const views = offered();
  drawBar(facts, views);
  const [name, rest, query] = place();
  const isThere = VIEWS.has(name) && views.length > 0;
  const wanted = isThere ? name : views[0]?.[0];
  const view = VIEWS.get(wanted);
  const mayShow = view !== undefined && session.may(view.needs);
  const now = JSON.stringify([wanted, isThere ? rest : "", mayShow, facts.may, facts.base, facts.label, mayShow || facts.why_not]);
  if (now === shown) return;
  shown = now;
  unmount?.();
  unmount = null;
  replace(main);
  document.title = view === undefined ? "perft" : `${view.title} \u2013 perft`;
  if (mayShow) unmount = view.mount(main, isThere ? rest : "", isThere ? query : new URLSearchParams()) ?? null;
  else if (view === undefined) replace(main, keyCard("This server asks for a key", facts.why_not.use));
  else replace(main, keyCard(`${view.title} needs ${facts.key === "none" ? "a" : "another"} key`, facts.why_not[view.needs], `It is for ${view.keys}.`));
}

function drawBar(facts, views) {
  setText(document.getElementById("base"), facts.base[0] ?? "");
  document.querySelector(".brand").setAttribute("href", `#/${views[0]?.[0] ?? ""}`);
  const [name] = place();
  const current = VIEWS.has(name) ? name : views[0]?.[0];
  replace(document.getElementById("views"), views.map(([known, view]) =>
    h("a", { href: `#/${known}`, "aria-current": known === current ? "page" : null }, view.title)));
  setText(document.getElementById("key"), keyText(facts));
}

/** A reader without a key is told that one would show more. */
function keyText({ key: kind, label, may }) {
  if (kind === "none" && may.change && may.watch) return "Key";
  if (kind === "none" || kind === "unknown") return "Enter a key";
  return `Key: ${kind === "metrics" ? "metrics" : label}`;
}

function keyCard(title, why, whose = null) {
  return h("section", { class: "card sign-in" }, h("h1", {}, title), whose && h("p", {}, whose), h("p", { class: "muted" }, sentence(why ?? "")),
    keyForm(() => {}));
}

/** Say it once for each key. What is on the screen stays; the key is kept until it is replaced or forgotten. */
function tellStale() {
  if (!session.isStale || staleKey === key.get()) return;
  staleKey = key.get();
  askForKey(STALE);
}

/** Keep the minutes for Watch whichever view is shown. */
function keepReading() {
  if (session.may("watch")) stopReading ??= sourceOf("").read(KEPT_S);
  else {
    stopReading?.();
    stopReading = null;
  }
}

function drawConnection() {
  const state = document.getElementById("state");
  const banner = document.getElementById("banner");
  const engine = session.facts?.engine ?? session.facts?.following ?? null;
  const { state: reached, message } = connection;
  const [kind, text] = reached === "lost" ? ["down", "Not reachable"]
    : reached === "unavailable" || engine ? ["wait", "Not ready"] : session.facts ? ["ok", "Ready"] : ["", "Connecting"];
  state.className = `state ${kind}`;
  setText(state, text);
  const isStale = kind === "ok" && session.isStale;
  banner.className = kind === "down" ? "banner" : "banner wait";
  banner.hidden = !isStale && (kind === "ok" || kind === "");
  setText(banner, kind === "down" ? "The server does not answer. This page asks again until it does."
    : isStale ? STALE : sentence(message || engine || ""));
}

function sentence(text) {
  return text && text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

startTheme(document.getElementById("theme"));
document.getElementById("key").addEventListener("click", () => askForKey());
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
window.addEventListener("hashchange", () => {
  shown = null;
  show();
  main.focus({ preventScroll: true });
  window.scrollTo(0, 0);
});
connection.addEventListener("change", drawConnection);
session.addEventListener("change", () => {
  show();
  drawConnection();
  keepReading();
  tellStale();
});
drawConnection();
every(SESSION_S, async () => {
  await session.refresh();
  drawConnection();
});
