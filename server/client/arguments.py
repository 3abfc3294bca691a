"""Owns the command-line values of `perft adapters`: how each is parsed and checked.

Invariant: an error about a value says what was found and what is expected, and never contains a key.
"""

import argparse
import os
import re
import ssl
from pathlib import Path

import httpx

from adapters.access import check_readable, explained, read_problem
from adapters.format.beside import HandedIn, adapter_in
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.names import NAME_RULE, is_name
from server.client.connection import ADMIN_KEY, KINDS, Server

DEFAULT_SERVER = "http://127.0.0.1:8000"
ARCHIVES = (".zip", ".tar.gz", ".tgz")
_OTHER_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|t[bxz]\w{1,3}|7z|rar|gz|bz2|xz|zst)$", re.IGNORECASE)


def add_connection(
    parser: argparse.ArgumentParser, is_default: bool, variable: str = ADMIN_KEY, timeout_s: float = 600.0
) -> None:
    """Add the options for reaching the server, accepted before a command (with defaults) and after it.

    variable: the one of the environment that holds the key.
    """

    def default(value: object) -> object:
        return value if is_default else argparse.SUPPRESS

    group = parser.add_argument_group("the server")
    group.add_argument(
        "--server",
        type=server_url,
        default=default(os.environ.get("PERFT_SERVER") or DEFAULT_SERVER),
        metavar="URL",
        help=f"default: PERFT_SERVER, or {DEFAULT_SERVER}",
    )
    group.add_argument(
        "--key",
        default=default(os.environ.get(variable) or None),
        metavar="KEY",
        help=f"{KINDS[variable]}; prefer {variable}, which other users cannot see",
    )
    group.add_argument(
        "--cacert",
        type=certificates,
        default=default(None),
        metavar="FILE",
        help="trust only the certificates in this file (default: SSL_CERT_FILE, or the usual authorities)",
    )
    group.add_argument(
        "--timeout",
        type=seconds,
        default=default(timeout_s),
        metavar="S",
        help=f"seconds to wait for data from the server (default {timeout_s:g})",
    )


def key_problem(key: str | None) -> str | None:
    """What is wrong with a key, without showing it; None: nothing."""
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        return "found a key with a space or a character outside ASCII, expected printable ASCII"
    return None


def server_of(parser: argparse.ArgumentParser, given: argparse.Namespace, variable: str = ADMIN_KEY) -> Server:
    """The server that the options of `add_connection` name. Raises SystemExit(2) for a key that is none."""
    if problem := key_problem(given.key):
        parser.error(problem)
    return Server(given.server, given.key, given.timeout, given.cacert, variable)


def server_url(text: str) -> str:
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL()
    if url.userinfo:
        raise argparse.ArgumentTypeError("found a password in the URL; expected the key in PERFT_ADMIN_KEY or --key")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a URL such as {DEFAULT_SERVER}")
    return text


def certificates(text: str) -> ssl.SSLContext:
    """A TLS context that trusts only the PEM certificates of a file."""
    try:
        return ssl.create_default_context(cafile=text)
    except OSError:
        raise argparse.ArgumentTypeError(f"found no readable certificates in {text}, expected PEM") from None


def adapter_name(text: str) -> str:
    if not is_name(text):
        raise argparse.ArgumentTypeError(f"found the name {text!r}, expected {NAME_RULE}")
    return text


def version_number(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"found the version {text!r}, expected a number from 1")
    return int(text)


def target(text: str) -> tuple[str, int | None]:
    name, at, version = text.partition("@")
    return adapter_name(name), version_number(version) if at else None


def seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected seconds above 0")
    return seconds


def adapter_path(text: str) -> HandedIn:
    """An archive, or the adapter in a folder as a trainer or a download leaves it."""
    path = Path(text)
    if problem := read_problem(path):
        raise argparse.ArgumentTypeError(problem)
    if path.is_dir():
        return _adapter_folder(path)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"found nothing at {text}, expected a folder, a .zip or a .tar.gz")
    if not text.lower().endswith(ARCHIVES):
        hint = ": compress it as .zip or .tar.gz (tar -czf adapter.tar.gz ...)" if _OTHER_ARCHIVE.search(text) else ""
        if path.name in (CONFIG_FILE, WEIGHTS_FILE):
            hint = f": give the folder that it is in, {path.parent}"
        raise argparse.ArgumentTypeError(f"found the file {text}, expected a folder, a .zip or a .tar.gz{hint}")
    return HandedIn(path)


def _adapter_folder(path: Path) -> HandedIn:
    try:
        found = adapter_in(path)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            check_readable(found.folder / name, f"chmod -R a+rX {path}")
    except PermissionError as error:
        raise argparse.ArgumentTypeError(explained(error)) from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read the folder {error.filename}: {error.strerror}") from None
    lacking = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (found.folder / name).is_file()]
    if lacking:
        message = f"found no {' and no '.join(lacking)} in the folder {found.folder}"
        raise argparse.ArgumentTypeError("; ".join((message, *found.violations)))
    return found
