"""What a store that servers share costs one server: requests, uploads, activations.

    python -m benchmarks.over_http.shared_store [--rounds 12] [--changes 5]

Two servers are alive, asked in turns: one over a folder of its own, one over a folder that others could share
(`--adapter-store file://...`), which looks at it every half second and, before it lets a request in, makes sure that
its last look is recent. 8 adapters of R, M 4, K 2, bottleneck 16.

one stream          a request at a time: its first token, and the gaps between tokens
32 at once          over 8 adapters, decode throughput
upload, activate    until the answer; a change of a shared store is answered --store-lag-s after it was committed
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx

from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, percentile, ratios, spread
from benchmarks.common.server import pool_server
from benchmarks.common.traffic import Client, Request
from benchmarks.common.workload import assigned, prompt, routed, rows_of, shape_of, vocabulary_of, write

ADAPTERS, REQUESTS = 8, 32
SHAPE = routed(bottleneck=16)
OWN, SHARED = "a folder of its own", "a shared folder"
LAG_S = 2.0


def name_of(number: int) -> str:
    return f"bench-{number}"


def measure(
    clients: dict[str, Client], rounds: int, tokens: int, vocabulary: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """What is measured -> server -> one value for each round."""
    names = ("first token, ms", "gap, ms", "32 at once, tok/s")
    found: dict[str, dict[str, list[float]]] = {what: {server: [] for server in clients} for what in names}
    many = [
        Request(name_of(number or 0), prompt(place, vocabulary), tokens)
        for place, number in enumerate(assigned(REQUESTS, ADAPTERS))
    ]
    for client in clients.values():
        client.together(many)
    for number, server in interleaved(list(clients), rounds, seed):
        client = clients[server]
        alone = [
            client.together([Request(name_of(place), prompt(100 + number, vocabulary), tokens)]) for place in range(4)
        ]
        found[names[0]][server].append(median(run.first_token_ms[0] for run in alone))
        found[names[1]][server].append(median(percentile(run.gaps_ms, 0.5) for run in alone))
        found[names[2]][server].append(client.together(many).decode_tokens_per_second)
        print(f"round {number + 1}/{rounds}, {server}: {found[names[2]][server][-1]:.1f} tok/s", flush=True)
    return found


def changes(
    clients: dict[str, Client], folders: list[Path], times: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds until an upload and an activation are answered, by server."""
    found: dict[str, dict[str, list[float]]] = {
        what: {server: [] for server in clients} for what in ("upload, s", "activation, s")
    }
    for number, server in interleaved(list(clients), times, seed):
        client = clients[server]
        folder = folders[number % len(folders)]
        found["upload, s"][server].append(_timed(lambda c=client, f=folder, n=number: c.upload({f"changed-{n}": f})))  # type: ignore[misc]
        client.upload({"bench-0": folders[(number + 1) % len(folders)]})
        found["activation, s"][server].append(_timed(lambda c=client: activate(c, "bench-0", 1)))  # type: ignore[misc]
    return found


def activate(client: Client, name: str, version: int) -> None:
    answer = httpx.patch(
        f"{client.url}/v1/adapters/{name}", headers=client._headers, json={"active": version}, timeout=60
    )
    answer.raise_for_status()


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tell(report: Report, title: str, found: dict[str, dict[str, list[float]]], digits: int) -> None:
    """A row for each thing measured: both servers, and the ratio in the round."""
    rows = []
    for what, by_server in found.items():
        ratio = report.compare(f"{what}: {SHARED} / {OWN}", ratios(by_server, OWN)[SHARED])
        shown = [spread(by_server[server]).shown(digits) for server in (OWN, SHARED)]
        rows.append([what, *shown, ratio.shown(3), ratio.interval()])
    report.table(title, ("", OWN, SHARED, "ratio", "95 % of the median"), rows)
    report.raw[title] = found


def main() -> None:
    made = parser(__doc__, rounds=12)
    made.add_argument("--changes", type=int, default=5, help="uploads and activations of each server")
    made.add_argument("--tokens", type=int, default=32, help="of each request")
    options = made.parse_args()
    base = base_of(options)
    rounds, times = (1, 1) if options.quick else (options.rounds, options.changes)
    shape, vocabulary = shape_of(base), vocabulary_of(base)
    report = Report("shared_store", options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = write(folder / "adapters", shape, ADAPTERS + times + 1, SHAPE)
        given = {name_of(number): path for number, path in enumerate(folders[:ADAPTERS])}
        rows = (2 * ADAPTERS + 2 * times) * rows_of(shape, SHAPE)
        shared = ("--adapter-store", f"file://{folder / 'store'}", "--adapter-cache", str(folder / "cache"))
        with (
            pool_server(base, folder / "own", rows) as one,
            pool_server(base, folder / "shared", rows, *shared, "--store-lag-s", str(LAG_S)) as other,
        ):
            clients = {OWN: one, SHARED: other}
            for client in clients.values():
                client.upload(given)
            tell(report, "Requests", measure(clients, rounds, options.tokens, vocabulary, options.seed), 2)
            tell(report, "Changes", changes(clients, folders[ADAPTERS:], times, options.seed), 2)
    report.write()


if __name__ == "__main__":
    main()
