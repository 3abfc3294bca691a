/** One prompt to the base and up to four adapters side by side. */

import { announce, h, keyed, replace, setText } from "../dom.mjs";
import { count } from "../format.mjs";
import { ColumnView, endOf } from "../playground/column.mjs";
import { Composer } from "../playground/composer.mjs";
import { Conversation, MOST_COLUMNS } from "../playground/conversation.mjs";
import { isModel } from "../adapters/names.mjs";
import { pickModel } from "../playground/picker.mjs";
import { CHAT, TEXT } from "../playground/request.mjs";
import { session } from "../session.mjs";
import { shorten, visible } from "../text.mjs";

const DRAW_MS = 60;
/** Drawing takes at most this share of the time, also of very long answers. */
const DRAWING_SHARE = 0.15;
const LONGEST_SPOKEN = 160;
const ANNOUNCE_MS = 400;

/** The conversation goes on while other views are shown; another key begins a new one. */
let kept = null;

function conversationOf(models) {
  const whose = JSON.stringify([session.facts.label, session.facts.base]);
  if (kept === null || (kept.whose !== whose && !session.isStale)) {
    kept?.conversation.stop();
    kept = { whose, conversation: new Conversation() };
  }
  const { conversation } = kept;
  if (models.length) conversation.show(models);
  else if (conversation.columns.length === 0) conversation.show(session.facts.base.slice(0, 1));
  return conversation;
}

/** Show the view in `root`; query: `model`, repeated. Returns a function that ends it. */
export function mount(root, _rest, query) {
  const bases = session.facts.base;
  const conversation = conversationOf(query.getAll("model").filter((model) => bases.includes(model) || isModel(model)));
  const views = new Map();
  const composer = new Composer(conversation);
  const columns = h("div", { class: "columns" });
  const notice = h("div", { class: "note warn playground-notice", role: "status", hidden: true });
  const add = h("button", { class: "button", type: "button", on: { click: () => pickModel((model) => conversation.add(model)) } }, "Add a model");
  const reset = h("button", { class: "button", type: "button", on: { click: () => {
    conversation.reset();
    composer.prompt.focus();
  } } }, "Reset");
  const mode = h("select", { "aria-label": "How the prompt is sent", on: { change: () => conversation.choose(mode.value) } },
    h("option", { value: CHAT }, "Chat"), h("option", { value: TEXT }, "Plain text"));
  replace(root, h("div", { class: "playground" },
    h("div", { class: "head" }, h("h1", {}, "Playground"), h("div", { class: "head-end" }, mode, add, reset)),
    notice, columns, composer.element));

  const ends = new AbortController();
  const listen = (target, name, listener) => target.addEventListener(name, listener, { signal: ends.signal });
  const heard = new WeakSet();
  const dirty = new Set();
  let timer = null;
  let pauseMs = DRAW_MS;

  function drawDirty() {
    timer = null;
    const began = performance.now();
    if (dirty.has(conversation.reference)) conversation.columns.forEach((column) => dirty.add(column));
    for (const column of dirty) views.get(column)?.draw();
    dirty.clear();
    pauseMs = Math.max(DRAW_MS, (performance.now() - began) / DRAWING_SHARE);
  }

  function hear(column) {
    if (heard.has(column)) return;
    heard.add(column);
    listen(column, "change", () => {
      dirty.add(column);
      timer ??= setTimeout(drawDirty, pauseMs);
    });
  }

  function drawColumns() {
    for (const column of views.keys()) if (!conversation.columns.includes(column)) views.delete(column);
    keyed(columns, conversation.columns, (column) => column, (column) => {
      hear(column);
      const view = new ColumnView(conversation, column);
      views.set(column, view);
      return view.element;
    }, (_, column) => views.get(column).draw());
    columns.classList.toggle("one", conversation.columns.length === 1);
    add.disabled = conversation.columns.length >= MOST_COLUMNS;
    add.title = add.disabled ? `At most ${MOST_COLUMNS} side by side` : "";
    const wanted = conversation.columns.map(({ model }) => `model=${encodeURIComponent(model).replaceAll("%40", "@")}`).join("&");
    history.replaceState(null, "", `#/playground${wanted ? `?${wanted}` : ""}`);
    drawState();
  }

  function drawState() {
    composer.draw();
    mode.value = conversation.mode;
    mode.disabled = conversation.isRunning;
    reset.disabled = conversation.isEmpty;
    notice.hidden = conversation.notice === "";
    setText(notice, notice.hidden ? "" : "This base has no chat template, so the prompt went to /v1/completions as plain text, without a system prompt. "
      + `The API said: ${visible(conversation.notice)}`);
  }

  listen(conversation, "columns", drawColumns);
  listen(conversation, "state", drawState);
  const spoken = [];
  listen(conversation, "end", ({ detail }) => {
    spoken.push(sentenceOf(detail));
    setTimeout(() => spoken.length && announce(spoken.splice(0).join(" ")), ANNOUNCE_MS);
  });
  drawColumns();
  if (matchMedia("(pointer: fine)").matches) composer.prompt.focus({ preventScroll: true });
  return () => {
    ends.abort();
    clearTimeout(timer);
  };
}

function sentenceOf({ column, turn }) {
  if (turn.state === "failed") return `${column.model}: error, ${shorten(visible(turn.error.message), LONGEST_SPOKEN)}.`;
  return `${column.model} ${turn.state === "stopped" ? "was stopped" : "answered"}: ${count(turn.tokens)} tokens, ${endOf(turn)}.`;
}
