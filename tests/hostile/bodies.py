"""Bodies that are not the form they should be."""

import gzip
from collections.abc import Callable

from tests.hostile import good
from tests.hostile.attack import BOUNDARY, END, FORM, Attack, Attacks, Setting, Upload, form, part, whole
from tests.hostile.configs import LFS


def _fields(setting: Setting) -> dict[str, bytes]:
    config, weights = good.files(setting).values()
    return {"name": good.NAME, "config": config, "weights": weights}


def _body(setting: Setting) -> bytes:
    return form(_fields(setting))


Words = str | tuple[str, ...]


def _malformed(words: Words, make: Callable[[Setting], Upload]) -> Attack:
    return Attack(400, "invalid_request", (words,) if isinstance(words, str) else words, make)


def _typed(words: Words, content_type: str | None) -> Attack:
    return _malformed(words, lambda s: Upload([_body(s)], content_type, len(_body(s))))


def _without(field: str, words: Words) -> Attack:
    return _malformed(words, lambda s: whole(form({k: v for k, v in _fields(s).items() if k != field})))


def _archive(words: str, make: Callable[[Setting], bytes]) -> Attack:
    """Something else as `file`."""
    expected = ("found neither a .zip nor a .tar.gz", words)
    return Attack(400, "invalid_adapter", expected, lambda s: good.archived(make(s)))


def _with(words: Words, **more: bytes) -> Attack:
    return _malformed(words, lambda s: whole(form(_fields(s) | more)))


def _inserted(words: Words, *parts: bytes) -> Attack:
    """Sound fields after hostile ones."""
    return _malformed(words, lambda s: whole(b"".join(parts) + _body(s)))


ATTACKS: Attacks = {
    "JSON body": _typed("expected multipart/form-data", "application/json"),
    "JSON body, with what to send": _typed("such as curl -F name=NAME -F config=@", "application/json"),
    "urlencoded body": _typed(("expected multipart/form-data", "curl -F"), "application/x-www-form-urlencoded"),
    "file as the body": _typed(("expected multipart/form-data", "curl -F"), "application/octet-stream"),
    "multipart/mixed": _typed("expected multipart/form-data", FORM.replace("form-data", "mixed")),
    "no content type": _typed(("found no Content-Type", "expected multipart/form-data", "curl -F"), None),
    "no boundary": _typed("boundary", "multipart/form-data"),
    "empty boundary": _typed("boundary", 'multipart/form-data; boundary=""'),
    "boundary of 200 bytes": _typed("boundary", f"multipart/form-data; boundary={'b' * 200}"),
    "another boundary": _typed("is not multipart/form-data", "multipart/form-data; boundary=other"),
    "gzip content encoding": Attack(
        415,
        "unsupported_encoding",
        ("Content-Encoding", "gzip"),
        lambda s: Upload([_body(s)], FORM, len(_body(s)), {"Content-Encoding": "gzip"}),
    ),
    "empty body": _malformed("cut off", lambda s: whole(b"")),
    "only the end": _malformed("no field 'name'", lambda s: whole(END)),
    "random bytes": _malformed("is not multipart/form-data", lambda s: whole(bytes(range(256)) * 40)),
    "no closing boundary": _malformed("cut off", lambda s: whole(_body(s)[: -len(END)])),
    "half a closing boundary": _malformed("cut off", lambda s: whole(_body(s)[:-6])),
    "no name": _without("name", ("no field 'name'", "curl -F name=NAME")),
    "the config's name as its field": _inserted(
        ("found the field 'adapter_config.json'", "did you mean 'config'?"), part("adapter_config.json", b"{}")
    ),
    "the weights' name as their field": _inserted("did you mean 'weights'?", part("adapter_model.safetensors", b"x")),
    "file with an s": _inserted("did you mean 'file'?", part("files", b"x")),
    "Name": _inserted("did you mean 'name'?", part("Name", b"x")),
    "two files as file": _malformed(
        ("'file' more than once", "as 'config' and 'weights'"),
        lambda s: whole(part("name", good.NAME) + b"".join(part("file", d) for d in good.files(s).values()) + END),
    ),
    "the weights as file": _archive(
        "but a safetensors file, which belongs into 'weights'", lambda s: good.weights(s.base)
    ),
    "a plain tar as file": _archive(
        "but a plain .tar: compress it", lambda s: gzip.decompress(good.tarred(good.files(s)))
    ),
    "an LFS pointer as file": _archive("but a Git LFS pointer", lambda s: LFS),
    "no config": _without("config", "found 'weights'"),
    "no weights": _without("weights", "found 'config'"),
    "neither file": _malformed("found no file", lambda s: whole(form({"name": good.NAME}))),
    "both forms": _malformed(
        "found 'config' and 'file'", lambda s: whole(form(_fields(s) | {"file": good.zipped(good.files(s))}))
    ),
    "archive and config": _malformed(
        "alone", lambda s: whole(form({"name": good.NAME, "config": good.config(), "file": b"PK"}))
    ),
    "unknown field": _with("found the field 'version'", version=b"7"),
    "a path as the field": _inserted("found the field '../config'", part("../config", b"{}")),
    "field without a name": _inserted("found the field ''", part("", b"{}")),
    "a million unknown fields": _inserted("found the field 'f0'", *(part(f"f{i}", b"") for i in range(10_000))),
    "name twice": _inserted("'name' more than once", part("name", b"first")),
    "config twice": _inserted("'config' more than once", part("config", b"{}")),
    "weights twice": _inserted("'weights' more than once", part("weights", b"x")),
    "activate twice": _inserted("'activate' more than once", *[part("activate", b"true")] * 2),
    "activate=maybe": _with("activate: found 'maybe', expected true or false", activate=b"maybe"),
    "activate=2": _with("activate: found '2'", activate=b"2"),
    "activate=none": _with("activate: found 'None'", activate=b"None"),
    "activate of nothing": _with("activate: found ''", activate=b""),
    "activate that does not print": _with("activate: found '\\x1b[2J'", activate=b"\x1b[2J"),
    "activate of a megabyte": _with("activate: found more than 16 bytes", activate=b"true" * 250_000),
    "base64 part": _malformed(
        "Content-Transfer-Encoding",
        lambda s: whole(part("config", b"e30=", headers="Content-Transfer-Encoding: base64\r\n") + _body(s)),
    ),
    "part that is no form-data": _malformed(
        "Content-Disposition", lambda s: whole(_body(s).replace(b"form-data; name", b"attachment; name"))
    ),
    "part without headers": _inserted("Content-Disposition", f"--{BOUNDARY}\r\n\r\nx\r\n".encode()),
    "Content-Disposition twice": _inserted(
        "twice", part("name", b"x", headers='Content-Disposition: form-data; name="config"\r\n')
    ),
    "header of 100 KB": _inserted("header size", part("name", b"x", headers=f"X-Long: {'x' * 100_000}\r\n")),
    "header name of 100 KB": _inserted("header size", part("name", b"x", headers=f"{'x' * 100_000}: 1\r\n")),
    "a thousand headers": _inserted(
        "header count", part("name", b"x", headers="".join(f"X-{i}: 1\r\n" for i in range(1000)))
    ),
    "header with a NUL": _inserted("invalid character", part("name", b"x", headers="X\0Y: 1\r\n")),
    "nested multipart": _inserted(
        "found the field 'files'", part("files", b"x", headers="Content-Type: multipart/mixed; boundary=inner\r\n")
    ),
}
