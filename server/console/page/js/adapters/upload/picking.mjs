/** Chooses what to upload of the files that somebody dropped or chose. No DOM.
 *
 * An entry is {path, file}: the path with "/", from the folder that was dropped. What becomes of them is a list of
 * proposals, one for each adapter: {name, archive} or {name, config, weights}, with `left` (paths that are not sent) and
 * `problems` (texts; a proposal with problems cannot be sent).
 */

import { bytes } from "../../format.mjs";
import { nameOfPath } from "../names.mjs";

export const CONFIG = "adapter_config.json";
export const WEIGHTS = "adapter_model.safetensors";
const ARCHIVE = /\.(zip|tar\.gz|tgz)$/i;
const OTHER_ARCHIVE = /\.(tar|tar\.(bz2|xz|zst)|7z|rar)$/i;
const OTHER_WEIGHTS = /\.(bin|pt|pth|ckpt|safetensors|gguf)$/i;
const OF_A_SYSTEM = /(^|\/)(__MACOSX|\.DS_Store|Thumbs\.db|desktop\.ini|\._[^/]*)(\/|$)/i;
/** A trainer's saves lie in folders of such names; the adapter itself beside or above them. */
const CHECKPOINTS = /^(checkpoints?([-_]?\d+)?|checkpoint[-_][^/]*|global_step\d+|step[-_]?\d+|epoch[-_]?\d+)$/i;
const MOST_SHOWN = 8;

/** The proposals for the entries, and `problem`: why there is none. limit: the most bytes that weights may have. */
export function pick(entries, limit = Infinity) {
  const plain = entries.filter(({ path }) => !OF_A_SYSTEM.test(path));
  const archives = plain.filter(({ path }) => !path.includes("/") && ARCHIVE.test(path));
  const folders = foldersOf(plain);
  const found = [...adapterFolders(folders)];
  const proposals = [
    ...archives.map(({ path, file }) => ofArchive(path, file, limit)),
    ...found.map((folder) => ofFolder(folder, folders.get(folder), plain, found, limit)),
  ];
  return proposals.length ? { proposals, problem: null } : { proposals, problem: nothingIn(plain) };
}

/** folder -> name of a file directly in it -> the file. */
function foldersOf(entries) {
  const folders = new Map();
  for (const { path, file } of entries) {
    const cut = path.lastIndexOf("/");
    const folder = path.slice(0, Math.max(cut, 0));
    if (!folders.has(folder)) folders.set(folder, new Map());
    folders.get(folder).set(path.slice(cut + 1), file);
  }
  return folders;
}

/** The folders to send. Files of two folders are never put together; a trainer's checkpoints count only where the adapter
 * itself is missing, and then only the last of them. */
function adapterFolders(folders) {
  const holding = [...folders.keys()].filter((folder) => folders.get(folder).has(CONFIG) || folders.get(folder).has(WEIGHTS));
  const complete = holding.filter((folder) => folders.get(folder).has(CONFIG) && folders.get(folder).has(WEIGHTS));
  const outside = complete.filter((folder) => !isCheckpoint(folder));
  if (outside.length) return outside.sort();
  if (complete.length) return lastOfEach(complete);
  return holding.sort().slice(0, 1);
}

function isCheckpoint(folder) {
  return folder.split("/").some((part) => CHECKPOINTS.test(part));
}

function lastOfEach(checkpoints) {
  const last = new Map();
  for (const folder of checkpoints) {
    const parts = folder.split("/");
    const trainer = parts
      .slice(
        0,
        parts.findIndex((part) => CHECKPOINTS.test(part)),
      )
      .join("/");
    if (!last.has(trainer) || stepOf(folder) > stepOf(last.get(trainer))) last.set(trainer, folder);
  }
  return [...last.values()].sort();
}

function stepOf(folder) {
  return Number(/(\d+)(?!.*\d)/.exec(folder)?.[1] ?? 0);
}

function ofArchive(path, file, limit) {
  const problems = file.size > 4 * limit ? [tooLarge(path, file.size, 4 * limit)] : [];
  return { name: nameOfPath(path), archive: file, source: path, left: [], notes: [], problems };
}

function ofFolder(folder, files, entries, found, limit) {
  const [config, weights] = [files.get(CONFIG) ?? null, files.get(WEIGHTS) ?? null];
  const problems = [];
  if (config === null)
    problems.push(`${CONFIG}: missing beside ${WEIGHTS}; add the file that your trainer wrote with the weights`);
  if (weights === null) problems.push(missingWeights(files));
  if (weights !== null && weights.size > limit) problems.push(tooLarge(WEIGHTS, weights.size, limit));
  const inside = folder === "" ? "" : `${folder}/`;
  const isMine = ({ path }) =>
    found.length === 1 ||
    (path.startsWith(inside) && !found.some((other) => other.length > folder.length && path.startsWith(`${other}/`)));
  const isSent = ({ path }) => path === inside + CONFIG || path === inside + WEIGHTS;
  const isArchive = ({ path }) => !path.includes("/") && ARCHIVE.test(path);
  const left = entries
    .filter((entry) => isMine(entry) && !isSent(entry) && !isArchive(entry))
    .map(({ path }) => (path.startsWith(inside) ? path.slice(inside.length) : path));
  const notes = isCheckpoint(folder)
    ? [`Only checkpoints have both files: this is the last of them, ${folder.split("/").at(-1)}.`]
    : [];
  return { name: nameOfPath(folder), config, weights, source: folder, left, notes, problems };
}

function missingWeights(files) {
  const other = [...files.keys()].find((name) => OTHER_WEIGHTS.test(name));
  return other === undefined
    ? `${WEIGHTS}: missing beside ${CONFIG}; add the weights`
    : `${WEIGHTS}: missing; found ${other} instead: save the adapter as safetensors`;
}

function tooLarge(what, size, limit) {
  return `${what}: found ${bytes(size)}, expected at most ${bytes(limit)} (the server's --max-adapter-bytes)`;
}

function nothingIn(entries) {
  const names = entries.map(({ path }) => path.split("/").at(-1));
  const packed = names.find((name) => OTHER_ARCHIVE.test(name));
  const weights = names.find((name) => OTHER_WEIGHTS.test(name));
  const expected = `expected ${CONFIG} and ${WEIGHTS}, a folder with both, or a .zip or .tar.gz of them`;
  if (packed !== undefined) return `Found ${packed}, ${expected}: pack it as .zip or .tar.gz.`;
  if (weights !== undefined) return `Found ${weights} without ${CONFIG}, ${expected}.`;
  return entries.length ? `Found ${some(names)}, ${expected}.` : `Found no files, ${expected}.`;
}

function some(names) {
  const shown = names.slice(0, MOST_SHOWN).join(", ");
  return names.length > MOST_SHOWN ? `${shown} and ${names.length - MOST_SHOWN} more` : shown;
}
