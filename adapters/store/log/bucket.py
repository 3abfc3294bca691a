"""Owns objects in a bucket of S3, Google Cloud Storage or Azure, through obstore; also of what speaks S3 (MinIO, Ceph).

A bucket must refuse to overwrite when it is asked to (S3: If-None-Match). Credentials and regions come from the
environment, as obstore documents: https://developmentseed.org/obstore/latest/authentication/
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from errno import EFBIG
from pathlib import Path
from typing import Any

from adapters.store.log.objects import Found

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "memory")
_RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=8)}
_CLIENT: Any = {"timeout": "10s", "connect_timeout": "3s", "allow_http": True}


class Bucket:
    """Objects below an address such as `s3://BUCKET/PREFIX`. Raises ValueError for an address that cannot be one."""

    def __init__(self, address: str, **options: Any) -> None:
        import obstore
        from obstore import exceptions, store

        self._obstore, self._errors = obstore, exceptions
        self._address = address
        try:
            chosen = {} if address.startswith("memory:") else {"client_options": _CLIENT, "retry_config": _RETRIES}
            self._store: Any = store.from_url(address, **chosen | options)
        except (exceptions.BaseError, ValueError) as error:
            raise ValueError(f"{address}: {error}") from None

    def __str__(self) -> str:
        return self._address

    def create(self, key: str, data: bytes) -> bool:
        with self._os_errors():
            try:
                self._obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except self._errors.AlreadyExistsError:
                return False
            return True

    def get(self, key: str) -> bytes | None:
        with self._os_errors():
            try:
                return bytes(self._obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def list(self, prefix: str, after: str = "") -> Iterator[Found]:
        folder, _, begins = prefix.rpartition("/")
        with self._os_errors():
            pages = self._obstore.list(self._store, folder or None, offset=after or None)
        while True:
            with self._os_errors():
                page = next(pages, None)
            if page is None:
                return
            for each in sorted(page, key=lambda meta: meta["path"]):
                if each["path"].startswith(prefix) and begins is not None:
                    yield Found(each["path"], each["size"], each["last_modified"].timestamp())

    def put_file(self, key: str, file: Path) -> None:
        with self._os_errors():
            self._obstore.put(self._store, key, file)

    def get_file(self, key: str, file: Path, most_bytes: int | None = None) -> None:
        """most_bytes: of an object that is not ours; a larger one is OSError (EFBIG) before it is read."""
        with self._os_errors(), file.open("xb") as target:
            found = self._obstore.get(self._store, key)
            if most_bytes is not None and found.meta["size"] > most_bytes:
                raise OSError(EFBIG, f"found {found.meta['size']} bytes, expected at most {most_bytes}")
            for block in found.stream(min_chunk_size=8 * 1024 * 1024):
                target.write(block)

    def remove(self, key: str) -> None:
        with self._os_errors():
            try:
                self._obstore.delete(self._store, key)
            except FileNotFoundError:
                return

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        """obstore's errors as OSError. A missing object is FileNotFoundError there too."""
        try:
            yield
        except FileNotFoundError:
            raise
        except self._errors.BaseError as error:
            first = str(error).strip().splitlines()[0]
            raise OSError(f"{self._address}: {first}") from error
