/** Knows which part of the table is shown: as the page's address, as the API's query. No DOM. */

export const PAGE = 50;
const SORTS = ["name", "rows", "running", "last_used", "created"];
/** The first click on these sorts the large, the late first. */
const DESCENDING_FIRST = new Set(["rows", "running", "last_used", "created"]);

/** Where the reader was in the table: the way back from one adapter leads there. */
export const lastListing = { address: "#/adapters" };

/** {search, sort, page} of the query of an address; page from 1. */
export function listingOf(query) {
  const sort = query.get("sort") ?? "name";
  const page = Number(query.get("page") ?? 1);
  return {
    search: query.get("search") ?? "",
    sort: SORTS.includes(sort.replace(/^-/, "")) ? sort : "name",
    page: Number.isSafeInteger(page) && page > 0 ? page : 1,
  };
}

/** The address of a listing; what is as usual is left out. */
export function addressOf({ search, sort, page }) {
  const query = new URLSearchParams();
  if (search) query.set("search", search);
  if (sort !== "name") query.set("sort", sort);
  if (page > 1) query.set("page", page);
  return query.size ? `#/adapters?${query}` : "#/adapters";
}

/** The API's path of a listing. */
export function listRoute({ search, sort, page }) {
  const query = new URLSearchParams({ versions: "active", limit: PAGE, offset: (page - 1) * PAGE, sort });
  if (search.trim()) query.set("search", search.trim());
  return `/v1/adapters?${query}`;
}

/** The API's path of what is on the device, the largest first. */
export function deviceRoute(limit) {
  return `/v1/adapters?${new URLSearchParams({ versions: "active", resident: "device", sort: "-rows", limit })}`;
}

/** The sort after a click on a column's head. */
export function nextSort(sort, column) {
  if (sort === column) return `-${column}`;
  if (sort === `-${column}`) return column;
  return DESCENDING_FIRST.has(column) ? `-${column}` : column;
}

/** `aria-sort` of a column. */
export function ariaSort(sort, column) {
  return sort === column ? "ascending" : sort === `-${column}` ? "descending" : null;
}

export function pagesOf(total) {
  return Math.max(1, Math.ceil(total / PAGE));
}

/** The adapters of an answer in the order of those shown: while somebody points at a row, it stays where it is.
 *
 * isAll: whether the answer has all that match. Then who is new comes last, and who is not in it any more keeps its row, with
 * `isGone`. Otherwise neither can be told from a change of the order: the rows stay those that are shown. Returns
 * {rows, left}; left: how many of the answer have no row.
 */
export function inPlace(shown, found, isAll) {
  const there = new Map(found.map((adapter) => [adapter.name, adapter]));
  const rows = shown.map((adapter) => there.get(adapter.name) ?? (isAll ? { ...adapter, isGone: true } : adapter));
  for (const { name } of shown) there.delete(name);
  return isAll ? { rows: [...rows, ...there.values()], left: 0 } : { rows, left: there.size };
}
