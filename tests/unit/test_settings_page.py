"""docs/settings.md is generated from the settings: `python -m server.settings.sources` prints it."""

from pathlib import Path

from server.settings.sources import reference_page

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_up_to_date() -> None:
    page = DOCUMENT.read_text(encoding="utf-8")
    assert page == reference_page(), "run: python -m server.settings.sources > docs/settings.md"
