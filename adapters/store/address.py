"""Owns how a store is named: a folder for one server, or an address that many servers share.

PATH                      the folder of one server
file:///PATH              a folder that several servers share
s3://BUCKET/PREFIX        a bucket, also of what speaks S3; gs:// and az:// likewise
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adapters.errors import StoreUnusableError, store_errors
from adapters.store.folder.store import FolderStore
from adapters.store.folder.verify import verify_folder
from adapters.store.log.agreement import Timing, agree
from adapters.store.log.bucket import SCHEMES, Bucket
from adapters.store.log.objects import Objects
from adapters.store.log.shared_folder import SharedFolder
from adapters.store.log.store import OF_A_SHARED_PLACE, LogStore
from adapters.store.log.verify import verify_log
from adapters.store.protocol import Store

_ALMOST = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?!//)")


def is_shared(place: str | Path) -> bool:
    """Whether a store's name is an address, and not the folder of one server.

    Raises StoreUnusableError for what is nearly an address: as a folder it would be a store that nobody shares.
    """
    if _ALMOST.match(str(place)):
        raise StoreUnusableError(
            f"the store {place}: expected SCHEME://..., such as file:///PATH or s3://BUCKET/PREFIX; for a folder with "
            "a colon in its name, its full path"
        )
    return "://" in str(place)


def objects_at(address: str) -> Objects:
    """The objects of a shared store. Raises StoreError."""
    parts = urlsplit(address)
    if parts.username or parts.password:
        raise StoreUnusableError(
            "the store's address contains a user or a password: give credentials in the environment"
        )
    if parts.scheme == "file":
        if parts.netloc or not parts.path.startswith("/"):
            raise StoreUnusableError(f"the store {address}: expected file:///PATH, with an absolute path")
        return SharedFolder(Path(unquote(parts.path)))
    if parts.scheme not in SCHEMES:
        raise StoreUnusableError(
            f"the store {address}: found the scheme {parts.scheme!r}, expected file, {', '.join(SCHEMES)}, or a path"
        )
    try:
        return Bucket(address)
    except ImportError:
        raise StoreUnusableError(
            f"the store {address} needs the package obstore: pip install 'perft-server[bucket]'"
        ) from None
    except ValueError as error:
        raise StoreUnusableError(f"the store {error}") from None


def open_store(
    place: str | Path, cache: Path, *, cache_bytes: int | None = None, writer: str = "", timing: Timing | None = None
) -> Store:
    """Open the store of that name. cache: where a shared store keeps what this machine needs. timing: of a server, to
    be that of all which share the store. Raises StoreError."""
    if not is_shared(place):
        return FolderStore.open(Path(place))
    objects = objects_at(str(place))
    store = LogStore.open(objects, cache, cache_bytes=cache_bytes, writer=writer)
    try:
        if timing is not None:
            agree(objects, timing)
    except BaseException:
        store.close()
        raise
    return store


def verify_store(place: str | Path) -> list[str]:
    """One sentence for every problem found in a store; empty if it is sound. Raises StoreError."""
    if not is_shared(place):
        return verify_folder(Path(place))
    objects = objects_at(str(place))
    with store_errors(str(place), "verifying", OF_A_SHARED_PLACE):
        return verify_log(objects)
