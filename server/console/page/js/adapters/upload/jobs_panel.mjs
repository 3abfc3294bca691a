/** Shows the uploads of this tab: how far they are, what became of them, what is wrong with them. */

import { announce, h, keyed, replace, setText } from "../../dom.mjs";
import { copyButton } from "../../copy.mjs";
import * as format from "../../format.mjs";
import { icon } from "../../icons.mjs";
import { asText, isWorthRetrying } from "../advice.mjs";
import { jobs } from "./jobs.mjs";
import { outcomeOf } from "./outcome.mjs";
import { hrefOf, playgroundOf } from "../names.mjs";
import { problemBox } from "../parts.mjs";

const MOST_WITHOUT_DISMISS_ALL = 2;

export class JobsPanel {
  #list = h("ul", { class: "jobs" });
  #dismiss = h(
    "button",
    { class: "button quiet small", type: "button", on: { click: () => jobs.removeEnded() } },
    "Dismiss all",
  );
  #head = h("div", { class: "jobs-head" }, this.#dismiss);
  #changed = () => this.#draw();

  constructor() {
    this.element = h("section", { class: "card jobs-card", "aria-label": "Uploads", hidden: true }, this.#head, this.#list);
    jobs.addEventListener("change", this.#changed);
    this.#draw();
  }

  close() {
    jobs.removeEventListener("change", this.#changed);
  }

  #draw() {
    this.element.hidden = jobs.all.length === 0;
    this.#head.hidden = jobs.ended.length <= MOST_WITHOUT_DISMISS_ALL;
    keyed(
      this.#list,
      inOrder(jobs.all),
      (job) => job.id,
      (job) => new JobItem(job).element,
      (element) => element._item.draw(),
    );
  }
}

/** What is under way comes first, in its order; then what has ended, the last first. */
function inOrder(all) {
  const isUnderWay = (job) => ["sending", "checking", "waiting"].includes(job.state);
  return [...all.filter(isUnderWay).reverse(), ...all.filter((job) => !isUnderWay(job))];
}

class JobItem {
  #state = null;
  #progress = h("progress", { max: 1 });
  #figures = h("span", { class: "muted small number" });
  #body = h("div", { class: "job-body" });
  #title = h("div", { class: "job-title" });
  #actions = h("div", { class: "job-actions" });

  constructor(job) {
    this.job = job;
    this.#progress.setAttribute("aria-label", `Upload of ${job.name}`);
    this.element = h(
      "li",
      { class: "job", data: { testid: `upload-${job.name}` } },
      h("div", { class: "job-head" }, this.#title, this.#actions),
      this.#body,
    );
    this.element._item = this;
  }

  draw() {
    const { job } = this;
    if (job.state !== this.#state) {
      this.#state = job.state;
      this.element.className = `job ${job.state}`;
      const hadFocus = this.element.contains(document.activeElement);
      this.#drawState(job);
      if (hadFocus) this.#actions.lastElementChild?.focus();
    }
    if (job.state === "sending") {
      this.#progress.value = job.total ? job.sent / job.total : 0;
      const rate = Number.isFinite(job.rate) ? ` \u00b7 ${format.bytes(Math.round(job.rate))}/s` : "";
      setText(this.#figures, `${format.bytes(job.sent)} of ${format.bytes(job.total)}${rate}`);
    }
  }

  #drawState(job) {
    const name = h("bdi", { class: "job-name" }, job.name);
    const cancel = () =>
      h("button", { class: "button small", type: "button", on: { click: () => jobs.cancel(job) } }, "Cancel");
    if (job.state === "waiting") {
      replace(this.#title, name, h("span", { class: "muted" }, "waits for the upload before it"));
      replace(this.#actions, cancel());
    } else if (job.state === "sending") {
      replace(this.#title, name, this.#figures);
      replace(this.#actions, cancel());
      replace(this.#body, this.#progress);
    } else if (job.state === "checking") {
      this.#progress.removeAttribute("value");
      replace(
        this.#title,
        name,
        h("span", { class: "muted" }, `all ${format.bytes(job.total)} are sent; the server checks them`),
      );
      replace(this.#body, this.#progress);
    } else this.#drawEnd(job, name);
  }

  #drawEnd(job, name) {
    const dismiss = h(
      "button",
      {
        class: "icon-button",
        type: "button",
        "aria-label": `Dismiss the upload of ${job.name}`,
        title: "Dismiss",
        on: { click: () => jobs.remove(job) },
      },
      icon("cross"),
    );
    const again = () =>
      h("button", { class: "button small", type: "button", on: { click: () => jobs.retry(job) } }, "Send again");
    if (job.state === "done") {
      const { title, model } = outcomeOf(job.name, job.answer);
      replace(this.#title, h("span", { class: "job-icon good" }, icon("check")), h("span", {}, title));
      replace(
        this.#actions,
        h("a", { class: "button small primary", href: playgroundOf(model) }, icon("bolt"), "Try it in the playground"),
        h("a", { class: "button small", href: hrefOf(job.name) }, "Show it"),
        dismiss,
      );
      const notes = job.answer.adapter.notes ?? [];
      replace(
        this.#body,
        notes.length
          ? h(
              "ul",
              { class: "notes small muted" },
              notes.map((note) => h("li", { dir: "auto" }, note)),
            )
          : null,
      );
      announce(title);
    } else if (job.state === "cancelled") {
      replace(this.#title, name, h("span", { class: "muted" }, "cancelled: nothing was stored"));
      replace(this.#actions, again(), dismiss);
      replace(this.#body);
      announce(`The upload of ${job.name} was cancelled`);
    } else {
      const many = job.error.violations?.length ?? 0;
      replace(
        this.#title,
        h("span", { class: "job-icon bad" }, icon("cross")),
        name,
        h("span", { class: "problem" }, many ? "was refused: nothing was stored" : "could not be uploaded"),
      );
      replace(
        this.#actions,
        many ? copyButton(() => asText(job.name, job.error), "the list", true) : null,
        isWorthRetrying(job.error) ? again() : null,
        dismiss,
      );
      replace(this.#body, problemBox(job.error));
      announce(
        `The upload of ${job.name} failed: ${many > 1 ? `${many} things are wrong with it` : (job.error.violations?.[0] ?? job.error.message)}`,
      );
    }
  }
}

window.addEventListener("beforeunload", (event) => {
  if (jobs.isBusy) event.preventDefault();
});
