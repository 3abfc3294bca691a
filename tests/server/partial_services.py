"""Services with only the parts that a test of one middleware needs; using another part fails."""

from dataclasses import MISSING, fields
from typing import Any

from server.api.dependencies import Services


def partial_services(**parts: Any) -> Services:
    """`Services` with `parts`; what is left out is None, unless it has a default."""
    needed = {field.name: None for field in fields(Services) if field.default is MISSING}
    defaulted = {field.name for field in fields(Services) if field.default_factory is not MISSING}
    return Services(**({name: None for name in needed if name not in defaulted} | parts))
