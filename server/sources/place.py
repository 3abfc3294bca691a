"""Owns how the place of an adapter is written, and which places are below one that the operator allows.

/FOLDER or file:///FOLDER · hf://OWNER/REPO[@REVISION], or OWNER/REPO alone · s3://BUCKET/PREFIX, also gs:// and az://

Invariant: a place is judged by its text, part by part, before anything is opened or asked; nothing in it is decoded,
resolved or completed, and what could be read in two ways is refused.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_CHARACTERS = 1024
BUCKETS = ("s3", "gs", "az")
FORMS = "an absolute folder, file:///FOLDER, hf://OWNER/REPO[@REVISION] or s3://BUCKET/PREFIX (gs://, az://)"
_FORBIDDEN = re.compile(r"[%\\?#]")
_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", re.ASCII)
_KEY = re.compile(r"[A-Za-z0-9._=+,:@~-]+", re.ASCII)


@dataclass(frozen=True)
class Place:
    """Where an adapter is. scheme: file, hf, s3, gs or az. parts: of the path, the owner and repository, or the bucket
    and prefix. revision: of a repository; None: its main branch."""

    scheme: str
    parts: tuple[str, ...]
    revision: str | None = None

    def __str__(self) -> str:
        path = "/".join(self.parts)
        if self.scheme == "file":
            return f"/{path}"
        return f"{self.scheme}://{path}" + (f"@{self.revision}" if self.revision else "")

    def is_below(self, other: "Place") -> bool:
        """Whether it is `other`, or lies within it."""
        return self.scheme == other.scheme and self.parts[: len(other.parts)] == other.parts


def parse_place(text: str) -> Place:
    """The place that `text` names. Raises ValueError."""
    found = _parse(text)
    if found.scheme == "hf" and len(found.parts) != 2:
        raise ValueError(f"found {_shown(text)}, expected hf://OWNER/REPO[@REVISION]")
    return found


def parse_allowed(text: str) -> Place:
    """A place below which adapters may be: as above, or a whole owner (hf://OWNER/). Raises ValueError."""
    if "://" not in text and not text.startswith("/"):
        raise ValueError(f"found {_shown(text)}, expected {FORMS}")
    found = _parse(text)
    if found.revision is not None:
        raise ValueError(f"found {_shown(text)}, expected a repository without a revision: every one of it is allowed")
    if not found.parts:
        raise ValueError(f"found {_shown(text)}, expected a folder below it: that would allow every file")
    return found


def allowed_root(place: Place, allowed: Iterable[Place]) -> Place | None:
    """The narrowest of the allowed places that `place` is below; None if it is below none."""
    return max((root for root in allowed if place.is_below(root)), key=lambda root: len(root.parts), default=None)


def _parse(text: str) -> Place:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"found {len(text)} characters, expected at most {MAX_CHARACTERS}")
    if not text.isprintable() or (found := _FORBIDDEN.search(text)):
        what = "a character that does not print" if not text.isprintable() else repr(found[0])  # type: ignore[index]
        raise ValueError(f"found {what} in {_shown(text)}, expected a place written plainly, without encodings")
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        scheme, rest = ("file", text) if text.startswith("/") else ("hf", text)
        if scheme == "hf" and rest.count("/") != 1:
            raise ValueError(f"found {_shown(text)}, expected {FORMS}")
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValueError(f"found {_shown(text)}, expected file:///FOLDER with an absolute path")
        return Place(scheme, _parts(rest[1:], text))
    if scheme == "hf":
        return _repository(rest, text)
    if scheme in BUCKETS:
        bucket, *prefix = _parts(rest, text) or ("",)
        if not _BUCKET.fullmatch(bucket) or ".." in bucket or not all(map(_KEY.fullmatch, prefix)):
            raise ValueError(f"found {_shown(text)}, expected {scheme}://BUCKET/PREFIX of plain characters")
        return Place(scheme, (bucket, *prefix))
    raise ValueError(f"found the scheme {_shown(scheme)}, expected {FORMS}")


def _repository(rest: str, text: str) -> Place:
    name, has_revision, revision = rest.partition("@")
    parts = _parts(name, text)
    if not 1 <= len(parts) <= 2 or not all(_HUB_NAME.fullmatch(part) and not _is_doubled(part) for part in parts):
        raise ValueError(f"found {_shown(text)}, expected {FORMS}")
    if has_revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(f"found the revision {_shown(revision)}, expected a branch, a tag or a commit")
    return Place("hf", parts, revision if has_revision else None)


def _is_doubled(name: str) -> bool:
    return "--" in name or ".." in name  # the hub has no such names


def _parts(path: str, text: str) -> tuple[str, ...]:
    """The parts of a path, which may end in one slash."""
    parts = tuple(path.removesuffix("/").split("/")) if path else ()
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"found an empty part, '.' or '..' in {_shown(text)}, expected a place written plainly")
    return parts


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 100 else text[:97] + "...")
