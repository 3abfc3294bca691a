"""Owns the plain tables of adapters, the same on a terminal and in a pipe.

Invariant: nothing a server sent reaches the terminal with control characters in it.
"""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from perft.reading import printable
from server.api.schemas import AdapterObject, VersionObject

ADAPTER_COLUMNS = ("NAME", "ACTIVE", "VERSIONS", "STATE", "RESIDENT", "SIZE", "ROWS", "RUNNING", "LAST USED")
VERSION_COLUMNS = ("VERSION", "ACTIVE", "STATE", "RESIDENT", "SIZE", "ROWS", "RUNNING", "LAST USED", "KIND", "DIGEST")
EXPENDABLE = ("DIGEST", "KIND", "SIZE", "VERSIONS", "LAST USED", "ROWS", "RUNNING", "STATE", "RESIDENT")
"""What a narrow terminal goes without, first to last."""


def adapters_table(adapters: Sequence[AdapterObject], width: int | None = None) -> str:
    """A row per adapter: rows and residency of its active version, size, running and last used of all versions.

    width: columns of the terminal, for which columns of the table are left out; None: none is.
    """
    rows = [_adapter_row(adapter) for adapter in adapters]
    return "\n".join(table_lines(ADAPTER_COLUMNS, rows, width, expendable=EXPENDABLE))


def versions_table(adapter: AdapterObject, width: int | None = None) -> str:
    """A row per version of one adapter. width: as above."""
    rows = [_version_row(adapter, version) for version in adapter.versions]
    return "\n".join(table_lines(VERSION_COLUMNS, rows, width, expendable=EXPENDABLE))


def table_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    expendable: Sequence[str] = (),
    right: Collection[str] = (),
) -> list[str]:
    """The titles and the rows, each a line. Columns that are `expendable` go, in that order, until the lines fit.

    right: columns of numbers.
    """
    lines = [columns, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    kept = list(range(len(columns)))
    for title in expendable:
        if width is None or sum(widths[column] + 2 for column in kept) - 2 <= width:
            break
        kept = [column for column in kept if columns[column] != title]

    def padded(line: Sequence[str], column: int) -> str:
        return line[column].rjust(widths[column]) if columns[column] in right else line[column].ljust(widths[column])

    return ["  ".join(padded(line, column) for column in kept).rstrip() for line in lines]


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


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


def _time(seconds: int | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
