/** Makes a text of a model, an adapter or an error safe to look at: what would not print, or would turn the text around it,
 * is shown as a sign. */

const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u{e0000}-\u{e007f}]/gu;

function sign(character) {
  return `\u27e8U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
}

/** The text with line ends as `\n`, and a sign for each control character and each change of the writing direction. */
export function visible(text) {
  return String(text).replaceAll("\r\n", "\n").replace(UNSEEN, sign);
}

/** The text cut to a number of characters, with an ellipsis if it was longer. */
export function shorten(text, longest) {
  const characters = [...text];
  return characters.length <= longest ? text : `${characters.slice(0, longest - 1).join("")}\u2026`;
}
