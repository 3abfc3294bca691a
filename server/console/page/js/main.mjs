/** Starts the page: which view is shown, who is there, whether the server answers. */

import { connection } from "./connection.mjs";
import { h, replace, setText } from "./dom.mjs";
import { every } from "./poll.mjs";
import { askForKey, keyForm, session } from "./session.mjs";
import { startTheme } from "./theme.mjs";
import * as adapters from "./views/adapters.mjs";
import * as playground from "./views/playground.mjs";
import * as watch from "./views/watch.mjs";

/** path -> a view: title; needs: what the key must be allowed; mount(root, rest, query) returns a function that ends it. */
const VIEWS = new Map([
  ["adapters", { title: "Adapters", needs: "use", mount: adapters.mount }],
  ["playground", { title: "Playground", needs: "use", mount: playground.mount }],
  ["watch", { title: "Watch", needs: "watch", mount: watch.mount }],
]);
const SESSION_S = 5;

const main = document.getElementById("main");
let unmount = null;
let shown = null;

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
  const wanted = views.find(([known]) => known === name) ?? views[0];
  const now = wanted === undefined ? "sign-in" : JSON.stringify([wanted[0], wanted[0] === name ? rest : "", facts.may, facts.base, facts.label]);
  if (now === shown) return;
  shown = now;
  unmount?.();
  unmount = null;
  replace(main);
  if (wanted === undefined) {
    document.title = "perft";
    replace(main, signIn(facts));
    return;
  }
  const [, view] = wanted;
  document.title = `${view.title} \u2013 perft`;
  const isThere = wanted[0] === name;
  unmount = view.mount(main, isThere ? rest : "", isThere ? query : new URLSearchParams()) ?? null;
}

function drawBar(facts, views) {
  setText(document.getElementById("base"), facts.base[0] ?? "");
  const [name] = place();
  const current = views.find(([known]) => known === name)?.[0] ?? views[0]?.[0];
  replace(document.getElementById("views"), views.map(([known, view]) =>
    h("a", { href: `#/${known}`, "aria-current": known === current ? "page" : null }, view.title)));
  setText(document.getElementById("key"), facts.label ? `Key: ${facts.label}` : facts.key === "metrics" ? "Key: metrics" : "Key");
}

function signIn(facts) {
  return h("section", { class: "card sign-in" }, h("h1", {}, "This server asks for a key"),
    h("p", { class: "muted" }, facts.why_not?.use ?? ""), keyForm(() => {}));
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
  banner.className = kind === "down" ? "banner" : "banner wait";
  banner.hidden = kind === "ok" || kind === "";
  setText(banner, kind === "down" ? "The server does not answer. This page asks again until it does."
    : sentence(message || engine || ""));
}

function sentence(text) {
  return text && text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

startTheme(document.getElementById("theme"));
document.getElementById("key").addEventListener("click", askForKey);
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
});
drawConnection();
every(SESSION_S, async () => {
  await session.refresh();
  drawConnection();
});
