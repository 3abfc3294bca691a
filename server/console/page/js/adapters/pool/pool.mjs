/** Works out who holds which share of the device's rows, and what changed between two looks at it. No DOM. */

import { activeOf } from "../names.mjs";

/** Shares smaller than this part of the pool are one piece of the bar. */
const SMALLEST = 0.012;
/** Of more, the smallest are summed up in the list too. */
const MOST_HOLDERS = 40;

/** The picture of the pool.
 *
 * adapters: those with their active version on the device. isAll: whether these are all of them. used, total: rows of the
 * pool; NaN where this key may not read them. Returns
 * holders: each {key, name, names, version, rows, pinned}, the largest first; equal contents are one, with several names;
 * others: {rows, adapters}: those beyond MOST_HOLDERS, summed up;
 * pieces: the holders that the bar shows one by one; small: {rows, adapters}: all that are none of them, summed up;
 * besides: rows that no active version here holds; isAll: as given;
 * free, pinned, used, total: rows (free and total may be NaN); whole: the rows of the full width; count: adapters.
 */
export function poolOf(adapters, isAll, used, total) {
  const all = holdersOf(adapters);
  const known = sum(all);
  const taken = Number.isFinite(used) ? Math.max(used, known) : known;
  const whole = Number.isFinite(total) ? Math.max(total, taken) : taken;
  const holders = all.slice(0, MOST_HOLDERS);
  const large = holders.filter((holder) => holder.rows >= whole * SMALLEST);
  const pieces = all.length === large.length + 1 ? all : large;
  return {
    holders,
    others: summedUp(all.slice(holders.length)),
    pieces,
    small: summedUp(all.slice(pieces.length)),
    isAll,
    besides: taken - known,
    free: Number.isFinite(total) ? whole - taken : NaN,
    pinned: sum(all.filter((holder) => holder.pinned)),
    count: namesOf(all),
    used: taken,
    total,
    whole,
  };
}

/** Who holds rows: one for each content, the largest first. */
function holdersOf(adapters) {
  const byContent = new Map();
  for (const adapter of adapters) {
    const version = activeOf(adapter);
    if (version === null || version.resident !== "device") continue;
    const content = version.peft_type === "PERFT" ? version.digest : version.id;
    const there = byContent.get(content);
    if (there === undefined) {
      byContent.set(content, {
        key: `${content} ${adapter.name}`,
        name: adapter.name,
        version: version.version,
        names: [adapter.name],
        rows: version.rows,
        pinned: adapter.pinned,
      });
    } else {
      there.names.push(adapter.name);
      there.pinned ||= adapter.pinned;
    }
  }
  return [...byContent.values()].sort((a, b) => b.rows - a.rows || (a.name < b.name ? -1 : 1));
}

function sum(holders) {
  return holders.reduce((rows, holder) => rows + holder.rows, 0);
}

function namesOf(holders) {
  return holders.reduce((count, holder) => count + holder.names.length, 0);
}

function summedUp(holders) {
  return { rows: sum(holders), adapters: namesOf(holders) };
}

/** Which part of the whole rows are: "54.3 %", below 1 % with two places. */
export function shareOf(rows, whole) {
  const share = (100 * rows) / whole;
  if (share > 0 && share < 0.005) return "<0.01 %";
  return `${Number(share.toFixed(share < 1 ? 2 : 1))} %`;
}

/** What changed from one list of those on the device to the next: {came, left}, each {id, name, version, rows}.
 * Where a list is not complete, only what lies above its smallest counts: below, nothing is known. */
export function changesOf(before, after) {
  const [was, is] = [occupantsOf(before.adapters), occupantsOf(after.adapters)];
  const floor = Math.max(floorOf(before, was), floorOf(after, is));
  const counts = (occupant, others) => !others.has(occupant.id) && occupant.rows > floor;
  return {
    came: [...is.values()].filter((occupant) => counts(occupant, was)),
    left: [...was.values()].filter((occupant) => counts(occupant, is)),
  };
}

function occupantsOf(adapters) {
  const found = new Map();
  for (const adapter of adapters) {
    const version = activeOf(adapter);
    if (version !== null)
      found.set(version.id, { id: version.id, name: adapter.name, version: version.version, rows: version.rows });
  }
  return found;
}

function floorOf(list, occupants) {
  return list.isAll ? -1 : Math.min(...[...occupants.values()].map((occupant) => occupant.rows));
}
