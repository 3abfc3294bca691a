"""Owns which names an adapter may have."""

import re

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def name_problem(name: str, base_names: list[str]) -> str | None:
    """Why `name` cannot be an adapter's name, or None."""
    if not NAME_PATTERN.fullmatch(name):
        shown = ascii(name) if len(name) <= 100 else ascii(name[:97]) + "..."
        return f"found the name {shown}, expected {NAME_PATTERN.pattern} (lower-case letters, digits, '.', '_', '-')"
    if name in base_names:
        return f"found the name {name!r}, which is the base model's served name: choose another"
    return None
