/** Says what to do about what the server refused. No DOM. */

/** code -> what to do next. */
const BY_CODE = {
  invalid_adapter: "Correct what is listed, train or export it again, and upload the new files.",
  invalid_name: "Choose another name: 1 to 63 of a\u2013z, 0\u20139, dot, _ and -, beginning with a letter or digit.",
  invalid_request: "Reload this page and try again; if it stays, the server and this page may be of different versions.",
  name_conflict: "This is the base model's name. Choose another.",
  adapter_too_large:
    "Train it with a smaller bottleneck or fewer experts or layers, or ask the operator to raise --max-adapter-bytes.",
  quota_exceeded: "Delete versions or adapters that nobody needs, or ask the operator to raise the limit.",
  storage_full: "The server's disk (or its audit log) takes nothing more: tell the operator. Nothing was changed.",
  upload_timeout: "The connection was too slow for the server's time limits. Try again, or from a machine closer to it.",
  device_full: "Unpin another adapter first, or give the device a larger pool (--pool-rows).",
  adapter_unavailable: "The server cannot serve this version now; its message says why. Another version can be activated.",
  adapter_deleted: "It was deleted meanwhile. Upload it again if it is still needed.",
  adapter_not_found: "It does not exist (any more), or this key may not see it.",
  version_not_found: "This version was deleted meanwhile.",
  version_active: "Activate another version first, or delete the whole adapter.",
  active_changed: "Somebody changed the active version meanwhile. Look at the comparison again.",
  engine_unavailable: "The engine is starting or has stopped. This page shows when it is back; then try again.",
  store_unavailable: "The store that the servers share does not answer. Try again in a minute.",
  too_many_connections: "Too many connections are open. Try again in a minute.",
  invalid_api_key: "Give the page a key that the server knows (the button at the top right).",
  forbidden: "This needs the admin key (the button at the top right).",
  rate_limited: "This key has reached its limit. Try again in a minute.",
  internal_error: "A defect of the server. Its log has the details under the request's ID.",
};
const UNREACHABLE = "Check that the server runs and that the files have not changed since you chose them, then try again.";
const WORTH_RETRYING = new Set([
  null,
  "upload_timeout",
  "engine_unavailable",
  "store_unavailable",
  "too_many_connections",
  "rate_limited",
  "internal_error",
  "storage_full",
  "quota_exceeded",
  "adapter_unavailable",
  "cancelled",
]);

/** What to do about an ApiError; "" where nothing is known. */
export function adviceFor(error) {
  if (error.code === "cancelled") return "";
  return error.status === 0 ? UNREACHABLE : (BY_CODE[error.code] ?? "");
}

/** Whether the same request may succeed later. */
export function isWorthRetrying(error) {
  return WORTH_RETRYING.has(error.code ?? null);
}

const PARTS = /^(found\s.*?)(?:,\s+(expected\s.*?))?(?:[:;]\s+(?!.*,\s+expected\s)(.*))?$/s;
const WHERE = /^([^\s:][^:]{0,160}):\s+(.*)$/s;

/** A violation in its parts: {where, found, expected, todo}; `found` is all of the text where it has no such form. */
export function partsOf(violation) {
  const [, where, rest] = WHERE.exec(violation) ?? [null, "", violation];
  if (/^found\s/.test(where)) return { ...splitFound(violation), where: "" };
  return { ...splitFound(rest), where: where ?? "" };
}

function splitFound(text) {
  const match = /^found\s/.test(text) ? PARTS.exec(text) : null;
  if (match !== null) {
    const [, found, expected = "", todo = ""] = match;
    return !expected && /^input should /i.test(todo)
      ? { found, expected: todo.replace(/^input should (be )?/i, "expected "), todo: "" }
      : { found, expected, todo };
  }
  const [, found, expected] = /^(missing|unknown key)[,;]\s+(expected\s.*)$/s.exec(text) ?? [null, text, ""];
  return { found, expected, todo: "" };
}

/** All violations as one text to hand on. */
export function asText(source, error) {
  const lines = error.violations?.length ? error.violations.map((violation) => `- ${violation}`) : [error.message];
  const id = error.requestId ? [`request ${error.requestId}`] : [];
  return [`${source}: ${error.code ?? "not sent"}`, ...lines, ...id].join("\n");
}
