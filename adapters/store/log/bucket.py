"""Owns objects in a bucket of S3, Google Cloud Storage or Azure, through obstore; also of what speaks S3 (MinIO, Ceph).

A bucket must refuse to overwrite when it is asked to (S3: If-None-Match). Credentials and regions come from the
environment, as obstore documents: https://developmentseed.org/obstore/latest/authentication/

Every call ends: with an answer, or with an error within half a minute (of a file: for every few MiB of it).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from errno import EACCES, EAGAIN, EFBIG, ENOSPC, ENXIO
from pathlib import Path
from typing import Any

from adapters.store.log.objects import Found

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "memory")
BLOCK = 4 * 1024 * 1024
"""Bytes of a file that one answer brings: it must come within the time of one, also over a slow line."""
_RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=8)}
_NO_RETRY: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=8)}
_CLIENT: Any = {"timeout": "5s", "connect_timeout": "3s", "allow_http": True}
_FILES: Any = _CLIENT | {"timeout": "20s"}
_UPLOADS_AT_ONCE = 4

_CREDENTIALS = "start the server with valid credentials that may read, write, list and delete there"
_SPACE = "make room in the bucket, or raise its quota"
_REFUSALS: dict[str, tuple[int, str]] = {
    "RequestTimeTooSkewed": (EACCES, "this machine's clock and the bucket's differ: set this machine's (NTP)"),
    "QuotaExceeded": (ENOSPC, _SPACE),
    "XMinioStorageFull": (ENOSPC, _SPACE),
    "XMinioAdminBucketQuotaExceeded": (ENOSPC, _SPACE),
    "507": (ENOSPC, _SPACE),
    "NoSuchBucket": (ENXIO, "create the bucket again, or give the address of another"),
    "ContainerNotFound": (ENXIO, "create the container again, or give the address of another"),
    "ExpiredToken": (EACCES, _CREDENTIALS),
    "401": (EACCES, _CREDENTIALS),
    "403": (EACCES, _CREDENTIALS),
    "SlowDown": (EAGAIN, "the bucket gets more requests than it takes: fewer servers, or another prefix"),
    "429": (EAGAIN, "the bucket gets more requests than it takes: fewer servers, or another prefix"),
}
"""By a code in the answer, else its HTTP status: what kind of error it is, and what to do. Nothing was changed."""

_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""By the beginning of a scheme: the least that gives credentials in the environment."""
_OF_THE_MACHINE = re.compile(r"://[^/]+/(latest/api/token|latest/meta-data/|computeMetadata/|metadata/identity/)")
"""Where the machine of a cloud is asked for credentials of its own: done where the environment has none."""
_CODE, _MESSAGE = re.compile(r"<Code>(\w+)</Code>"), re.compile(r"<Message>([^<]*)</Message>")
_STATUS, _XML = re.compile(r"status code: (\d{3})"), '<?xml version="1.0" encoding="UTF-8"?>'


class Bucket:
    """Objects below an address such as `s3://BUCKET/PREFIX`. Raises ValueError for an address that cannot be one."""

    def __init__(self, address: str, **options: Any) -> None:
        import obstore
        from obstore import exceptions, store

        self._obstore, self._errors = obstore, exceptions
        self._address = address

        def made(client: Any, retries: Any) -> Any:
            return store.from_url(address, **{"client_options": client, "retry_config": retries} | options)

        try:
            if address.startswith("memory:"):
                self._store: Any = store.from_url(address, **options)
                self._creating = self._files = self._store
            else:
                self._store, self._files = made(_CLIENT, _RETRIES), made(_FILES, _RETRIES)
                self._creating = made(_CLIENT, _NO_RETRY)  # the log asks again itself
        except (exceptions.BaseError, ValueError) as error:
            advice = f": set {self._keys}" if "Account must be specified" in str(error) else ""
            raise ValueError(f"{address}: {_first_line(error)}{advice}") from None

    def __str__(self) -> str:
        return self._address

    @property
    def _keys(self) -> str:
        return next((keys for begins, keys in _KEYS.items() if self._address.startswith(begins)), _KEYS["az"])

    def create(self, key: str, data: bytes) -> bool:
        with self._os_errors():
            try:
                self._obstore.put(self._creating, key, data, mode="create", use_multipart=False)
            except self._errors.AlreadyExistsError:
                return False
            return True

    def get(self, key: str) -> bytes | None:
        try:
            with self._os_errors():
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
            self._obstore.put(self._files, key, file, max_concurrency=_UPLOADS_AT_ONCE)

    def get_file(self, key: str, file: Path, most_bytes: int | None = None) -> None:
        """most_bytes: of an object that is not ours; a larger one is OSError (EFBIG) before it is read."""
        with self._os_errors(), file.open("xb") as target:
            size = self._obstore.head(self._store, key)["size"]
            if most_bytes is not None and size > most_bytes:
                raise OSError(EFBIG, f"found {size} bytes, expected at most {most_bytes}")
            for start in range(0, size, BLOCK):
                block = self._obstore.get_range(self._files, key, start=start, end=min(start + BLOCK, size))
                target.write(block)

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError), self._os_errors():
            self._obstore.delete(self._store, key)

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        """obstore's errors as OSError, with an errno where it is certain that nothing was changed. A missing object is
        FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, self._errors.BaseError) as error:
            found = [match[1] for pattern in (_CODE, _STATUS) if (match := pattern.search(str(error)))]
            number, advice = next((_REFUSALS[each] for each in found if each in _REFUSALS), (None, None))
            summary = _summary(error)
            if _OF_THE_MACHINE.search(summary):
                number, advice = EAGAIN, f"set {self._keys}, or give the machine a role"
                summary = f"found no credentials, in the environment or of the machine ({summary}), expected either"
            if number is None and isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{self._address}: {_first_line(error)}") from None
            told = OSError(f"{self._address}: {summary}" + (f": {advice}" if advice else ""))
            told.errno = number
            raise told from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _summary(error: Exception) -> str:
    """What happened, in a line; of an answer in XML what it says."""
    text = str(error)
    said = [match[1].rstrip(". ") for pattern in (_CODE, _MESSAGE) if (match := pattern.search(text)) and match[1]]
    return _first_line(error).removesuffix(_XML).rstrip(": ") + (f": {': '.join(said)}" if said else "")
