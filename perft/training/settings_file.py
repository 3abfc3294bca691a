"""Owns reading a file of settings: YAML (of which JSON is a part) as one mapping, no key twice, nothing shared.

Aliases are refused: a short file of them stands for more than any memory holds.
"""

from pathlib import Path
from typing import Any

from perft.errors import InputError
from perft.reading import read_text


def read_settings(file: Path) -> dict[Any, Any]:
    """The mapping in a file. Raises InputError."""
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        """YAML without aliases and without repeated keys."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("found an alias (*name), expected every value where it belongs")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if repeated := next((key for number, key in enumerate(keys) if key in keys[:number]), None):
                raise yaml.YAMLError(f"found the key {repeated!r} twice")
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    try:
        found = yaml.load(read_text(file), Plain)
    except yaml.YAMLError as error:
        raise InputError(f"found no YAML or JSON in {file}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"found no settings in {file}: it is nested too deeply") from None
    if not isinstance(found, dict):
        raise InputError(f"found no options in {file}, expected lines such as `variant: R`")
    return found
