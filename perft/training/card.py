"""Owns the card of a trained adapter: the README.md beside its two files, for people."""

from collections.abc import Sequence
from dataclasses import dataclass

from perft.config import AdapterConfig
from perft.training.options import TrainOptions, command_line
from perft.training.scoring import Score

BARS = "▁▂▃▄▅▆▇█"
CURVE_POINTS = 50


@dataclass(frozen=True)
class Card:
    """What a card tells. config: None for a baseline. losses: (step, loss). held_out: (step, loss, accuracy)."""

    options: TrainOptions
    config: AdapterConfig | None
    examples: int
    parameters: int
    seconds: float
    steps: int
    before: Score | None
    after: Score | None
    losses: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float, float]]


def described(card: Card) -> str:
    """The card in Markdown."""
    parts = [
        f"# {card.options.output.name}",
        card.options.description or "",
        _table(("", ""), _facts(card)),
        "## Command",
        f"```\n{command_line()}\n```",
        "## Held-out examples",
        _scores(card),
        "## Loss",
        _curve([loss for _, loss in card.losses]),
        _table(
            ("step", "held-out loss", "answers right"),
            [(str(step), f"{loss:.4f}", f"{accuracy:.1%}") for step, loss, accuracy in card.held_out],
        )
        if card.held_out
        else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(card: Card) -> list[tuple[str, str]]:
    options, config = card.options, card.config
    facts = [("base", f"`{options.base}`")]
    if config is None:
        facts.append(("method", f"{options.method} (PEFT), rank {options.bottleneck}"))
    else:
        facts += [
            ("variant", f"PERFT-{config.variant}, {config.expert_type} experts"),
            ("experts", str(config.num_experts) + (f", {config.top_k} a token" if config.top_k else "")),
            ("bottleneck", str(config.bottleneck)),
            ("layers", "every MoE layer" if config.layers is None else ", ".join(map(str, config.layers))),
        ]
    facts += [
        ("parameters", f"{card.parameters:,}"),
        ("data", ", ".join(f"`{file}`" for file in options.data) + f" ({card.examples:,} examples)"),
        ("steps", f"{card.steps:,} of {options.batch_size * options.gradient_accumulation} examples"),
        ("time", f"{card.seconds:,.0f} s"),
    ]
    return facts


def _scores(card: Card) -> str:
    if card.before is None or card.after is None:
        return "None were held out."
    return _table(
        ("", "loss", "answers exactly right"),
        [
            (name, f"{score.loss:.4f}", f"{score.right} of {score.examples} ({score.accuracy:.1%})")
            for name, score in (("before (the base)", card.before), ("after", card.after))
        ],
    )


def _curve(losses: Sequence[float]) -> str:
    """The losses as a row of bars, with the first, the lowest and the last in numbers."""
    if not losses:
        return ""
    picked = [losses[at * len(losses) // CURVE_POINTS] for at in range(min(CURVE_POINTS, len(losses)))]
    low, high = min(picked), max(picked)
    width = (high - low) or 1.0
    bars = "".join(BARS[min(len(BARS) - 1, int((loss - low) / width * len(BARS)))] for loss in picked)
    return f"`{bars}`\n\nfirst {losses[0]:.4f}, lowest {min(losses):.4f}, last {losses[-1]:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
