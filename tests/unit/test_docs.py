"""What README and docs/ point at is there: files, functions in them, links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
HISTORY = ("log.md", "CHANGELOG.md")
"""Pages that name files as they were then."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    """A path of a module stands with its folder: from the root, or from server/ where the page says so."""
    named = re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|sh|yml|yaml|txt|toml|md|svg))`", page.read_text("utf-8"))
    missing = [path for path in named if not (ROOT / path).exists() and not (ROOT / "server" / path).exists()]
    assert not missing, missing


def test_the_strangers_walk_names_functions_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("## Five questions") : text.index("## Inside server/")]
    walks = [line.split("|")[2] for line in section.splitlines() if line.startswith("| Where")]
    assert len(walks) == 5
    for walk in walks:
        files = re.findall(r"`([\w/.]+\.py)`", walk)
        assert 1 <= len(files) <= 3, walk
        sources = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"\(`(?:\w+\.)?(\w+)`\)", walk):
            assert f"def {name}(" in sources, name


def test_the_readmes_tree_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("## The tree") :]
    named = set(re.findall(r"(\w+)/", tree[: tree.rindex("```")]))
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert there and there <= named
    assert all((ROOT / name).is_dir() or any(ROOT.glob(f"*/{name}")) for name in named), named
