"""Every error of the domain has its row in the one table that says what it becomes on the wire."""

import inspect
import re
from pathlib import Path

import pytest

from adapters import errors as adapters
from server import errors
from server.api.error_responses import ERROR_TABLE, as_api_error

ROOT = Path(__file__).parents[2]


def documented() -> dict[str, int]:
    """docs/api.md, "Errors": the status of every code."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = text[text.index("<!-- errors:begin -->") : text.index("<!-- errors:end -->")].splitlines()
    rows = [row for row in rows if row.startswith("| ") and not row.startswith("| status")]
    found = [re.match(r"\| (\d{3}) \| `(\w+)` \| ", row) for row in rows]
    assert all(found), "a row of the table has another form"
    codes = [(row[2], int(row[1])) for row in found if row]
    assert len(dict(codes)) == len(codes), "a code stands twice in the table"
    return dict(codes)


DOCUMENTED = documented()
ELSEWHERE = {"not_found", "method_not_allowed", "internal_error"}
"""Codes of errors that are no domain errors: of routing, of a defect."""


def descendants(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(descendants(child) for child in kind.__subclasses__()))


ABSTRACT = {errors.ServerError, errors.UploadError, errors.ConnectionLimitError}
DOMAIN = sorted(
    (descendants(errors.ServerError) | descendants(adapters.StoreError) | {adapters.InvalidAdapterError}) - ABSTRACT,
    key=lambda kind: kind.__name__,
)


def made(kind: type[Exception]) -> Exception:
    """An error of that kind with some words."""
    if not inspect.isfunction(kind.__init__):
        return kind("some words")
    needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    values = {"version": 3, "violations": ["a: found b"]}
    return kind(*(values.get(parameter.name, "some words") for parameter in needed))


@pytest.mark.parametrize("kind", DOMAIN, ids=lambda kind: kind.__name__)
def test_a_domain_error_is_mapped_as_the_contract_says(kind: type[Exception]) -> None:
    assert any(base in ERROR_TABLE for base in kind.__mro__), f"{kind.__name__} has no row"
    shown = as_api_error(made(kind))
    assert shown.status == DOCUMENTED[shown.code] and shown.message
    assert shown.code != "internal_error"


def test_the_table_has_no_row_for_an_error_that_is_none_of_ours() -> None:
    assert set(ERROR_TABLE) <= set(DOMAIN)


def test_the_documented_codes_are_those_there_are() -> None:
    assert set(DOCUMENTED) == {as_api_error(made(kind)).code for kind in DOMAIN} | ELSEWHERE


def test_the_tree_in_the_errors_docstring_is_the_tree_there_is() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    ends = descendants(errors.StartError) | {errors.ServerDiedError}
    there = {kind.__name__ for kind in descendants(errors.ServerError) | ends}
    assert drawn == there


def test_what_the_raiser_knows_goes_before_the_table_and_the_table_before_the_request() -> None:
    assert as_api_error(errors.DeviceFullError("full"), field="model").param == "model"
    assert as_api_error(errors.DeviceFullError("full", param="pinned"), field="model").param == "pinned"
    assert as_api_error(errors.AdapterNotFoundError("poet"), field="model").param == "name"
    assert as_api_error(adapters.StoreError("broken")).retry_after_s == 60
    assert as_api_error(errors.QuotaExceededError("many")).retry_after_s is None
    assert as_api_error(errors.QuotaExceededError("many", retry_after_s=3)).retry_after_s == 3


def test_an_unforeseen_error_keeps_its_words_and_names_the_request() -> None:
    shown = as_api_error(ValueError("secret words"), "request-7")
    assert (shown.status, shown.code) == (500, "internal_error")
    assert "request-7" in shown.message and "secret" not in shown.message
