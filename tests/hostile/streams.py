"""Bodies without end, bodies that come slowly, bodies that are cut off, and lengths that lie."""

from collections.abc import Iterator
from itertools import repeat

from tests.hostile import good
from tests.hostile.attack import (
    BOUNDARY,
    END,
    Attack,
    Attacks,
    Cut,
    Pause,
    Piece,
    Setting,
    Upload,
    begun,
    form,
    part,
)

TEN_GB = 10 * 1000**3
FOR_EVER_S = 3600.0
"""A pause ends with the server's answer."""
BLOCK = bytes(64 * 1024)
WEIGHTS_LIMIT, BODY_LIMIT = "max_adapter_bytes", "found a body of"


def endless(start: bytes, block: bytes = BLOCK) -> Iterator[Piece]:
    """`start`, then 10 GB."""
    yield start
    yield from repeat(block, TEN_GB // len(block))


def _named(start: bytes) -> bytes:
    return part("name", good.NAME) + start


def _body(setting: Setting) -> bytes:
    config, weights = good.files(setting).values()
    return form({"name": good.NAME, "config": config, "weights": weights})


def _too_large(start: bytes, words: str = WEIGHTS_LIMIT, block: bytes = BLOCK) -> Attack:
    return Attack(413, "adapter_too_large", (words,), lambda s: Upload(endless(start, block)))


def _over_by_one(setting: Setting) -> Upload:
    """Weights one byte over the limit, which is all that is wrong with the form."""

    def pieces() -> Iterator[Piece]:
        yield _named(part("config", good.config())) + begun("weights")
        left = setting.max_adapter_bytes + 1
        while left:
            yield BLOCK[:left]
            left -= min(left, len(BLOCK))
        yield b"\r\n" + END

    return Upload(pieces())


def _trickle(setting: Setting) -> Iterator[Piece]:
    """Always in time for the next byte, and without end."""
    yield _body(setting)[:-20]
    while True:
        yield Pause(setting.idle_timeout_s / 2)
        yield b"x"


def _slow(start: bytes) -> Attack:
    return Attack(408, "upload_timeout", ("too slow",), lambda s: Upload([start, Pause(FOR_EVER_S), END]))


def _cut(start: bytes) -> Attack:
    return Attack(400, "invalid_request", ("ended before",), lambda s: Upload([start, Cut()]), is_bad_http=True)


ATTACKS: Attacks = {
    "10 GB announced": Attack(
        413, "adapter_too_large", (BODY_LIMIT,), lambda s: Upload(endless(_named(b"")), content_length=TEN_GB)
    ),
    "10^18 bytes announced": Attack(
        413, "adapter_too_large", (BODY_LIMIT,), lambda s: Upload([_named(b"")], content_length=10**18 - 1)
    ),
    "10 GB of weights": _too_large(_named(begun("weights")), "found weights over the limit"),
    "10 GB of archive": _too_large(_named(begun("file"))),
    "10 GB before the first part": _too_large(b"\r\n", BODY_LIMIT, b"\r\n" * 32768),
    "10 GB after the last part": _too_large(_named(END), BODY_LIMIT),
    "10 GB of config": Attack(
        400, "invalid_adapter", ("expected at most 65536",), lambda s: Upload(endless(_named(begun("config"))))
    ),
    "10 GB of name": Attack(400, "invalid_name", ("more than 256 bytes",), lambda s: Upload(endless(begun("name")))),
    "10 GB of activate": Attack(
        400, "invalid_request", ("activate",), lambda s: Upload(endless(_named(begun("activate"))))
    ),
    "10 GB of a header": Attack(
        400,
        "invalid_request",
        ("header size",),
        lambda s: Upload(endless(f"--{BOUNDARY}\r\nX-Long: ".encode(), b"x" * 65536)),
    ),
    "10 GB of parts": Attack(
        400,
        "invalid_request",
        ("more than once",),
        lambda s: Upload(endless(_named(b""), part("activate", b"true") * 500)),
    ),
    "10 GB of near boundaries": _too_large(
        _named(begun("weights")), "found weights over the limit", f"\r\n--{BOUNDARY}x".encode() * 2000
    ),
    "weights one byte over the limit": Attack(
        413, "adapter_too_large", ("found weights over the limit",), _over_by_one
    ),
    "nothing ever comes": _slow(b""),
    "stalls in a header": _slow(f"--{BOUNDARY}\r\nContent-Dispo".encode()),
    "stalls in the name": _slow(begun("name") + b"abc"),
    "stalls in the weights": _slow(_named(part("config", good.config()) + begun("weights")) + bytes(2_000)),
    "stalls before the end": _slow(_named(part("config", good.config()) + part("weights", b"x"))),
    "a byte at a time": Attack(408, "upload_timeout", ("too slow",), lambda s: Upload(_trickle(s))),
    "says more than it sends": Attack(
        408, "upload_timeout", ("too slow",), lambda s: Upload([_body(s)[:-20]], content_length=len(_body(s)) + 1000)
    ),
    "says less than it sends": Attack(
        400,
        "invalid_request",
        ("cut off",),
        lambda s: Upload([_body(s)], content_length=len(_body(s)) - 100),
        is_bad_http=True,
    ),
    "says nothing comes": Attack(
        400, "invalid_request", ("cut off",), lambda s: Upload([_body(s)], content_length=0), is_bad_http=True),
    "cut off at once": _cut(b""),
    "cut off in a header": _cut(f"--{BOUNDARY}\r\nContent-Dispo".encode()),
    "cut off in the weights": _cut(_named(part("config", good.config()) + begun("weights")) + bytes(2_000_0)),
    "cut off in an archive": _cut(_named(begun("file")) + b"PK\3\4" + bytes(100)),
    "cut off before the end": _cut(_named(part("config", good.config()) + part("weights", b"x"))),
}  # fmt: skip
