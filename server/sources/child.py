"""Fetches one adapter in a process of its own, which can be killed: `python -m server.sources.child`, see `fetching`.

Invariant: it writes nothing but the two files of an adapter into the folder it is given, none larger than it may be
(the kernel sees to that), and it ends with the server. A folder is walked from the allowed one down by descriptors,
none of which follows a link: what is opened is what was judged, whoever renames or links meanwhile, and what is checked
afterwards is the copy.
"""

import errno
import json
import os
import resource
import shutil
import stat
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from perft.reading import printable
from server.sources.outcome import Outcome

FILES = (CONFIG_FILE, WEIGHTS_FILE)
BLOCK_BYTES = 1024 * 1024
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SAID_CHARACTERS = 600


class _CannotFetchError(Exception):
    """outcome: what that is to whoever asked."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    most = order["max_bytes"]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        source = _fetch(order, Path(order["into"]), most)
        answer = {"outcome": "ok", "said": source}
    except _CannotFetchError as error:
        answer = {"outcome": error.outcome, "said": str(error)}
    except ImportError as error:
        answer = {"outcome": "unavailable", "said": f"the package {error.name} is missing on the server"}
    except Exception as error:
        said = f"{order['place']} cannot be fetched: {error}; check the place, the network and the server's credentials"
        answer = {"outcome": _outcome_of(error), "said": said}
    answer["said"] = printable(answer["said"][:_SAID_CHARACTERS])
    print(json.dumps(answer), flush=True)
    os._exit(0)


def _end_with_the_server() -> NoReturn:
    sys.stdin.buffer.read()  # its end of the pipe closes with it
    os._exit(1)


def _fetch(order: Mapping[str, Any], into: Path, most: int) -> str:
    """Fetch, and return what was fetched as a place that always names the same content, as far as there is one."""
    scheme, parts = order["scheme"], order["parts"]
    if scheme == "file":
        return _from_folder(order["root_parts"], parts[order["root_parts"] :], parts, into, most)
    if scheme == "hf":
        return _from_hub("/".join(parts), order["revision"], into, most)
    return _from_bucket(f"{scheme}://{'/'.join(parts)}", into, most)


def _from_folder(root_parts: int, below: list[str], parts: list[str], into: Path, most: int) -> str:
    """root_parts: how many of the parts name the allowed folder, whose own links are the operator's."""
    shown = root = "/" + "/".join(parts[:root_parts])
    folder = _opened(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, None, root)
    for part in below:
        shown = f"{shown}/{part}"
        folder = _opened(part, _FOLDER, folder, shown)
    for name in FILES:
        descriptor = _opened(name, _FILE, folder, f"{shown}/{name}")
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _CannotFetchError("refused", f"{shown}/{name}: found a folder or device, expected a plain file")
        with open(descriptor, "rb") as file:
            _check_size(f"{shown}/{name}", found.st_size, most)
            with (into / name).open("xb") as copy:
                shutil.copyfileobj(file, copy, BLOCK_BYTES)
    return shown


def _opened(name: str, flags: int, folder: int | None, shown: str) -> int:
    """A descriptor of `name` in `folder`. Raises _CannotFetchError."""
    try:
        return os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, folder):
            message = f"{shown}: found a symbolic link, expected none below an allowed folder"
            raise _CannotFetchError("refused", message) from None
        if error.errno == errno.ENXIO:
            raise _CannotFetchError("refused", f"{shown}: found a socket, expected a plain file") from None
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise _CannotFetchError("missing", f"{shown}: found nothing there that is an adapter's") from None
        hint = ": the server's user may not read it" if error.errno in (errno.EACCES, errno.EPERM) else ""
        raise _CannotFetchError("refused" if hint else "unavailable", f"{shown}: {error.strerror}{hint}") from None


def _is_link(name: str, folder: int | None) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _from_hub(repository: str, revision: str | None, into: Path, most: int) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub = HfApi()
    at = f"hf://{repository}" + (f"@{revision}" if revision else "")
    try:
        found = hub.model_info(repository, revision=revision)
        commit = found.sha
        if found.id != repository or commit is None:
            raise _CannotFetchError("refused", f"{at}: the hub answered for {found.id!r}, to which it was renamed")
        there = hub.get_paths_info(repository, list(FILES), revision=commit)
    except GatedRepoError:
        raise _CannotFetchError("refused", f"{at} is gated: set HF_TOKEN to a token that may read it") from None
    except RepositoryNotFoundError:
        message = f"{at}: the hub has no such repository, or none that HF_TOKEN may read"
        raise _CannotFetchError("missing", message) from None
    except RevisionNotFoundError:
        raise _CannotFetchError("missing", f"{at}: the repository has no such branch, tag or commit") from None
    sizes = {each.path: getattr(each, "size", 0) for each in there}
    for name in FILES:
        if name not in sizes:
            raise _CannotFetchError("missing", f"{at}: found no {name} in the repository")
        _check_size(f"{at}/{name}", sizes[name], most)
    beside = into / "hub"  # it leaves notes of its own there
    for name in FILES:
        os.replace(hub.hf_hub_download(repository, name, revision=commit, local_dir=beside), into / name)
    shutil.rmtree(beside)
    return f"hf://{repository}@{commit}"


def _from_bucket(address: str, into: Path, most: int) -> str:
    from adapters.store.log.bucket import Bucket

    bucket = Bucket(address, client_options={"timeout": "1h", "connect_timeout": "5s", "allow_http": True})
    for name in FILES:
        try:
            bucket.get_file(name, into / name, most)
        except FileNotFoundError:
            raise _CannotFetchError("missing", f"{address}: found no {name} there") from None
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            raise _CannotFetchError("too_large", f"{address}/{name}: {error.strerror}") from None
    return address


def _check_size(shown: str, size: int, most: int) -> None:
    if size > most:
        raise _CannotFetchError("too_large", f"{shown}: found {size} bytes, expected at most {most}")


def _outcome_of(error: Exception) -> Outcome:
    number = getattr(error, "errno", None)
    if number == errno.EFBIG:
        return "too_large"
    return "full" if number in (errno.ENOSPC, errno.EDQUOT) else "unavailable"


if __name__ == "__main__":
    main()
