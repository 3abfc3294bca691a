"""Owns how the server has an adapter fetched: in a process of its own, under the bounds of an upload.

Invariant: the event loop never waits for a disk or a network here; a fetch that takes too long, sends nothing or is not
wanted any more is killed, and what it was ends as a ServerError.
"""

import asyncio
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from server.errors import (
    AdapterUnavailableError,
    InvalidRequestError,
    ServerError,
    SourceNotFoundError,
    UploadStorageFullError,
    UploadTooLargeError,
)
from server.sources.outcome import Outcome
from server.sources.place import Place

PARAM = "lora_path"
LAST_WAIT_S = 5.0
"""Seconds that a killed process has to be gone: one that hangs in the kernel holds nobody up."""
_ERRORS: dict[Outcome, type[ServerError]] = {
    "missing": SourceNotFoundError,
    "refused": InvalidRequestError,
    "too_large": UploadTooLargeError,
    "full": UploadStorageFullError,
    "unavailable": AdapterUnavailableError,
}
_ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""One connection to the hub that writes only where it is told to."""


@dataclass(frozen=True)
class FetchLimits:
    """max_bytes: of one file. timeout_s: for the whole adapter; idle_timeout_s: without a byte more on the disk."""

    max_bytes: int
    timeout_s: float
    idle_timeout_s: float


class Allowed(NamedTuple):
    """A place that may be fetched, and the allowed one that it is below."""

    place: Place
    root: Place


async def fetch(allowed: Allowed, into: Path, limits: FetchLimits) -> str:
    """Fetch the two files of an adapter into the empty folder `into`; returns the place, with the commit found there.

    Their content is not checked here. Raises ServerError.
    """
    place, root = allowed
    order = {
        "place": str(place),
        "scheme": place.scheme,
        "parts": place.parts,
        "root_parts": len(root.parts),
        "revision": place.revision,
        "into": str(into),
        "max_bytes": limits.max_bytes,
    }
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "server.sources.child",
        stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=_environment(),
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(order).encode() + b"\n")
        said = asyncio.ensure_future(process.stdout.read())
        try:
            await _ended(said, into, limits)
            answer = json.loads(said.result() or b"{}")
        finally:
            said.cancel()
    except TimeoutError:
        message = (
            f"{place} was too slow: at most {limits.idle_timeout_s:g} s without a byte and {limits.timeout_s:g} s in "
            "all are allowed"
        )
        raise AdapterUnavailableError(message, param=PARAM) from None
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(process.wait()), LAST_WAIT_S)
    if answer.get("outcome") == "ok":
        return str(answer["said"])
    message = answer.get("said", f"{place}: the process that fetched it was ended")
    raise _ERRORS[answer.get("outcome", "unavailable")](message, param=PARAM)


async def _ended(said: asyncio.Future[bytes], into: Path, limits: FetchLimits) -> None:
    """Wait for the process's answer. Raises TimeoutError."""
    arrived = 0
    async with asyncio.timeout(limits.timeout_s):
        while not (await asyncio.wait([said], timeout=limits.idle_timeout_s))[0]:
            before, arrived = arrived, await asyncio.to_thread(_bytes_below, into)
            if arrived <= before:
                raise TimeoutError


def _bytes_below(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.lstat().st_size
    return found


def _environment() -> dict[str, str]:
    """Ours, with this process's own way to its packages, and without the server's settings: it needs no key."""
    paths = [path for path in (path or os.getcwd() for path in sys.path) if Path(path).exists()]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PERFT_")}
    return {**inherited, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
