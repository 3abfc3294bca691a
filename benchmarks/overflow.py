"""The cost of more adapters than the pool holds: time to first token, on the demo base.

Two servers in one run, one with a pool for a quarter of the adapters, one with a pool for all. They get the same
requests in turns (only one is busy at a time), because machines drift. Every adapter is on the host. Popularity: Zipf
(the n-th adapter gets 1/n as many requests as the first) and uniform.

    python benchmarks/overflow.py [--adapters 32] [--requests 200] [--rounds 5] [--at-once 8] [--output FILE]
"""

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.report import facts as machine
from benchmarks.served import Client, adapters, calm, demo_base, percentile, serving, shape_of, write

POOLS = ("all", "quarter")
POPULARITIES = ("zipf", "uniform")
TOKENS = 8
PROMPT_TOKENS = 16


def name_of(number: int) -> str:
    return f"adapter-{number}"


def chosen(popularity: str, adapters: int, requests: int) -> list[str]:
    """The adapters of the requests, in order; the same in every run."""
    weights = [1 / rank if popularity == "zipf" else 1.0 for rank in range(1, adapters + 1)]
    return [name_of(number) for number in Random(popularity).choices(range(adapters), weights, k=requests)]


def ask(client: Client, asked: list[str], at_once: int) -> list[float]:
    """Seconds to the first token of every request, `at_once` of them at a time."""

    def first_token(pair: tuple[int, str]) -> float:
        number, model = pair
        start = time.perf_counter()
        prompt = [1 + (11 * number + 5 * j) % 4000 for j in range(PROMPT_TOKENS)]
        arrivals = list(client.stream(model, prompt, TOKENS))
        return arrivals[0] - start

    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(first_token, enumerate(asked)))


def measure(clients: dict[str, Client], options: argparse.Namespace) -> dict[str, dict[str, list[list[float]]]]:
    """Seconds to the first token: popularity -> pool -> round."""
    found: dict[str, dict[str, list[list[float]]]] = {each: {pool: [] for pool in POOLS} for each in POPULARITIES}
    share = options.requests // options.rounds
    for client in clients.values():
        ask(client, [name_of(number) for number in range(options.adapters)], options.at_once)  # warm up
    for number in range(options.rounds):
        for popularity in POPULARITIES:
            asked = chosen(popularity, options.adapters, options.requests)[number * share : (number + 1) * share]
            for pool in POOLS if number % 2 else reversed(POOLS):
                seconds = ask(clients[pool], asked, options.at_once)
                found[popularity][pool].append(seconds)
                p50, p95 = (1000 * percentile(seconds, part) for part in (0.5, 0.95))
                line = f"round {number + 1}, {popularity}, pool of {pool}: p50 {p50:.0f} ms, p95 {p95:.0f} ms"
                print(line, flush=True)
    return found


def summary(found: dict[str, dict[str, list[list[float]]]]) -> dict[str, Any]:
    """p50 and p95 over all requests, their ratio, and the range of the ratio over the rounds."""
    result: dict[str, Any] = {}
    for popularity, by_pool in found.items():
        for part in (0.5, 0.95):
            values = {
                pool: percentile([each for seconds in rounds for each in seconds], part)
                for pool, rounds in by_pool.items()
            }
            ratios = [
                percentile(quarter, part) / percentile(whole, part)
                for quarter, whole in zip(by_pool["quarter"], by_pool["all"], strict=True)
            ]
            result[f"{popularity}, p{100 * part:.0f}"] = {
                **{f"pool of {pool}, ms": round(1000 * value) for pool, value in values.items()},
                "ratio": round(values["quarter"] / values["all"], 3),
                "ratio by round": {
                    "median": round(statistics.median(ratios), 3),
                    "lowest": round(min(ratios), 3),
                    "highest": round(max(ratios), 3),
                },
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--requests", type=int, default=200, help="for each pool and popularity")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the result there, as JSON")
    options = parser.parse_args()
    before = calm()
    print(before, flush=True)
    base = demo_base()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = adapters(folder, shape_of(base), options.adapters)
        clients: dict[str, Client] = {}
        for pool in POOLS:
            places = options.adapters if pool == "all" else options.adapters // 4
            clients[pool] = Client(stack.enter_context(serving(base, folder / pool, places)))
            for number, adapter in enumerate(folders):
                clients[pool].upload(name_of(number), adapter)
        found = measure(clients, options)
        evictions = {pool: clients[pool].metric("perft_adapter_evictions_total") for pool in POOLS}
    results = {"summary": summary(found), "evictions": evictions}
    facts = {"adapters": options.adapters, "requests": options.requests, "at once": options.at_once, "busy": before}
    write(options.output, "overflow", machine() | facts, results)


if __name__ == "__main__":
    main()
