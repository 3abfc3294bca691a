"""Owns which names an adapter may have."""

import re

NAME_PATTERN = "[a-z0-9][a-z0-9._-]{0,62}"
"""A regular expression that a whole name matches; it has no anchors."""

NAME_RULE = "1 to 63 characters of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
"""The same in words, to follow "expected"."""

_NAME = re.compile(NAME_PATTERN)


def suggested_name(text: str) -> str | None:
    """A name like `text` that an adapter may have, if there is one."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", text[:256].strip().lower()).strip("-._")[:63].rstrip("-._")
    return plain if plain != text and is_name(plain) else None


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None
