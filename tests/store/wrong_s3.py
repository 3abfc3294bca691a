"""A server that speaks S3 (moto's, over HTTP) and can be told to answer otherwise: full, throttled, forbidden, slow."""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from adapters.store.log.bucket import Bucket
from tests.store import places

SKEW_S = 900.0
"""How far a client's clock may be off, as S3 has it."""


class Refusal(NamedTuple):
    """What is answered instead. seconds: of Retry-After."""

    status: str
    code: str
    message: str = ""
    seconds: int | None = None


FULL = Refusal("507 Insufficient Storage", "XMinioStorageFull", "Storage backend has reached its minimum free space.")
OVER_QUOTA = Refusal("403 Forbidden", "QuotaExceeded")
THROTTLED = Refusal("503 Slow Down", "SlowDown", "Please reduce your request rate.", 1)
DENIED = Refusal("403 Forbidden", "AccessDenied", "Access Denied")
EXPIRED = Refusal("400 Bad Request", "ExpiredToken", "The provided token has expired.")
UNKNOWN_KEY = Refusal("401 Unauthorized", "InvalidAccessKeyId", "The AWS Access Key Id does not exist.")
VANISHED = Refusal("404 Not Found", "NoSuchBucket", "The specified bucket does not exist")
SKEWED = Refusal(
    "403 Forbidden",
    "RequestTimeTooSkewed",
    "The difference between the request time and the current time is too large.",
)


@dataclass
class WrongS3:
    """refuse: what is answered to a method and a path instead (None: as usual). clock_off_s: how far its clock is ahead
    of ours. overwrites: it takes no notice of If-None-Match. seconds_per_block: how long BLOCK bytes of an answer take.
    """

    inner: Any
    address: str = ""
    refuse: Callable[[str, str], Refusal | None] = lambda method, path: None
    clock_off_s: float = 0.0
    overwrites: bool = False
    seconds_per_block: float = 0.0
    requests: list[tuple[str, str]] = field(default_factory=list)

    BLOCK = 16 * 1024

    def bucket(self) -> Bucket:
        """A prefix of its own."""
        return places.bucket(self.address)

    def refuse_all(self, refusal: Refusal | None, *methods: str) -> None:
        """The same to each of these methods (of none: to all)."""
        self.refuse = lambda method, path: refusal if not methods or method in methods else None

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        refusal = SKEWED if abs(self._skew_s(environ)) > SKEW_S else self.refuse(method, path)
        if refusal is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{refusal.code}</Code><Message>{refusal.message}</Message></Error>""".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start(refusal.status, headers + [("Retry-After", str(refusal.seconds))] * (refusal.seconds is not None))
            return [body]
        if self.overwrites:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        answer = self.inner(environ, start)
        return self._slowly(answer) if self.seconds_per_block and method == "GET" else answer

    def _skew_s(self, environ: dict[str, Any]) -> float:
        """How far the clock that signed a request is ahead of this server's."""
        signed = environ.get("HTTP_X_AMZ_DATE", "")
        if not re.fullmatch(r"\d{8}T\d{6}Z", signed):
            return 0.0
        at = datetime.strptime(signed, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return at.timestamp() - time.time() - self.clock_off_s

    def _slowly(self, answer: Iterable[bytes]) -> Iterator[bytes]:
        for part in answer:
            for begin in range(0, len(part), self.BLOCK):
                time.sleep(self.seconds_per_block)
                yield part[begin : begin + self.BLOCK]


@contextmanager
def wrong_s3() -> Iterator[WrongS3]:
    """One at work, with the bucket `adapters`."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    app = WrongS3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    app.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        client = boto3.client(
            "s3", endpoint_url=app.address, aws_access_key_id="key", aws_secret_access_key="secret",
            region_name="us-east-1",
        )  # fmt: skip
        client.create_bucket(Bucket="adapters")
        yield app
    finally:
        server.shutdown()
        thread.join()
