/** Compares two texts by words: where they part, and which words are one text's own. White space alone is no difference. */

const WORD = /(?:^\s+)?(?:[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|[\p{L}\p{M}\p{N}_]+|[^\s])\s*/gu;
const MOST_CELLS = 1_500_000;
/** Words that agree between two differences count only if they are at least as many, and if this share of what follows the
 * first difference agrees: two texts that only share their small words are not marked word for word. */
const SHORTEST_AGREEMENT = 3;
const LEAST_AGREEMENT = 0.4;

/** The words of a text, each with the white space around it; together they are the text. */
export function wordsOf(text) {
  return text.match(WORD) ?? (text === "" ? [] : [text]);
}

/** How a text differs from a reference: `parts` [{text, kind}] that together are the text; kind: "same", "own" (words that
 * the reference does not have there), or "gap" (an empty text: words of the reference are missing there). `at`: how many
 * words agree before the first difference, null if all do. `ours`, `theirs`: the first words that differ, "" at an end. */
export function compare(reference, text) {
  const [theirs, ours] = [wordsOf(reference), wordsOf(text)];
  const [a, b] = [theirs.map(keyOf), ours.map(keyOf)];
  const at = agreement(a, b);
  if (at === a.length && at === b.length) return { parts: joined(ours, ours.map(() => "same"), []), at: null, ours: "", theirs: "" };
  const { own, gaps } = differences(a, b, at);
  return { parts: joined(ours, ...smoothed(own, gaps, at)), at, ours: b[at] ?? "", theirs: a[at] ?? "" };
}

/** Where a text that still grows parts from the reference, by the words that both have; `parts` as in `compare`. */
export function compareGrowing(reference, text) {
  const [theirs, ours] = [wordsOf(reference), wordsOf(text)];
  const [a, b] = [theirs.map(keyOf), ours.map(keyOf)];
  const both = Math.min(a.length, b.length) - 1;
  const at = agreement(a, b);
  if (at >= both) return { parts: joined(ours, ours.map(() => "same"), []), at: null, ours: "", theirs: "" };
  return { parts: joined(ours, ours.map((_, n) => (n < at ? "same" : "own")), []), at, ours: b[at], theirs: a[at] };
}

function keyOf(word) {
  return word.trim();
}

function agreement(a, b) {
  const most = Math.min(a.length, b.length);
  let n = 0;
  while (n < most && a[n] === b[n]) n += 1;
  return n;
}

/** own: for each word of b whether a lacks it there; gaps: the places in b before which words of a are missing. */
function differences(a, b, start) {
  let end = 0;
  const most = Math.min(a.length, b.length) - start;
  while (end < most && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const [rows, columns] = [a.length - start - end, b.length - start - end];
  const own = b.map((_, n) => n >= start && n < start + columns);
  const gaps = [];
  if (columns === 0) gaps.push(start);
  else if (rows * columns <= MOST_CELLS) align(a, b, start, rows, columns, own, gaps);
  return { own, gaps };
}

/** The longest common subsequence of the two middles, written into `own` and `gaps`. */
function align(a, b, start, rows, columns, own, gaps) {
  const wide = columns + 1;
  const lengths = new Uint16Array((rows + 1) * wide);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      lengths[i * wide + j] = a[start + i] === b[start + j] ? lengths[(i + 1) * wide + j + 1] + 1
        : Math.max(lengths[(i + 1) * wide + j], lengths[i * wide + j + 1]);
    }
  }
  let [i, j, skipped] = [0, 0, false];
  while (j < columns) {
    if (i < rows && a[start + i] === b[start + j]) {
      if (skipped && !own[start + j - 1]) gaps.push(start + j);
      own[start + j] = false;
      [i, j, skipped] = [i + 1, j + 1, false];
    } else if (i < rows && lengths[(i + 1) * wide + j] >= lengths[i * wide + j + 1]) [i, skipped] = [i + 1, true];
    else j += 1;
  }
  if (i < rows && !own[start + columns - 1]) gaps.push(start + columns);
}

/** The kind of each word, and the gaps that are left. */
function smoothed(own, gaps, start) {
  const kinds = own.map((is) => (is ? "own" : "same"));
  const isGap = new Set(gaps);
  let free = -1;
  for (let n = start; n <= own.length; n += 1) {
    if (!own[n] && !isGap.has(n)) continue;
    if (free >= 0 && n > free && n - free < SHORTEST_AGREEMENT) kinds.fill("own", free, n);
    free = own[n] ? n + 1 : n;
  }
  const agreeing = kinds.filter((kind, n) => n >= start && kind === "same").length;
  if (agreeing < LEAST_AGREEMENT * (kinds.length - start)) kinds.fill("own", start);
  return [kinds, gaps.filter((n) => kinds[n - 1] !== "own" && kinds[n] !== "own")];
}

function joined(words, kinds, gaps) {
  const at = new Set(gaps);
  const parts = [];
  words.forEach((word, n) => {
    if (at.has(n)) parts.push({ text: "", kind: "gap" });
    const last = parts.at(-1);
    if (last?.kind === kinds[n]) last.text += word;
    else parts.push({ text: word, kind: kinds[n] });
  });
  if (at.has(words.length)) parts.push({ text: "", kind: "gap" });
  return parts;
}
