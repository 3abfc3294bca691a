"""The places that a store can be in, for tests that run over all of them: a folder, a shared folder, a bucket."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest

from adapters.store import FolderStore, Store, verify_folder
from adapters.store.log.bucket import Bucket
from adapters.store.log.objects import Objects
from adapters.store.log.shared_folder import SharedFolder
from adapters.store.log.store import LogStore
from adapters.store.log.verify import verify_log
from tests.store_contents import bytes_of

S3_OPTIONS: dict[str, Any] = {
    "access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1", "virtual_hosted_style_request": False,
}  # fmt: skip


class Place(Protocol):
    """Where one store is. It can be opened again and again."""

    def open(self) -> Store: ...

    def blob_bytes(self) -> int:
        """What the contents really take."""

    def problems(self) -> list[str]:
        """What `perft adapters verify` finds."""


@dataclass
class InFolder:
    """The store of one server."""

    folder: Path

    def open(self) -> FolderStore:
        return FolderStore.open(self.folder)

    def blob_bytes(self) -> int:
        return bytes_of(self.folder)

    def problems(self) -> list[str]:
        return verify_folder(self.folder)


@dataclass
class Shared:
    """A log store on any objects. Each opening has a cache of its own, as each server has."""

    objects: Objects
    caches: Path

    def open(self, **options: Any) -> LogStore:
        return LogStore.open(self.objects, self.caches / uuid4().hex, **options)

    def blob_bytes(self) -> int:
        return sum(found.size for found in self.objects.list("blobs/"))

    def problems(self) -> list[str]:
        return verify_log(self.objects)


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3, with one bucket `adapters`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
        )
        client.create_bucket(Bucket="adapters")
        yield address
    finally:
        server.stop()


def bucket(address: str) -> Bucket:
    """A prefix of its own in the bucket of a server from `s3_server`."""
    return Bucket(f"s3://adapters/{uuid4().hex}", endpoint=address, **S3_OPTIONS)


def shared_folder(tmp_path: Path) -> Shared:
    return Shared(SharedFolder(tmp_path / "shared"), tmp_path / "caches")


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


KINDS = ("folder", "shared folder", "bucket")


def place(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """One place of a kind; the server of a bucket is started once."""
    if kind == "folder":
        return InFolder(tmp_path / "store")
    if kind == "shared folder":
        return shared_folder(tmp_path)
    return Shared(bucket(request.getfixturevalue("s3_address")), tmp_path / "caches")
