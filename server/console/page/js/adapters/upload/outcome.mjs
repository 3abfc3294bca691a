/** Says what became of an upload. No DOM. */

/** name: of the adapter. answer: of the upload, {created, adapter, location}. Returns {title, model}: a sentence or two, and
 * the model to try. */
export function outcomeOf(name, { created, adapter, location }) {
  const number = Number(/\/versions\/(\d+)$/.exec(location)?.[1]);
  const who = whoMayUse(adapter.allowed_keys);
  if (!number) {
    const title = created ? `${name} has a new version.` : `${name} has this content already.`;
    return { title: title + who, model: name };
  }
  const model = `${name}@${number}`;
  const state = adapter.active === number ? "active" : "stored, not active";
  const title = created
    ? `${model} is new and ${state}.`
    : `This content already was ${model}: no new version was made. It is ${state}.`;
  return { title: title + who, model };
}

/** " Only team-a may use it."; nothing where everybody may. */
function whoMayUse(allowed) {
  if (!allowed) return "";
  return ` Only ${allowed.length ? new Intl.ListFormat("en").format(allowed) : "the admin key"} may use it.`;
}
