"""The targets and what the newest committed results say of each.

    python -m benchmarks.targets [--results FOLDER]

A ratio counts by the median of its rounds.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.report import RESULTS, markdown, newest


class Target(NamedTuple):
    """A bound on one comparison of one question; `is_latency`: the ratio of times, at most `bound`."""

    what: str
    question: str
    comparison: str
    bound: float
    is_latency: bool = False


TARGETS = (
    Target("32 requests, 8 adapters: decode / base", "adapters", "decode, 32 requests, 8 adapters / base", 0.97),
    Target("the same over HTTP, streamed", "http", "decode, 8 adapters / base", 0.95),
    Target("32 requests, 32 adapters", "adapters", "decode, 32 requests, 32 adapters / base", 0.95),
    Target("8 requests, 8 adapters", "adapters", "decode, 8 requests, 8 adapters / base", 0.97),
    Target("32 requests, 8 adapters, a neighbour", "neighbour", "beside a neighbour, 8 adapters / base", 0.92),
    Target("prefill of 1,800 tokens", "adapters", "prefill, 1800 tokens, 1 adapter / base", 0.95),
    Target("1 request: latency / base", "adapters", "decode, 1 request, 1 adapter / base", 1.04, True),
    Target("32 base requests: plugin on / absent", "plugin", "32 requests, plugin on / plugin absent", 0.99),
    Target("1 base request: plugin on / absent", "plugin", "1 request, plugin on / plugin absent", 0.99),
    Target("PERFT-E, 8 adapters", "adapters", "decode, variant, E / base", 0.93),
    Target("PERFT / vLLM's LoRA, 8 adapters", "peers", "PERFT / vLLM LoRA, 8 adapters", 1.1),
    Target("PERFT / Hugging Face, 8 adapters", "peers", "PERFT / Hugging Face", 5.0),
    Target("200 resident / 1 resident", "growth", "200 resident / 1 resident", 0.98),
    Target(
        "1,000 registered, Zipf / all resident", "registered",
        "Zipf over 1000 registered adapters: pool for 200 / all resident", 0.90,
    ),
)  # fmt: skip


def line(target: Target, result: dict[str, Any] | None) -> tuple[list[str], bool]:
    """The table's line, and whether the target is met; result: the newest that has the comparison."""
    bound = f"at most {target.bound:g}" if target.is_latency else f"{target.bound:g}"
    if result is None:
        return [target.what, bound, "not measured", "", "no"], False
    found = result["comparisons"][target.comparison]
    keys = ("median", "lowest", "highest", "interval_low", "interval_high")
    median, lowest, highest, low, high = (found[key] for key in keys)
    if target.is_latency:
        median, lowest, highest, low, high = 1 / median, 1 / highest, 1 / lowest, 1 / high, 1 / low
    is_met = median <= target.bound if target.is_latency else median >= target.bound
    measured = f"{median:.3f} ({lowest:.3f} to {highest:.3f}; 95 %: {low:.3f} to {high:.3f})"
    source = f"{target.question}, {result['date']}, {result['commit']}"
    return [target.what, bound, measured, source, "yes" if is_met else "no"], is_met


def table(folder: Path = RESULTS) -> str:
    """Every target, in Markdown."""
    rows = [line(target, newest(target.question, target.comparison, folder))[0] for target in TARGETS]
    return markdown(("what", "at least", "measured: median (range; interval)", "from", "met"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(table(parser.parse_args().results))


if __name__ == "__main__":
    main()
