"""What `perft top` computes from two scrapes, and how it orders and writes it."""

import math
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from perft.reading import printable
from server.client.chat.parting import parting
from server.client.live.rows import ORDERS, Row, age, in_order, number, rows_of, seconds
from server.client.live.samples import WINDOW_S, Change, History, Scrape, parse, quantile
from server.client.text import printable_lines


def scrape(at: float, **counts: float) -> Scrape:
    return Scrape(at, {"x_total": {frozenset({("adapter", name)}): value for name, value in counts.items()}})


def test_a_rate_is_what_was_added_for_each_second() -> None:
    change = Change(scrape(10.0, a=5, b=1), scrape(14.0, a=25, b=1, new=8))
    assert change.rate("x_total") == 7.0 and change.rate("x_total", adapter="a") == 5.0
    assert change.rates("x_total", "adapter") == {"a": 5.0, "b": 0.0, "new": 2.0}
    assert change.rate("unknown_total") is None


def test_a_counter_that_is_left_out_beside_others_is_0() -> None:
    """As /console/metrics leaves out what is 0; TTFT stays unknown, and so does all where the name is not there."""
    running = 'perft_adapter_requests_running{adapter="a"} 1\nperft_adapter_requests_running{adapter="b"} 1\n'
    counted = 'perft_adapter_requests_total{adapter="b"} 3\n'
    first, second = parse(running + counted, 10.0), parse(running + counted, 12.0)
    rows = {row.name: (row.requests, row.tokens, row.ttft) for row in rows_of(None, Change(first, second), "")}
    assert rows == {"a": (0.0, None, None), "b": (0.0, None, None)}
    assert {row.requests for row in rows_of(None, Change(first, first), "")} == {None}, "of one scrape there is no rate"


def test_of_one_scrape_nothing_is_known_but_its_values() -> None:
    change = History().add(scrape(10.0, a=5))
    assert change.rate("x_total") is None and change.rates("x_total", "adapter") == {}
    assert change.quantile("x", 0.5) is None and change.new.total("x_total") == 5


def test_an_adapter_that_went_away_is_no_negative_rate() -> None:
    change = Change(scrape(0.0, a=500, b=1), scrape(1.0, b=2))
    assert change.rate("x_total") == 0.0 and change.rates("x_total", "adapter") == {"b": 1.0}


def test_a_server_that_started_again_begins_anew() -> None:
    history = History()
    history.add(scrape(0.0, a=100))
    assert history.add(scrape(1.0, a=3)).rate("x_total") is None
    assert history.add(scrape(2.0, a=4)).rate("x_total") == 1.0


def test_the_window_is_the_last_seconds() -> None:
    history = History()
    for second in range(100):
        change = history.add(scrape(float(second), a=second**2))
    assert change.seconds == WINDOW_S and change.rate("x_total") == (99**2 - 89**2) / WINDOW_S


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0.0), (0.25, 0.05), (0.5, 0.1), (0.75, 0.3), (0.8, 0.34), (1.0, 0.5)]
)
def test_a_quantile_lies_within_its_bucket(share: float, expected: float) -> None:
    buckets = [(math.inf, 20.0), (0.1, 10.0), (1.0, 20.0), (0.5, 20.0)]
    assert quantile(buckets, share) == pytest.approx(expected)


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    assert quantile([(0.1, 0.0), (2.5, 1.0), (math.inf, 10.0)], 0.95) == 2.5


@pytest.mark.parametrize("buckets", [[], [(0.1, 0.0), (math.inf, 0.0)], [(0.1, 3.0)], [(math.inf, math.nan)]])
def test_a_quantile_of_nothing_is_none(buckets: list[tuple[float, float]]) -> None:
    assert quantile(buckets, 0.5) is None


def test_what_prometheus_client_writes_is_read() -> None:
    registry = CollectorRegistry()
    requests = Counter("perft_adapter_requests", "", ["adapter", "finish_reason"], registry=registry)
    latency = Histogram("vllm:x_seconds", "", ["engine"], buckets=(0.1, 1.0), registry=registry)
    ttft = Histogram("ttft", "", ["adapter"], registry=registry)
    history = History()
    for value, reason in ((50.0, "stop"), (0.05, 'of "another"\n')):
        requests.labels("poet", reason).inc(3)
        latency.labels("0").observe(value)
        ttft.labels("poet").observe(value)
        at = 0.0 if value == 50.0 else 2.0
        change = history.add(parse(generate_latest(registry).decode(), at))
    assert change.rates("perft_adapter_requests_total", "finish_reason") == {"stop": 0.0, 'of "another"\n': 1.5}
    assert change.quantile("vllm:x_seconds", 0.5) == pytest.approx(0.05)
    assert change.means("ttft", "adapter") == {"poet": pytest.approx(0.05)}


def test_rows_without_a_value_stand_last_either_way() -> None:
    row = Row("b", "ready", "device", 1, 1, None, None, None, None, None)
    rows = [row, replace(row, name="a", waiting=2.0), replace(row, name="c", waiting=5.0), replace(row, name="A")]
    waiting = next(order for order in ORDERS if order.title == "WAIT")
    assert [each.name for each in in_order(rows, waiting, False)] == ["c", "a", "A", "b"]
    assert [each.name for each in in_order(rows, waiting, True)] == ["a", "c", "A", "b"]
    names = next(order for order in ORDERS if order.title == "NAME")
    assert [each.name for each in in_order(rows, names, True)] == ["c", "b", "a", "A"]


def test_numbers_are_short() -> None:
    assert [number(value) for value in (None, 0, 3.0, 4.25, 1234.5, math.nan, math.inf)] == [
        "-", "0", "3", "4.2", "1,234", "-", "-",
    ]  # fmt: skip
    assert [seconds(value) for value in (None, 0.0421, 1.234, 250.0)] == ["-", "42 ms", "1.23 s", "250 s"]
    assert [age(passed) for passed in (-5, 59, 60, 7200, 200000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]


@pytest.mark.parametrize(
    ("first", "other", "are_whole", "expected"),
    [
        ("the sea is wide", "the sea is deep", False, 11),
        ("the ship", "the shipyard", True, 4),
        ("the ship", "the ship sails", True, 8),
        ("the ship sails", "the ship", True, 8),
        ("the ship", "the ship sails", False, None),
        ("same", "same", True, None),
        ("", "any", True, 0),
        ("one", "two", False, 0),
    ],
)
def test_where_two_answers_part(first: str, other: str, are_whole: bool, expected: int | None) -> None:
    assert parting(first, other, are_whole) == expected


def test_text_of_many_lines_keeps_its_lines_and_obeys_nothing() -> None:
    assert printable_lines("a\r\n\tb\x1b[2J\x9b\u202e\u2028") == "a\n\tb\\x1b[2J\\x9b\\u202e\\u2028"
    assert printable_lines("\u3000\u00a0\u200d né 日本") == "\u3000\u00a0\u200d né 日本"
    assert printable("a\nb\x7f") == "a\\nb\\x7f"
