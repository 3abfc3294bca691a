"""docs/settings.md is made from the settings themselves: `python -m server.settings.page` writes it."""

from pathlib import Path

from server.settings.page import page

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page(), "run: python -m server.settings.page > docs/settings.md"
