"""Owns the table of `perft inspect`: an adapter's routing, a line for each layer."""

from collections.abc import Mapping

from perft.inspection.figures import counted
from perft.inspection.routing import LayerRouting, few_tokens

SHOWN_EXPERTS = 16


def routing_table(routing: Mapping[int, LayerRouting], tokens: int, experts: int) -> list[str]:
    """Its lines, with a note where the tokens are too few for the experts."""
    note = few_tokens(tokens, experts)
    return [
        f"over {counted(tokens, 'token')}; entropy 1: all experts alike; overlap with the base's router 0: no more "
        "than by chance",
        *([f"note: {note}"] if note else []),
        "",
        f"{'layer':>5}  {'entropy':>7}  {'overlap':>7}  {'dead':>4}  use by expert",
        *(_line(layer, each) for layer, each in sorted(routing.items())),
    ]


def _line(layer: int, each: LayerRouting) -> str:
    overlap = "" if each.overlap is None else f"{each.overlap:.2f}"
    uses = [f"{share:.2f}" for share in each.use_M[:SHOWN_EXPERTS]]
    more = " ..." if len(each.use_M) > SHOWN_EXPERTS else ""
    return f"{layer:>5}  {each.entropy:>7.2f}  {overlap:>7}  {len(each.dead):>4}  {' '.join(uses)}{more}"
