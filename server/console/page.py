"""Owns the console's static files: which there are, and what every response of one carries.

Invariant: only what was read from the folder `page` at import is ever served, and nothing that another site wrote runs
in it.
"""

import html
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from urllib.parse import quote

INDEX = "index.html"
MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""By suffix; a file of another is not served."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
_HEAD = b"<head>"


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{sha256(self.content).hexdigest()[:32]}"'


def index(root_path: str = "") -> PageFile:
    """The page. root_path: the prefix below which the server is reached, as in an ASGI scope."""
    return _index_below(root_path) if root_path.strip("/") else _FILES[INDEX]


def file(path: str) -> PageFile | None:
    """A file that the page loads, by its path below the folder; None: there is none."""
    return None if path == INDEX else _FILES.get(path)


@lru_cache(8)
def _index_below(root_path: str) -> PageFile:
    """The page whose relative URLs begin at the prefix, with one slash in front: `//HOST/` would be another server."""
    prefix = quote(root_path.strip("/"), safe="/:@!$&'()*+,;=~", errors="replace")
    base = f'{_HEAD.decode()}<base href="{html.escape(f"/{prefix}/")}">'
    plain = _FILES[INDEX]
    return PageFile(plain.content.replace(_HEAD, base.encode(), 1), plain.media_type)


def _read(folder: Traversable, above: str = "") -> dict[str, PageFile]:
    found: dict[str, PageFile] = {}
    for each in folder.iterdir():
        if each.is_dir():
            found |= _read(each, f"{above}{each.name}/")
        elif (media_type := MEDIA_TYPES.get(each.name.rpartition(".")[2])) is not None:
            found[above + each.name] = PageFile(each.read_bytes(), media_type)
    return found


_FILES = _read(files(__package__) / "page")
