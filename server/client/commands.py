"""Owns the command `perft adapters`: its arguments, what it prints and how it exits.

Invariant: exit 0 means done, 1 rejected or unreachable (the reason is on stderr), 2 wrong usage, 141 done but not read
to its end (`| head`); a key is never shown.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from signal import SIGPIPE

from adapters.errors import StoreError
from adapters.format.beside import HandedIn
from adapters.identity import content_digest
from perft.reading import printable
from server.api.schemas import AdapterObject, VersionObject
from server.client.arguments import (
    adapter_name,
    adapter_path,
    add_connection,
    seconds,
    server_of,
    target,
    version_number,
)
from server.client.connection import ClientError
from server.client.http import AdaptersClient, files_of
from server.client.live.screen import NO_TERMINAL, is_terminal
from server.client.live.watch import watch
from server.client.progress import progress
from server.client.table import adapters_table, versions_table

POLL_S = 0.3
INTERVAL_S, LIVE_TIMEOUT_S = 2.0, 10.0
"""Of --watch: seconds between two looks; the longest silence, after which the server counts as away."""

Command = Callable[[AdaptersClient, argparse.Namespace], int]


def run(arguments: list[str]) -> int:
    """Run `perft adapters ARGUMENTS` and return the exit status. Wrong usage raises SystemExit(2)."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    server = server_of(parser, parsed)
    command: Command = parsed.command
    if getattr(parsed, "watch", False):
        server = replace(server, timeout_s=min(server.timeout_s, LIVE_TIMEOUT_S))
    try:
        with AdaptersClient(server) as client:
            status = command(client, parsed)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # its output is not read any more, as of `| head`: as if SIGPIPE had ended it
        _drop_unwritten()
        return 128 + SIGPIPE
    except ClientError as error:
        _complain(str(error), error.violations)
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        _drop_unwritten()
    except KeyboardInterrupt:
        _complain("interrupted; the server still finishes what it has received")
        return 130
    return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser; each sub-command sets its function as `command`."""
    parser = argparse.ArgumentParser(
        prog="perft adapters",
        description="Manage the adapters of a running server over its HTTP API.",
        epilog="Exit status: 0 done, 1 rejected or unreachable, 2 wrong usage, 141 output not read to its end.",
    )
    add_connection(parser, is_default=True)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Command, help: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=description or f"{help[:1].upper()}{help[1:]}.")
        add_connection(sub, is_default=False)
        sub.set_defaults(command=command)
        return sub

    sub = add("list", list_command, "list the adapters, or the versions of one")
    sub.add_argument("name", nargs="?", type=adapter_name, metavar="NAME", help="show this adapter's versions")
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the API's objects instead of a table")
    shown.add_argument(
        "--watch",
        action="store_true",
        help="keep the table on the terminal, as many rows as fit, and refresh it; q or Ctrl-C ends it",
    )
    sub.add_argument("--interval", type=seconds, metavar="S", help="of --watch: seconds between two looks (default 2)")

    sub = add("show", show_command, "print one adapter, or one version of it, as JSON")
    sub.add_argument("target", type=target, metavar="NAME[@VERSION]")

    sub = add(
        "push",
        push_command,
        "upload a version",
        "Upload an adapter as the next version of NAME and make it the active one. Of a trainer's folder only the "
        "adapter's two files are sent. Pushing content that NAME already has makes no new version.",
    )
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("path", type=adapter_path, metavar="PATH", help="a folder, a .zip or a .tar.gz")
    sub.add_argument("--no-activate", action="store_true", help="leave the active version as it is")
    sub.add_argument(
        "--allowed-key",
        action="append",
        metavar="LABEL",
        help="only keys of this label may select NAME, from its first moment (repeatable; not given: as it is, or was "
        "before it was deleted)",
    )

    sub = add("activate", activate_command, "make a version the one that the bare NAME selects (also: roll back)")
    sub.add_argument("target", type=target, metavar="NAME[@VERSION]")
    sub.add_argument("version", nargs="?", type=version_number, metavar="VERSION", help="a number, unless @VERSION is")
    sub.add_argument("--if-active", type=version_number, metavar="N", help="only if version N is active now")

    sub = add(
        "rm",
        rm_command,
        "delete a version, or an adapter with all its versions",
        "Delete a version, or an adapter with all its versions. Running requests finish first; new ones are rejected.",
    )
    sub.add_argument("target", type=target, metavar="NAME[@VERSION]")
    sub.add_argument("--wait", action="store_true", help="return only once it is gone")
    sub.add_argument("--deadline", type=seconds, default=600.0, metavar="S", help="the most to wait (default 600 s)")

    sub = add(
        "verify",
        verify_command,
        "recompute the digests of a store folder, or of an adapter on the server",
        "If the argument is a folder or an address (or has a '/' in it), check that store without a server: every "
        "record, file and digest. Otherwise download NAME's versions (or the one given) and compare the digest of "
        "their bytes with the one that the server lists.",
    )
    sub.add_argument("target", metavar="FOLDER | NAME[@VERSION]")

    for name, pinned in (("pin", True), ("unpin", False)):
        sub = add(name, pin_command, "keep an adapter on the device" if pinned else "let an adapter be evicted again")
        sub.add_argument("name", type=adapter_name, metavar="NAME")
        sub.set_defaults(pinned=pinned)

    sub = add("allow", allow_command, "set which keys may select an adapter")
    sub.add_argument("name", type=adapter_name, metavar="NAME")
    sub.add_argument("labels", nargs="*", metavar="LABEL", help="the keys' labels")
    sub.add_argument("--everyone", action="store_true", help="every key may")
    sub.add_argument("--nobody", action="store_true", help="no key may")
    return parser


def list_command(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    if arguments.watch:
        return _watch(client, arguments)
    if arguments.interval is not None:
        return _complain("--interval: it belongs to --watch", status=2)
    if arguments.name is not None:
        adapter = client.adapter(arguments.name)
        print(_json(adapter.model_dump()) if arguments.json else versions_table(adapter))
        return 0
    adapters = list(client.adapters())
    if arguments.json:
        data = [adapter.model_dump() for adapter in adapters]
        print(_json({"object": "list", "data": data, "has_more": False, "next": None, "total": len(data)}))
    else:
        print(adapters_table(adapters))
    return 0


def show_command(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    name, number = arguments.target
    adapter = client.adapter(name)
    shown = adapter if number is None else _version_of(adapter, number)
    print(_json(shown.model_dump()))
    return 0


def push_command(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    given: HandedIn = arguments.path
    if given.violations:
        return _complain(f"{given.folder}: it is not clear which weights are the adapter's", given.violations)
    total = sum(file.stat().st_size for file in files_of(given.folder).values())
    with progress(arguments.name, total, then="checking") as sent:
        pushed = client.push(arguments.name, given.folder, not arguments.no_activate, arguments.allowed_key, sent)
    for note in (*given.notes, *pushed.notes):
        print(f"note: {printable(note)}", file=sys.stderr)
    if pushed.version is None:
        name = printable(pushed.adapter.name)
        print(f"{name}: one of its {len(pushed.adapter.versions)} versions already has this content")
        return 0
    state = "new" if pushed.is_new else "existing"
    active = "active" if pushed.adapter.active == pushed.version.version else "not active"
    users = _users(pushed.adapter.allowed_keys)
    print(f"{printable(pushed.version.id)} {pushed.version.digest} ({state}, {active}{users})")
    return 0


def _users(allowed_keys: list[str] | None) -> str:
    """Who alone may use an adapter; nothing where every key may."""
    if allowed_keys is None:
        return ""
    return f", for {printable(', '.join(allowed_keys))} alone" if allowed_keys else ", for the admin key alone"


def activate_command(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    name, number = arguments.target
    if (number is None) == (arguments.version is None):
        found = "no version" if number is None else "two versions"
        return _complain(f"found {found}, expected one: perft adapters activate {name} VERSION", status=2)
    changes = {"active": number or arguments.version}
    if arguments.if_active is not None:
        changes["if_active"] = arguments.if_active
    adapter = client.patch(name, changes)
    print(f"{name}@{adapter.active} is active")
    return 0


def rm_command(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    name, number = arguments.target
    answer = client.delete(name, number)
    what = name if number is None else f"{name}@{number}"
    leaving = {version.version for version in answer.versions} if number is None else {number}
    if not arguments.wait:
        print(f"{what} is being deleted")
        return 0
    deadline = time.monotonic() + arguments.deadline
    while remaining := leaving & _versions_now(client, name):
        if time.monotonic() >= deadline:
            running = ", ".join(f"{name}@{version}" for version in sorted(remaining))
            return _complain(f"{running} still draining after {arguments.deadline:g} s; the server goes on with it")
        time.sleep(POLL_S)
    print(f"{what} is gone")
    return 0


def verify_command(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    text: str = arguments.target
    if os.sep in text or Path(text).is_dir():
        try:
            return report_on_store(text)
        except StoreError as error:
            return _complain(str(error))
    try:
        name, number = target(text)
    except argparse.ArgumentTypeError as error:
        return _complain(f"{error}; or the path of a store folder", status=2)
    adapter = client.adapter(name)
    versions = adapter.versions if number is None else [_version_of(adapter, number)]
    wrong = 0
    for version in versions:
        with progress(version.id, version.size_bytes) as received:
            found = _downloaded_digest(client, name, version.version, received)
        if found == version.digest:
            print(f"{printable(version.id)} {version.digest} ok")
        else:
            wrong += 1
            _complain(f"{version.id}: its bytes have the digest {found}, expected {version.digest} as listed")
    return 1 if wrong else 0


def pin_command(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    adapter = client.patch(arguments.name, {"pinned": arguments.pinned})
    print(f"{arguments.name} is {'pinned' if adapter.pinned else 'not pinned'}")
    return 0


def allow_command(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    if bool(arguments.labels) + arguments.everyone + arguments.nobody != 1:
        return _complain("expected key labels, --everyone or --nobody", status=2)
    adapter = client.patch(arguments.name, {"allowed_keys": None if arguments.everyone else arguments.labels})
    allowed = "every key" if adapter.allowed_keys is None else ", ".join(adapter.allowed_keys) or "no key"
    print(f"{arguments.name}: selectable by {printable(allowed)}")
    return 0


def report_on_store(place: str) -> int:
    """Check a store, print what is wrong with it, and return the exit status. Raises StoreError."""
    from adapters.store import verify_store  # only this command needs it

    problems = verify_store(place)
    for problem in problems:
        print(printable(problem))
    found = f"{len(problems)} problem{'s' * (len(problems) > 1)} found" if problems else "every digest matches"
    print(f"{place}: {found}")
    return 1 if problems else 0


def _watch(client: AdaptersClient, arguments: argparse.Namespace) -> int:
    if not is_terminal():
        return _complain(f"--watch: {NO_TERMINAL}; without --watch the table is printed once", status=2)
    return watch(client, arguments.name, arguments.interval or INTERVAL_S)


def _downloaded_digest(
    client: AdaptersClient, name: str, version: int, received: Callable[[int], object]
) -> str | None:
    with client.download(name, version, "config") as blocks:
        config = b"".join(blocks)
    received(len(config))
    hashed = sha256()
    with client.download(name, version, "weights") as blocks:
        for block in blocks:
            hashed.update(block)
            received(len(block))
    return content_digest(config, hashed.digest())


def _versions_now(client: AdaptersClient, name: str) -> set[int]:
    try:
        return {version.version for version in client.adapter(name).versions}
    except ClientError as error:
        if error.status == 404:
            return set()
        raise


def _version_of(adapter: AdapterObject, number: int) -> VersionObject:
    for version in adapter.versions:
        if version.version == number:
            return version
    known = ", ".join(str(version.version) for version in adapter.versions) or "none"
    raise ClientError(f"found no version {number} of {adapter.name}, expected one of its versions ({known})", 404)


def _drop_unwritten() -> None:
    """Leave nothing that cannot be written to the end of the process, where Python would try again and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json(value: object) -> str:
    return json.dumps(value, indent=2)


def _complain(message: str, violations: tuple[str, ...] = (), status: int = 1) -> int:
    print(f"perft adapters: {printable(message)}", file=sys.stderr)
    for violation in violations:
        print(f"  - {printable(violation)}", file=sys.stderr)
    return status
