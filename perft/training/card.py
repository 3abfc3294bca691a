"""Owns the card of a trained adapter: the README.md beside its two files, for people."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from perft.config import AdapterConfig
from perft.training.options import FOR_PERFT, TrainOptions, command_line
from perft.training.plan import Plan
from perft.training.scoring import Score

BARS = "▁▂▃▄▅▆▇█"
CURVE_POINTS = 50
PACKAGES = ("perft-server", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Card:
    """What a card tells. config: None for a baseline. best_step: whose weights were kept. history: Trainer's log."""

    options: TrainOptions
    plan: Plan
    template: str
    config: AdapterConfig | None
    examples: int
    parameters: int
    seconds: float
    steps: int
    best_step: int | None
    before: Score | None
    after: Score | None
    history: Sequence[Mapping[str, Any]]


def described(card: Card) -> str:
    """The card in Markdown."""
    learned = "all tokens" if card.options.loss_on == "all" else "the answers' tokens"
    balance = f", plus {card.plan.aux_loss:g} x load balance" if card.plan.aux_loss else ""
    losses = [(entry["step"], entry["loss"]) for entry in card.history if "loss" in entry]
    looks = [entry for entry in card.history if "eval_loss" in entry]
    parts = [
        f"# {card.options.output.resolve().name}",
        card.options.description or "",
        _table(("", ""), _facts(card)),
        "## Held-out examples",
        _scores(card),
        _table(
            ("step", "held-out loss", "answers right"),
            [(str(each["step"]), f"{each['eval_loss']:.4f}", f"{each['eval_accuracy']:.1%}") for each in looks],
        )
        if looks
        else "",
        f"## Training loss ({learned}{balance})",
        _curve(losses),
        "## To train it again",
        f"```\n{command_line()}\n```",
        "with every default filled in, as a file for `--config`:",
        f"```yaml\n{_settings(card)}```",
        f"Trained with {_versions()}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(card: Card) -> list[tuple[str, str]]:
    options, config, plan = card.options, card.config, card.plan
    facts = [("base", f"`{options.base_name or options.base}`")]
    if config is None:
        facts.append(("method", f"{options.method} (PEFT), rank {options.bottleneck}"))
    else:
        facts += [
            ("variant", f"PERFT-{config.variant}, {config.expert_type} experts"),
            ("experts", str(config.num_experts) + (f", {config.top_k} a token" if config.top_k else "")),
            ("bottleneck", str(config.bottleneck)),
            ("layers", "every MoE layer" if config.layers is None else ", ".join(map(str, config.layers))),
        ]
    asked = "" if card.steps == plan.steps else f", of {plan.steps:,} asked for"
    devices = f" on {plan.devices} devices" if plan.devices > 1 else ""
    facts += [
        ("parameters", f"{card.parameters:,}"),
        ("data", ", ".join(f"`{file}`" for file in options.data) + f": {card.examples:,} examples to learn"),
        ("steps", f"{card.steps:,}{asked}; {plan.examples_a_step} examples each{devices}"),
    ]
    if card.best_step:
        facts.append(("weights", f"of step {card.best_step:,}, which had the lowest held-out loss"))
    return [*facts, ("time", f"{card.seconds:,.0f} s")]


def _settings(card: Card) -> str:
    """The options as YAML, each default as it was for this base, device and data."""
    plan, config = card.plan, card.config
    left_out = {"epochs", "threads", "overwrite", "keep_checkpoints", *(FOR_PERFT if config is None else ())}
    values = card.options.model_dump(mode="json", exclude=left_out, exclude_none=True, exclude_defaults=False)
    values |= {
        "steps": plan.steps, "batch_size": plan.batch, "learning_rate": plan.learning_rate,
        "warmup_steps": plan.warm_up, "aux_loss": plan.aux_loss, "evaluate_every": plan.evaluate_every,
        "template": card.template, "dtype": str(plan.dtype).removeprefix("torch."),
        "gradient_checkpointing": plan.gradient_checkpointing,
    }  # fmt: skip
    if config is not None:
        own = config.model_dump(mode="json", exclude_none=True)
        values |= {key: value for key, value in own.items() if key in TrainOptions.model_fields}
    kept = {key: value for key, value in values.items() if value not in (None, [], ())}
    return str(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000))


def _versions() -> str:
    found = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def _scores(card: Card) -> str:
    if card.before is None or card.after is None:
        return "None were held out."
    table = _table(
        ("", "loss", "answers exactly right"),
        [
            (name, f"{score.loss:.4f}", f"{score.right} of {score.examples} ({score.accuracy:.1%})")
            for name, score in (("before (the base)", card.before), ("after", card.after))
        ],
    )
    worse = "\n\n**Its loss is higher than the base's.**" if card.after.loss > card.before.loss else ""
    return f"{table}\n\nThe loss is that of the answers' tokens alone.{worse}"


def _curve(losses: Sequence[tuple[int, float]]) -> str:
    """The losses as a row of bars, with the first, the lowest and the last in numbers."""
    if not losses:
        return ""
    values = [loss for _, loss in losses]
    points = min(CURVE_POINTS, len(values))
    picked = [values[at * len(values) // points] for at in range(points)]
    low, high = min(picked), max(picked)
    width = (high - low) or 1.0
    bars = "".join(BARS[min(len(BARS) - 1, int((loss - low) / width * len(BARS)))] for loss in picked)
    last = losses[-1]
    return (
        f"`{bars}`\n\nfirst {values[0]:.4f} (step {losses[0][0]}), lowest {min(values):.4f}, last {last[1]:.4f} "
        f"(step {last[0]})"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
