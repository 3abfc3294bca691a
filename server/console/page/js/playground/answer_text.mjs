/** Shows an answer with the words that differ from the reference marked, and says in words where the two part. */

import { h } from "../dom.mjs";
import { shorten, visible } from "../text.mjs";
import { compare, compareGrowing } from "./words.mjs";

const LONGEST_WORD = 24;
const TAGS = { same: "span", own: "mark", gap: "i" };

/** Bring `box` in line with the parts; what is alike stays, so that a selection in it stays too. */
export function paint(box, parts) {
  parts.forEach((part, n) => {
    const tag = TAGS[part.kind];
    const there = box.children[n];
    const text = visible(part.text);
    if (there?.localName === tag) {
      if (there.textContent !== text) grow(there, text);
    } else {
      const made = h(tag, part.kind === "gap" ? { class: "gap", title: "words of the reference are missing here" } : {}, text);
      if (there) there.replaceWith(made);
      else box.append(made);
    }
  });
  while (box.children.length > parts.length) box.lastElementChild.remove();
}

function grow(element, text) {
  const node = element.firstChild;
  if (node !== null && text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else element.textContent = text;
}

/** The comparison of a turn with the reference's turn on the same prompt: {parts, note}; note: {text, kind} or null. */
export function comparison(turn, other, otherName) {
  const plain = [{ text: turn.text, kind: "same" }];
  if (other === null || other === turn || turn.text === "" || other.text === "") return { parts: plain, note: null };
  const isOver = !turn.isRunning && !other.isRunning;
  const found = (isOver ? compare : compareGrowing)(other.text, turn.text);
  return { parts: found.parts, note: noteOf(found, isOver, otherName) };
}

function noteOf({ at, ours, theirs }, isOver, name) {
  if (at === null) return isOver ? { text: `The same words as ${name}`, kind: "same" } : { text: `As ${name} so far`, kind: "growing" };
  const after = at === 0 ? "at the first word" : `after ${at} ${at === 1 ? "word" : "words"}`;
  if (ours === "") return { text: `Ends ${after}; ${name} goes on with ${quoted(theirs)}`, kind: "parted" };
  if (theirs === "") return { text: `Goes on with ${quoted(ours)} where ${name} ends, ${after}`, kind: "parted" };
  return { text: `Parts from ${name} ${after}: ${quoted(ours)} instead of ${quoted(theirs)}`, kind: "parted" };
}

function quoted(word) {
  return `\u201c${shorten(visible(word), LONGEST_WORD)}\u201d`;
}
