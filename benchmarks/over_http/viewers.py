"""What open console pages cost the streams of one server.

    python -m benchmarks.over_http.viewers [--rounds 8] [--viewers 20] [--names 200]

8 streams over 8 adapters (R, M 4, K 2, bottleneck 16) of a server that knows `--names` names, each of which was asked
once, so that each has metrics of its own. In every round the streams run without viewers, and with `--viewers` open
pages: half of them on Watch, half on Adapters. A page asks what `server/console/page` asks while it is looked at, at
the same pace, from a process of its own that computes only where the server leaves a core idle: browsers are on other
machines.
"""

import asyncio
import multiprocessing
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, percentile, ratios, spread
from benchmarks.common.server import pool_server
from benchmarks.common.traffic import Client, Request, Run
from benchmarks.common.workload import prompt, routed, rows_of, shape_of, vocabulary_of, write

ADAPTERS, STREAMS = 8, 8
SHAPE = routed(bottleneck=16)
NOBODY = "nobody looks"
LIST = "/v1/adapters?limit=50&offset=0&sort=name&versions=active"
POOL = "/v1/adapters?resident=device&sort=-rows&limit=200&versions=active"
PAGES = {
    "watch": (("/console/metrics", 2.0), ("/console/session", 10.0)),
    "adapters": ((LIST, 5.0), (POOL, 5.0), ("/console/metrics", 4.0), ("/console/session", 10.0)),
}
"""What a view asks, and about how many seconds after each answer it asks again."""


def name_of(number: int) -> str:
    return f"bench-{number}"


@contextmanager
def looked_at(client: Client, viewers: int) -> Iterator[None]:
    """While `viewers` pages are open. Raises RuntimeError if one was refused anything."""
    spawn = multiprocessing.get_context("spawn")
    opened, closed, failed = spawn.Event(), spawn.Event(), spawn.Queue()
    process = spawn.Process(target=_view, args=(client.url, client._headers, viewers, opened, closed, failed))
    process.start()
    opened.wait(60)
    try:
        yield
    finally:
        closed.set()
        process.join(60)
    if not failed.empty():
        raise RuntimeError(failed.get())


def _view(url: str, headers: dict[str, str], viewers: int, opened: Event, closed: Event, failed: Any) -> None:
    _stand_back()

    async def ask(session: aiohttp.ClientSession, path: str, seconds: float, delay: float) -> None:
        await asyncio.sleep(delay * seconds)
        while not closed.is_set():
            async with session.get(path) as response:
                await response.read()
                if response.status != 200:
                    failed.put(f"{path}: {response.status}")
                    return
            await asyncio.sleep(seconds * random.uniform(0.85, 1.15))

    async def run() -> None:
        async with aiohttp.ClientSession(url, headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
            views = [PAGES[("watch", "adapters")[number % 2]] for number in range(viewers)]
            asks = [
                ask(session, path, seconds, number / viewers)
                for number, view in enumerate(views)
                for path, seconds in view
            ]
            running = asyncio.gather(*asks)
            await asyncio.sleep(5)
            opened.set()
            await running

    asyncio.run(run())


def _stand_back() -> None:
    """Let this process have a core only while nobody else wants it: a session of its own, of the lowest weight."""
    os.setsid()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    autogroup = Path("/proc/self/autogroup")
    if autogroup.exists():
        autogroup.write_text("19", encoding="ascii")


def keep_apart() -> None:
    """Give the engine the last core for itself and everything else the others, as a GPU would leave them."""
    cores = sorted(os.sched_getaffinity(0))
    children = psutil.Process().children(recursive=True)
    engines = {each.pid for each in children if "EngineCore" in " ".join(each.cmdline())}
    if not engines or len(cores) < 2:
        raise RuntimeError(f"found {len(engines)} engines and {len(cores)} cores, expected an engine and two cores")
    for each in (psutil.Process(), *children):
        for thread in each.threads():
            os.sched_setaffinity(thread.id, cores[-1:] if each.pid in engines else cores[:-1])


def measure(client: Client, requests: list[Request], viewers: int, rounds: int, seed: int) -> dict[str, list[Run]]:
    """Without and with viewers -> one run for each round."""
    pages = f"{viewers} open pages"
    found: dict[str, list[Run]] = {NOBODY: [], pages: []}
    client.together(requests)
    for number, name in interleaved(list(found), rounds, seed):
        if name == NOBODY:
            found[name].append(client.together(requests))
        else:
            with looked_at(client, viewers):
                found[name].append(client.together(requests))
        gaps = found[name][-1].gaps_ms
        print(f"round {number + 1}/{rounds}, {name}: p99 {percentile(gaps, 0.99):.1f} ms", flush=True)
    return found


def tell(report: Report, found: dict[str, list[Run]]) -> None:
    """Gaps between tokens and throughput; ratios to the run without viewers of the round."""
    of_run = {
        "gap p50, ms": lambda run: percentile(run.gaps_ms, 0.5),
        "gap p99, ms": lambda run: percentile(run.gaps_ms, 0.99),
        "tok/s": lambda run: run.decode_tokens_per_second,
    }
    pages = next(name for name in found if name != NOBODY)
    rows = []
    for what, value in of_run.items():
        values = {name: [value(run) for run in runs] for name, runs in found.items()}
        ratio = report.compare(f"{what}: {pages} / {NOBODY}", ratios(values, NOBODY)[pages])
        shown = [spread(values[name]).shown(1) for name in (NOBODY, pages)]
        rows.append([what, *shown, ratio.shown(3), ratio.interval()])
    report.table("Streams beside open console pages", ("", NOBODY, pages, "ratio", "95 % of the median"), rows)
    report.raw["runs"] = {name: [run.as_json() for run in runs] for name, runs in found.items()}


def main() -> None:
    made = parser(__doc__, rounds=8)
    made.add_argument("--viewers", type=int, default=20)
    made.add_argument("--names", type=int, default=200)
    made.add_argument("--apart", action="store_true", help="the engine has a core of its own")
    made.add_argument("--tokens", type=int, default=200, help="of each stream")
    options = made.parse_args()
    base = base_of(options)
    rounds, names = (1, 20) if options.quick else (options.rounds, options.names)
    shape, vocabulary = shape_of(base), vocabulary_of(base)
    report = Report("apart_viewers" if options.apart else "viewers", options)
    with tempfile.TemporaryDirectory() as folder:
        folders = write(Path(folder) / "adapters", shape, ADAPTERS, SHAPE)
        rows = 2 * ADAPTERS * rows_of(shape, SHAPE)
        with pool_server(base, Path(folder) / "server", rows) as client:
            client.upload({name_of(number): folders[number % ADAPTERS] for number in range(names)})
            once = [Request(name_of(number), prompt(number, vocabulary), 1) for number in range(names)]
            client.at_most(once, STREAMS)
            if options.apart:
                keep_apart()
            requests = [
                Request(name_of(number), prompt(number, vocabulary), options.tokens) for number in range(STREAMS)
            ]
            tell(report, measure(client, requests, options.viewers, rounds, options.seed))
    report.write()


if __name__ == "__main__":
    main()
