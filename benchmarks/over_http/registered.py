"""What many registered adapters cost over HTTP: 1,000 names, and a pool for 200 of them.

    python -m benchmarks.over_http.registered [--rounds 3] [--registered 1000] [--resident 200]

Two servers are alive, asked in turns: one with a pool for all adapters, one with a pool for 200. Adapters: R, M 4, K 2,
bottleneck 4, all layers, so that 1,000 of them fit into one machine's memory. 32 requests at a time, one after the
other ends.

few        the same 8 adapters are asked of both, while the first server knows 8 names and the second 1,000.
zipf       then all are registered on both: the n-th adapter gets 1/n as many requests as the first.
"""

import tempfile
from pathlib import Path
from random import Random

from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, percentile, ratios, spread
from benchmarks.common.server import pool_server
from benchmarks.common.traffic import Client, Request, Run
from benchmarks.common.workload import prompt, routed, rows_of, shape_of, vocabulary_of, write

FEW = 8
AT_ONCE = 32
SHAPE = routed(bottleneck=4)
WARM_UP = 32


def name_of(number: int) -> str:
    return f"bench-{number}"


def traffic(chosen: list[int], tokens: int, vocabulary: int) -> list[Request]:
    return [Request(name_of(number), prompt(place, vocabulary), tokens) for place, number in enumerate(chosen)]


def zipf(adapters: int, requests: int, seed: int) -> list[int]:
    weights = [1 / rank for rank in range(1, adapters + 1)]
    return Random(seed).choices(range(adapters), weights, k=requests)


def measure(
    servers: dict[str, Client], chosen: list[list[int]], tokens: int, vocabulary: int, seed: int
) -> dict[str, list[Run]]:
    """server -> one run for each round; in a round both get the same requests."""
    found: dict[str, list[Run]] = {name: [] for name in servers}
    for client in servers.values():
        client.at_most(traffic(chosen[0][:WARM_UP], 4, vocabulary), AT_ONCE)
    for number, name in interleaved(list(servers), len(chosen), seed):
        found[name].append(servers[name].at_most(traffic(chosen[number], tokens, vocabulary), AT_ONCE))
        speed = found[name][-1].tokens_per_second
        print(f"round {number + 1}/{len(chosen)}, {name}: {speed:.1f} tok/s", flush=True)
    return found


def tell(report: Report, title: str, found: dict[str, list[Run]], base: str) -> None:
    """Throughput and gaps by server; ratios to `base` in the round."""
    speeds = {name: [run.tokens_per_second for run in runs] for name, runs in found.items()}
    rows: list[list[str]] = []
    for name, runs in found.items():
        gaps = [gap for run in runs for gap in run.gaps_ms]
        row = [name, spread(speeds[name]).shown(1), *(f"{percentile(gaps, share):.0f}" for share in (0.5, 0.99))]
        if name == base:
            row += ["1", ""]
        else:
            ratio = report.compare(f"{title}: {name} / {base}", ratios(speeds, base)[name])
            row += [ratio.shown(3), ratio.interval()]
        rows.append(row)
    header = ("server", "tok/s, prefill included", "gap p50, ms", "gap p99, ms", f"/ {base}", "95 % of the median")
    report.table(title, header, rows)
    report.raw[title] = {name: [run.as_json() for run in runs] for name, runs in found.items()}


def main() -> None:
    made = parser(__doc__, rounds=3)
    made.add_argument("--registered", type=int, default=1000)
    made.add_argument("--resident", type=int, default=200)
    made.add_argument("--requests", type=int, default=128, help="of a round")
    made.add_argument("--tokens", type=int, default=16, help="of each request")
    options = made.parse_args()
    base = base_of(options)
    registered, resident = (20, 10) if options.quick else (options.registered, options.resident)
    rounds, requests = (1, 16) if options.quick else (options.rounds, options.requests)
    shape, vocabulary = shape_of(base), vocabulary_of(base)
    report = Report("registered", options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = dict(
            zip(map(name_of, range(registered)), write(folder / "adapters", shape, registered, SHAPE), strict=True)
        )
        few = dict(list(folders.items())[:FEW])
        with (
            pool_server(base, folder / "all", registered * rows_of(shape, SHAPE)) as whole,
            pool_server(base, folder / "part", resident * rows_of(shape, SHAPE)) as part,
        ):
            whole.upload(few)
            part.upload(folders)
            names = {f"{FEW} registered": whole, f"{registered} registered": part}
            same = [[number % FEW for number in range(requests)] for _ in range(rounds)]
            tell(
                report,
                f"Requests of the same {FEW} adapters",
                measure(names, same, options.tokens, vocabulary, options.seed),
                f"{FEW} registered",
            )
            whole.upload({each: path for each, path in folders.items() if each not in few})
            names = {"all resident": whole, f"pool for {resident}": part}
            skewed = [zipf(registered, requests, options.seed + number) for number in range(rounds)]
            tell(
                report,
                f"Zipf over {registered} registered adapters",
                measure(names, skewed, options.tokens, vocabulary, options.seed),
                "all resident",
            )
            report.raw["evictions"] = {
                each: client.metric("perft_adapter_evictions_total") for each, client in names.items()
            }
    report.write()


if __name__ == "__main__":
    main()
