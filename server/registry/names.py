"""Owns which names an adapter may have."""

import re

from server.errors import ApiError

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def name_problem(name: str, base_names: list[str]) -> str | None:
    """Why `name` cannot be an adapter's name, or None."""
    if name in base_names:
        return f"found the name {name!r}, which is the base model's served name: choose another"
    if not NAME_PATTERN.fullmatch(name):
        shown = ascii(name) if len(name) <= 100 else ascii(name[:97]) + "..."
        return f"found the name {shown}, expected {NAME_PATTERN.pattern} (lower-case letters, digits, '.', '_', '-')"
    return None


def check_name(name: str, base_names: list[str]) -> None:
    """Raises ApiError: name_conflict for the base's name, invalid_name for what can be no name."""
    if problem := name_problem(name, base_names):
        status, code = (409, "name_conflict") if name in base_names else (400, "invalid_name")
        raise ApiError(status, code, problem, "name")
