"""Writes the tables of the newest results into docs/measured.md, so that no figure there is typed by hand.

    python -m benchmarks.page

Between `<!-- bench:QUESTION:begin -->` and `<!-- bench:QUESTION:end -->` stands what the newest result of that question
says: its command, commit, date, load, tables. `targets` is the table of benchmarks/targets.py.
"""

import re
from pathlib import Path
from typing import Any

from benchmarks.common.report import RESULTS, ROOT, markdown, newest
from benchmarks.targets import table

PAGE = ROOT / "docs" / "measured.md"
SECTION = re.compile(r"(<!-- bench:(\w+):begin -->\n).*?(<!-- bench:\2:end -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet."


def filled(page: str, folder: Path = RESULTS) -> str:
    """The page with every section as the results in `folder` say."""
    return SECTION.sub(lambda found: f"{found[1]}{section(found[2], folder)}\n{found[3]}", page)


def section(question: str, folder: Path) -> str:
    """What stands between the markers of one question."""
    if question == "targets":
        return table(folder)
    result = newest(question, folder=folder)
    return NOT_MEASURED if result is None else described(result)


def described(result: dict[str, Any]) -> str:
    """A result's origin and tables, in Markdown."""
    machine, load = result["machine"], (result["load_before"][0], result["load_after"][0])
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("torch", "triton") if name in result["versions"]
    )
    hardware = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    lines = [
        f"`{result['command']}`: {result['date']}, commit {result['commit']}, {result['seconds']:.0f} s on "
        f"{hardware}, {versions}, load average {load[0]:.2f} before and {load[1]:.2f} after."
    ]
    for title, (header, *rows) in result["tables"].items():
        lines += ["", f"**{title}**", "", markdown(header, rows)]
    return "\n".join(lines)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
