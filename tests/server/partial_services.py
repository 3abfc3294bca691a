"""Services with only the parts that a test of one middleware needs; using another part fails."""

from dataclasses import MISSING, fields
from typing import Any

from server.api.dependencies import Services
from server.settings.model import Settings


def partial_services(**parts: Any) -> Services:
    """`Services` with `parts`; what is left out is None, unless it has a default; the settings are the default ones."""
    needed = {field.name: None for field in fields(Services) if field.default is MISSING}
    defaulted = {field.name for field in fields(Services) if field.default_factory is not MISSING}
    default = {name: None for name in needed if name not in defaulted} | {"settings": Settings()}
    return Services(**(default | parts))
