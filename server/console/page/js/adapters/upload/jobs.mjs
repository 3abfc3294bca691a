/** Owns the uploads of this tab, one after the other; they go on while the reader looks at another view. No DOM. */

import { upload } from "../../api.mjs";

const RATE_OVER_S = 3;

/** Emits "change" when a job changed, "end" (detail: the job) when one came to its end. */
class Jobs extends EventTarget {
  /** The newest first. A job: {id, name, proposal, options, state, sent, total, rate, answer, error}; state: "waiting",
   * "sending", "checking", "done", "failed" or "cancelled"; rate in bytes per second. */
  all = [];
  #running = null;
  #last = 0;

  /** options: {activate, allowed_keys}; allowed_keys undefined leaves them as they are, null is every key. */
  add(name, proposal, options) {
    const job = {
      id: ++this.#last,
      name,
      proposal,
      options,
      state: "waiting",
      sent: 0,
      rate: NaN,
      answer: null,
      error: null,
      total: proposal.archive ? proposal.archive.size : proposal.config.size + proposal.weights.size,
    };
    this.all = [job, ...this.all];
    this.#changed();
    this.#next();
    return job;
  }

  cancel(job) {
    if (job === this.#running) job.call.cancel();
    else if (job.state === "waiting") this.#end(job, "cancelled");
  }

  /** Send the same files again. */
  retry(job) {
    this.remove(job);
    return this.add(job.name, job.proposal, job.options);
  }

  remove(job) {
    this.all = this.all.filter((other) => other !== job);
    this.#changed();
  }

  get ended() {
    return this.all.filter(({ state }) => ["done", "failed", "cancelled"].includes(state));
  }

  removeEnded() {
    const ended = new Set(this.ended);
    this.all = this.all.filter((job) => !ended.has(job));
    this.#changed();
  }

  get isBusy() {
    return this.#running !== null;
  }

  async #next() {
    const job = this.all.findLast((other) => other.state === "waiting");
    if (this.#running !== null || job === undefined) return;
    this.#running = job;
    job.state = "sending";
    this.#changed();
    const marks = [];
    job.call = upload("/v1/adapters", formOf(job), (sent, total) => this.#progress(job, marks, sent, total));
    try {
      job.answer = await job.call.promise;
      this.#running = null;
      this.#end(job, "done");
    } catch (error) {
      job.error = error;
      this.#running = null;
      this.#end(job, error.code === "cancelled" ? "cancelled" : "failed");
    }
    this.#next();
  }

  #progress(job, marks, sent, total) {
    const now = performance.now() / 1000;
    marks.push([now, sent]);
    while (marks.length > 2 && marks[0][0] < now - RATE_OVER_S) marks.shift();
    const [since, before] = marks[0];
    job.rate = now > since ? (sent - before) / (now - since) : NaN;
    job.sent = sent;
    job.total = total || job.total;
    if (total > 0 && sent >= total) job.state = "checking";
    this.#changed();
  }

  #end(job, state) {
    job.state = state;
    this.#changed();
    this.dispatchEvent(new CustomEvent("end", { detail: job }));
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** The form of an upload. The small parts come first, so that the server can refuse before it has read the weights. */
function formOf({ name, proposal, options }) {
  const form = new FormData();
  form.append("name", name);
  form.append("activate", options.activate ? "true" : "false");
  if (options.allowed_keys !== undefined) form.append("allowed_keys", JSON.stringify(options.allowed_keys));
  if (proposal.archive) form.append("file", proposal.archive);
  else {
    form.append("config", proposal.config, "adapter_config.json");
    form.append("weights", proposal.weights, "adapter_model.safetensors");
  }
  return form;
}

export const jobs = new Jobs();
