/** Reads what was dropped onto the page, or chosen in it, as a list of {path, file}: also whole folders. */

const MOST_FILES = 20_000;

/** The files of a drop. Must be called before the event ends; the answer comes later. Raises Error for too many files. */
export async function droppedFiles(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const entries = items.map((item) => item.webkitGetAsEntry?.() ?? null);
  const plain = [...transfer.files];
  if (entries.some((entry) => entry === null)) return plain.map((file) => ({ path: file.name, file }));
  const found = [];
  for (const entry of entries) await walk(entry, "", found);
  return found;
}

/** The files of an `<input type="file">`, of a folder with their paths in it. */
export function chosenFiles(files) {
  return [...files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

/** Whether something that is dragged over the page is files. */
export function hasFiles(event) {
  return [...(event.dataTransfer?.types ?? [])].includes("Files");
}

async function walk(entry, above, found) {
  const path = above ? `${above}/${entry.name}` : entry.name;
  if (found.length >= MOST_FILES) throw new Error(`Found more than ${MOST_FILES} files: drop the adapter's folder itself.`);
  if (entry.isFile) {
    found.push({ path, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    return;
  }
  for (const child of await childrenOf(entry)) await walk(child, path, found);
}

/** A reader gives the entries of a folder in parts. */
async function childrenOf(folder) {
  const reader = folder.createReader();
  const all = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) return all;
    all.push(...some);
  }
}
