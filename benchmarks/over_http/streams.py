"""What adapters cost over HTTP: streamed completions of the server that `make serve` starts.

    python -m benchmarks.over_http.streams [--rounds 12] [--tokens 32] [--requests 32]

Each run is one batch of requests started at once. In every round each configuration runs once, in shuffled order, and
its ratio is to the base's run of that round. Decode throughput is counted while all requests decode. The client is one
asyncio process on the same machine; its share of one core is in the table.
"""

import statistics
import tempfile
from pathlib import Path

from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, percentile, ratios, spread
from benchmarks.common.server import demo_server
from benchmarks.common.traffic import Client, Request, Run
from benchmarks.common.workload import assigned, prompt, routed, shape_of, vocabulary_of, write
from server.demo.__main__ import BASE_NAME

BASE = "base"


def names(adapters: int) -> list[str]:
    return [f"bench-{number}" for number in range(adapters)]


def batch(base_name: str, requests: int, adapters: int, tokens: int, vocabulary: int) -> list[Request]:
    """`requests` requests that take turns over `adapters` adapters (0: the base)."""
    own = names(adapters)
    return [
        Request(base_name if number is None else own[number], prompt(place, vocabulary), tokens)
        for place, number in enumerate(assigned(requests, adapters))
    ]


def measure(client: Client, configurations: dict[str, list[Request]], rounds: int, seed: int) -> dict[str, list[Run]]:
    """configuration -> one run for each round."""
    found: dict[str, list[Run]] = {name: [] for name in configurations}
    for requests in configurations.values():
        client.together(requests)  # warm up
    for number, name in interleaved(list(configurations), rounds, seed):
        found[name].append(client.together(configurations[name]))
        speed = found[name][-1].decode_tokens_per_second
        print(f"round {number + 1}/{rounds}, {name}: {speed:.1f} tok/s", flush=True)
    return found


def tell(report: Report, found: dict[str, list[Run]]) -> None:
    """Decode throughput, gaps, the client's share; ratios to the base of the round."""
    decode = {name: [run.decode_tokens_per_second for run in runs] for name, runs in found.items()}
    whole = {name: [run.tokens_per_second for run in runs] for name, runs in found.items()}
    rows: list[list[str]] = []
    for name, runs in found.items():
        gaps = [gap for run in runs for gap in run.gaps_ms]
        row = [name, spread(decode[name]).shown(1)]
        row += [f"{percentile(gaps, share):.0f}" for share in (0.5, 0.99)]
        row += [f"{statistics.median(value for run in runs for value in run.first_token_ms):.0f}"]
        row += [f"{100 * statistics.median(run.client_cpu_s / run.wall_s for run in runs):.1f} %"]
        if name == BASE:
            row += ["1", "", "1"]
        else:
            ratio = report.compare(f"decode, {name} / base", ratios(decode, BASE)[name])
            all_of_it = report.compare(f"whole run, {name} / base", ratios(whole, BASE)[name])
            row += [ratio.shown(3), ratio.interval(), all_of_it.shown(3)]
        rows.append(row)
    header = (
        "requests", "decode tok/s, median (range)", "gap p50, ms", "gap p99, ms", "ms to first token",
        "client, of one core", "decode / base, median (range)", "95 % of the median", "with prefill / base",
    )  # fmt: skip
    report.table("Streams over HTTP", header, rows)
    report.raw["runs"] = {
        name: [{**run.as_json(), "decode_tokens_per_second": round(run.decode_tokens_per_second, 2)} for run in runs]
        for name, runs in found.items()
    }


def main() -> None:
    made = parser(__doc__, rounds=12)
    made.add_argument("--requests", type=int, default=32)
    made.add_argument("--tokens", type=int, default=32, help="of each request")
    options = made.parse_args()
    base = base_of(options)
    shape, vocabulary = shape_of(base), vocabulary_of(base)
    most = 4 if options.quick else 32
    counts = {BASE: 0, f"{most // 4} adapters": most // 4, f"{most} adapters": most}
    rounds, requests = (1, 4) if options.quick else (options.rounds, options.requests)
    report = Report("http", options)
    with tempfile.TemporaryDirectory() as name:
        folders = write(Path(name) / "adapters", shape, most, routed())
        with demo_server(base, Path(name) / "server") as client:
            client.upload(dict(zip(names(most), folders, strict=True)))
            configurations = {
                label: batch(BASE_NAME, requests, count, options.tokens, vocabulary) for label, count in counts.items()
            }
            tell(report, measure(client, configurations, rounds, options.seed))
    report.write()


if __name__ == "__main__":
    main()
