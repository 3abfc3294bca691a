"""Owns the plain tables of adapters, the same on a terminal and in a pipe.

Invariant: nothing a server sent reaches the terminal with control characters in it.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from server.api.schemas import AdapterObject, VersionObject

ADAPTER_COLUMNS = ("NAME", "ACTIVE", "VERSIONS", "STATE", "RESIDENT", "SIZE", "ROWS", "RUNNING", "LAST USED")
VERSION_COLUMNS = ("VERSION", "ACTIVE", "STATE", "RESIDENT", "SIZE", "ROWS", "RUNNING", "LAST USED", "KIND", "DIGEST")


def printable(text: str) -> str:
    """The text with everything escaped that a terminal would interpret."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def adapters_table(adapters: Sequence[AdapterObject]) -> str:
    """A row per adapter: rows and residency of its active version, size, running and last used of all versions."""
    return _table(ADAPTER_COLUMNS, [_adapter_row(adapter) for adapter in adapters])


def versions_table(adapter: AdapterObject) -> str:
    """A row per version of one adapter."""
    return _table(VERSION_COLUMNS, [_version_row(adapter, version) for version in adapter.versions])


def _adapter_row(adapter: AdapterObject) -> tuple[str, ...]:
    versions = adapter.versions
    active = next((version for version in versions if version.version == adapter.active), None)
    running = [version.requests_running for version in versions]
    used = [version.last_used for version in versions if version.last_used is not None]
    return (
        adapter.name,
        f"@{adapter.active}" if adapter.active is not None else "-",
        str(len(versions)),
        ",".join(sorted({version.state for version in versions})),
        _resident(active, adapter.pinned) if active else "-",
        _size(sum(version.size_bytes for version in versions)),
        str(active.rows) if active else "-",
        "-" if None in running else str(sum(filter(None, running))),
        _time(max(used, default=None)),
    )


def _version_row(adapter: AdapterObject, version: VersionObject) -> tuple[str, ...]:
    return (
        version.id,
        "*" if version.version == adapter.active else "",
        f"{version.state} ({version.reason})" if version.reason else version.state,
        _resident(version, adapter.pinned and version.version == adapter.active),
        _size(version.size_bytes),
        str(version.rows),
        "-" if version.requests_running is None else str(version.requests_running),
        _time(version.last_used),
        f"{version.peft_type} {version.variant or ''}".strip(),
        version.digest,
    )


def _resident(version: VersionObject, is_pinned: bool) -> str:
    return f"{version.resident} (pinned)" if is_pinned else version.resident


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


def _time(seconds: int | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
