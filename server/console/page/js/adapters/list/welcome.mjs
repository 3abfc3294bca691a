/** What a store without adapters shows: how the first one gets here. */

import { urlOf } from "../../api.mjs";
import { h } from "../../dom.mjs";
import { icon } from "../../icons.mjs";
import { session } from "../../session.mjs";
import { copyButton } from "../../copy.mjs";
import { keyHint } from "../key_hint.mjs";
import { chooseButtons } from "../upload/choosing.mjs";
import { showUpload } from "../upload/upload_dialog.mjs";

export function welcome(mayChange) {
  const base = session.facts.base[0] ?? "BASE";
  const commands = [
    [
      "Train",
      [
        `perft train --base ${base} --data examples.jsonl`,
        "--variant R --num-experts 4 --top-k 2 --bottleneck 16",
        "--output my-adapter",
      ].join(" \\\n  "),
    ],
    ["Upload from a terminal", `perft adapters push my-adapter my-adapter/ --server ${urlOf("")}`],
  ];
  const drop = mayChange
    ? h(
        "div",
        { class: "drop-box large" },
        icon("upload"),
        h("h2", {}, "Drop your first adapter here"),
        h("p", { class: "muted" }, "A trainer\u2019s folder, its two files, or a .zip or .tar.gz of them."),
        chooseButtons((entries) => showUpload(Promise.resolve(entries), null)),
      )
    : h(
        "div",
        { class: "drop-box large" },
        h("h2", {}, "No adapters yet"),
        h(
          "p",
          { class: "muted" },
          `${session.facts.key === "none" ? "Adapters" : "Adapters that this key may use"} appear here as soon as somebody with the admin key uploads them.`,
        ),
        keyHint(),
      );
  return h(
    "div",
    { class: "welcome" },
    drop,
    mayChange
      ? h(
          "section",
          { class: "card" },
          h("h2", {}, "No adapter yet?"),
          h("p", { class: "muted" }, "Train one on this server\u2019s base; a few hundred examples are enough to begin with."),
          commands.map(([title, text]) =>
            h(
              "div",
              { class: "command" },
              h("h3", {}, title),
              h(
                "div",
                { class: "curl-body" },
                h("pre", { tabindex: "0", role: "region", "aria-label": title }, h("code", {}, text)),
                copyButton(() => text, "the command"),
              ),
            ),
          ),
        )
      : null,
  );
}
