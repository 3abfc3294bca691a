/** Knows what an adapter may be called, and where its pages and its routes are. No DOM. */

export const LONGEST_NAME = 63;
const NAME = /^[a-z0-9][a-z0-9._-]{0,62}$/;
const ARCHIVE_END = /\.(tar\.gz|tgz|zip|tar)$/i;
const SAYS_NOTHING =
  /^(adapter|adapters|adapter_model|adapter_config|output|outputs|out|final|best|model|checkpoints?|checkpoint-\d+|downloads?)$/;

/** Why a text cannot be an adapter's name here, as found, expected and what to do; null if it can.
 * bases: the names of the base. */
export function nameProblem(name, bases = []) {
  if (name === "") return "Give it a name: requests select the adapter by it.";
  if (bases.includes(name)) return "This is the base model's name: choose another.";
  if (NAME.test(name)) return null;
  if (name.length > LONGEST_NAME) return `Found ${name.length} characters, expected at most ${LONGEST_NAME}: shorten it.`;
  const wrong = [...name].find((character) => !/[a-z0-9._-]/.test(character));
  if (wrong === undefined) return `Found ${shown(name[0])} at its beginning, expected a letter a\u2013z or a digit.`;
  return `Found ${shown(wrong)}, expected a\u2013z, 0\u20139, dot, _ and - only.`;
}

function shown(character) {
  if (/\s/.test(character)) return "a space";
  return /[A-Z]/.test(character) ? `the capital ${character}` : `\u201c${character}\u201d`;
}

/** Whether a text can select an adapter or one version of it: `NAME` or `NAME@3`. */
export function isModel(text) {
  return /^[a-z0-9][a-z0-9._-]{0,62}(@[1-9][0-9]*)?$/.test(text);
}

/** A valid name made of a file's or folder's name; "" if nothing of it can be used. */
export function nameFrom(text) {
  return text
    .replace(ARCHIVE_END, "")
    .normalize("NFKD")
    .replace(/\p{M}/gu, "")
    .toLowerCase()
    .replace(/[^a-z0-9._-]+/g, "-")
    .replace(/^[^a-z0-9]+/, "")
    .slice(0, LONGEST_NAME)
    .replace(/[._-]+$/, "");
}

/** The name to propose for what lies at a path: of the innermost part that says something. */
export function nameOfPath(path) {
  const names = path.split("/").filter(Boolean).map(nameFrom).filter(Boolean).reverse();
  return names.find((name) => !SAYS_NOTHING.test(name)) ?? names[0] ?? "";
}

/** The page of an adapter, or of the table without one. */
export function hrefOf(name) {
  return name === undefined ? "#/adapters" : `#/adapters/${encodeURIComponent(name)}`;
}

/** The playground with these models side by side, each `NAME` or `NAME@3`. */
export function playgroundOf(...models) {
  return `#/playground?${models.map((model) => `model=${encodeURIComponent(model).replace("%40", "@")}`).join("&")}`;
}

/** The route of an adapter, or of one version of it. */
export function routeOf(name, version) {
  const route = `/v1/adapters/${encodeURIComponent(name)}`;
  return version === undefined ? route : `${route}/versions/${version}`;
}

/** The active version of an adapter object; null if none is. */
export function activeOf(adapter) {
  return adapter.versions.find((version) => version.version === adapter.active) ?? null;
}

/** What kind of adapter a version is, short: "R 2/8 \u00b7 32" (variant, top-k of experts, bottleneck), "LoRA". */
export function kindOf(version) {
  if (version.peft_type === "LORA") return "LoRA";
  const experts =
    version.num_experts === null || version.num_experts === undefined
      ? null
      : version.top_k
        ? `${version.top_k}/${version.num_experts}`
        : version.num_experts > 1
          ? String(version.num_experts)
          : null;
  const kind = [version.variant, experts].filter(Boolean).join(" ");
  return [kind, version.bottleneck].filter(Boolean).join(" \u00b7 ");
}

/** The same in words, for a tooltip and a screen reader. */
export function kindInWords(version) {
  if (version.peft_type === "LORA") return "a LoRA adapter on attention";
  const chosen = version.top_k ? `${version.top_k} of ` : "";
  const experts = version.num_experts > 1 ? `${chosen}${version.num_experts} ${version.expert_type} experts` : `one ${version.expert_type} expert`;
  return `variant ${version.variant}, ${experts}${chosen ? " for each token" : ""}, bottleneck ${version.bottleneck}`;
}

const COLOURS = 16;

/** The colour of an adapter, 1 to 16: the same wherever its name is shown. */
export function colourOf(name) {
  let hash = 2166136261;
  for (let i = 0; i < name.length; i += 1) hash = Math.imul(hash ^ name.charCodeAt(i), 16777619);
  hash = Math.imul(hash ^ (hash >>> 15), 0x2c1b3c6d);
  return (((hash ^ (hash >>> 12)) >>> 0) % COLOURS) + 1;
}
