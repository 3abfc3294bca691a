/** Compares two versions of an adapter, field by field. No DOM. */

import * as format from "../../format.mjs";

/** [field, what it is called, how a value is written, how if two that differ would read the same]. The first are what people look for first. */
const FACTS = [
  ["state", "State", String],
  ["reason", "Why it fails", String],
  ["peft_type", "Method", (value) => (value === "LORA" ? "LoRA on attention" : value)],
  ["variant", "Variant", String],
  ["expert_type", "Expert type", String],
  ["num_experts", "Experts", String],
  ["top_k", "Top-k", String],
  ["bottleneck", "Bottleneck", String],
  ["rows", "Rows on the device", format.count],
  ["size_bytes", "Size", format.bytes, (value) => `${format.count(value)} bytes`],
  ["created", "Uploaded", format.date],
  ["last_used", "Last used", format.date],
  ["description", "Description", String],
  ["digest", "Content (digest)", (value) => `${value.slice(0, 16)}\u2026`, String],
];
const NOT_OF_THE_CONFIG = new Set([
  "peft_type",
  "format_version",
  "variant",
  "expert_type",
  "num_experts",
  "top_k",
  "bottleneck",
  "description",
]);
const TITLES = {
  alpha: "Alpha",
  activation: "Activation",
  renormalize: "Renormalize",
  gate_weight: "Gate weight",
  layers: "Layers",
  base_model_name_or_path: "Base",
  base_fingerprint: "Base's fingerprint",
  r: "Rank",
  target_modules: "Target modules",
  lora_alpha: "Alpha",
  use_rslora: "Rank-stabilised",
};
/** These differ between any two versions: they are shown, but do not make two versions different. */
const ALWAYS_DIFFER = new Set(["created", "last_used"]);

/** The rows of a comparison: each {field, title, before, after, differs}, those that differ first.
 *
 * before, after: version objects; before may be null (none is active). configs: [of before, of after], each the object of
 * adapter_config.json or null where it was not read.
 */
export function compare(before, after, configs = [null, null]) {
  const rows = [];
  for (const [field, title, write, exactly] of FACTS) {
    const pair = [before?.[field] ?? null, after[field] ?? null];
    if (pair[0] === null && pair[1] === null) continue;
    rows.push(rowOf(field, title, pair, write, exactly));
  }
  const [was, is] = configs;
  if (is !== null && (was !== null || before === null)) {
    const fields = [...new Set([...Object.keys(was ?? {}), ...Object.keys(is)])].filter(
      (field) => !NOT_OF_THE_CONFIG.has(field),
    );
    for (const field of fields) {
      rows.push(rowOf(field, TITLES[field] ?? field, [valueOf(was, field), valueOf(is, field)], inWords));
    }
  }
  return [...rows.filter((row) => row.differs), ...rows.filter((row) => !row.differs)];
}

function valueOf(config, field) {
  return config === null || config[field] === undefined ? null : config[field];
}

function rowOf(field, title, [before, after], write, exactly = write) {
  const differs = JSON.stringify(before) !== JSON.stringify(after);
  const written = (how) => [before, after].map((value) => (value === null ? format.UNKNOWN : how(value)));
  const [was, is] = written(write);
  const shown = differs && was === is ? written(exactly) : [was, is];
  return { field, title, before: shown[0], after: shown[1], differs, matters: !ALWAYS_DIFFER.has(field) };
}

function inWords(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return ranges(value);
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** [0, 1, 2, 5] -> "0\u20132, 5"; other lists as they are. */
function ranges(values) {
  if (!values.every(Number.isInteger)) return values.join(", ");
  const runs = [];
  for (const value of values) {
    const run = runs.at(-1);
    if (run !== undefined && value === run[1] + 1) run[1] = value;
    else runs.push([value, value]);
  }
  return runs.map(([first, last]) => (first === last ? String(first) : `${first}\u2013${last}`)).join(", ");
}

/** What an activation is called: "Activate", or "Roll back" to an older version. */
export function verbFor(active, version) {
  return active !== null && version < active ? "Roll back" : "Activate";
}

/** What happened since a page was read: a sentence about the version that is active now. */
export function whatHappened(name, expected, adapter) {
  const now = adapter.active;
  const was = expected === null ? "none was active" : `@${expected} was active`;
  if (now === null)
    return `When you opened this, ${was}. Meanwhile somebody took it out of use: ${name} has no active version now.`;
  const version = adapter.versions.find((one) => one.version === now);
  const isNew = expected === null || now > expected;
  const how = isNew ? `@${now} became active` : `it was rolled back to @${now}`;
  const when = version === undefined || !isNew ? "" : ` (uploaded ${format.ago(version.created)})`;
  return `When you opened this, ${was}. Meanwhile ${how}${when}. The comparison now shows what is active now.`;
}
