"""Owns the command `perft store`: a store moved to an address that many servers share, or back; checked; swept; what
its servers have agreed on.

Invariant: exit 0 means done and sound, 1 that it is not, with the reason, 2 wrong usage.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from adapters.errors import StoreError
from perft.reading import printable
from server.commands.report import INTERRUPTED


def run(arguments: list[str]) -> int:
    """Run `perft store ARGUMENTS` and return the exit status. Wrong usage raises SystemExit(2)."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except StoreError as error:
        print(f"perft store: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"perft store: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("perft store: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perft store",
        description="Stores of adapters: the folder of one server, or an address that many share "
        "(file:///PATH, s3://BUCKET/PREFIX, gs://, az://). Stop the servers of a folder first.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    moving = commands.add_parser("migrate", help="copy a store: from a folder to an address, or back")
    moving.add_argument("source", metavar="FROM")
    moving.add_argument("target", metavar="TO", help="where there is nothing yet")
    moving.set_defaults(run=_migrate)
    checking = commands.add_parser("verify", help="read every record and compute every digest again")
    checking.add_argument("place", metavar="STORE")
    checking.set_defaults(run=_verify)
    sweeping = commands.add_parser("sweep", help="remove what broken-off uploads left in a shared store a day ago")
    sweeping.add_argument("place", metavar="ADDRESS")
    sweeping.set_defaults(run=_sweep)
    timing = commands.add_parser("timing", help="what all servers of a shared store must be started with")
    timing.add_argument("place", metavar="ADDRESS")
    timing.add_argument(
        "--forget", action="store_true", help="let the next server that starts choose anew; stop all of them first"
    )
    timing.set_defaults(run=_timing)
    return parser


def _migrate(given: argparse.Namespace) -> int:
    from adapters.store.migrate import migrate

    with tempfile.TemporaryDirectory() as scratch:
        names = migrate(given.source, given.target, Path(scratch), lambda line: print(printable(line), file=sys.stderr))
    print(f"{given.target}: {names} adapters; {given.source} is as it was")
    return 0


def _verify(given: argparse.Namespace) -> int:
    from server.client.commands import report_on_store

    return report_on_store(given.place)


def _sweep(given: argparse.Namespace) -> int:
    from adapters.store.address import objects_at
    from adapters.store.log.store import LogStore

    with tempfile.TemporaryDirectory() as scratch:
        store = LogStore.open(objects_at(given.place), Path(scratch))
        try:
            print(f"{given.place}: {store.sweep()} objects of broken-off uploads removed")
        finally:
            store.close()
    return 0


def _timing(given: argparse.Namespace) -> int:
    from adapters.store.address import objects_at
    from adapters.store.log.agreement import SERVERS_FILE, agreed
    from adapters.store.log.store import read_log_file

    objects = objects_at(given.place)
    read_log_file(objects)
    if given.forget:
        objects.remove(SERVERS_FILE)
        print(f"{given.place}: the next server that starts chooses --store-lag-s and --store-grace-s")
        return 0
    found = agreed(objects)
    print(f"{given.place}: {found or 'no server has started there yet'}")
    return 0
