"""Rate limits of a key: requests at once and tokens per minute, a right Retry-After, bounded memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.error_responses import as_api_error
from server.auth.rate_limits import RateLimits
from server.errors import RateLimitedError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(limits: RateLimits, label: str | None) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as refused:
        limits.enter(label)
    assert (as_api_error(refused.value).status, refused.value.code) == (429, "rate_limited")
    return refused.value


def test_requests_at_once_are_counted_per_label(clock: Clock) -> None:
    limits = RateLimits(max_requests=2, clock=clock)
    for label in ("a", None):
        limits.enter(label)
        limits.enter(label)
        assert refusal(limits, label).retry_after_s == 1
    limits.leave("a")
    limits.enter("a")
    assert limits.running("a") == 2 and limits.running(None) == 2
    refusal(limits, None)


def test_sequences_count(clock: Clock) -> None:
    limits = RateLimits(max_requests=8, clock=clock)
    limits.enter("a")
    limits.check_room("a", 8)
    with pytest.raises(RateLimitedError, match="found 0 running and 9 more asked for") as refused:
        limits.check_room("a", 9)
    assert refused.value.retry_after_s == 1 and "fewer" in refused.value.message
    limits.claim("a", 7)
    assert limits.running("a") == 8
    refusal(limits, "a")
    limits.enter("b")
    with pytest.raises(RateLimitedError, match="8 requests at once"):
        limits.claim("b", 8)
    limits.leave("a", 7)
    limits.enter("a")
    assert limits.running("a") == 2 and limits.running("b") == 1


def test_without_limits_nothing_is_refused(clock: Clock) -> None:
    limits = RateLimits(clock=clock)
    for _ in range(1000):
        limits.enter("a")
    limits.charge("a", 10**9)
    limits.check("a")


def test_a_request_that_left_leaves_nothing_behind(clock: Clock) -> None:
    limits = RateLimits(max_requests=1, clock=clock)
    for number in range(1000):
        limits.enter(f"label-{number}")
        limits.leave(f"label-{number}")
    assert not limits._running
    with pytest.raises(AssertionError):
        limits.leave("a")


def test_a_refused_request_takes_no_place(clock: Clock) -> None:
    limits = RateLimits(max_requests=1, tokens_per_minute=10, clock=clock)
    limits.charge("a", 10)
    refusal(limits, "a")
    assert limits.running("a") == 0


def test_a_minute_of_tokens_is_there_at_once_and_fills_steadily(clock: Clock) -> None:
    limits = RateLimits(tokens_per_minute=60, clock=clock)
    limits.charge("a", 59)
    limits.check("a")
    limits.charge("a", 1)
    assert refusal(limits, "a").retry_after_s == 1
    limits.check("b")
    clock.now += 0.5
    limits.charge("a", 1)
    assert refusal(limits, "a").retry_after_s == 1
    clock.now += 0.6
    limits.check("a")


def test_an_overdraft_is_paid_back(clock: Clock) -> None:
    limits = RateLimits(tokens_per_minute=60, clock=clock)
    limits.charge("a", 160)
    assert refusal(limits, "a").retry_after_s == 101
    clock.now += 100.5
    limits.check("a")


def test_what_runs_is_charged_as_it_goes(clock: Clock) -> None:
    limits, used = RateLimits(tokens_per_minute=60, clock=clock), [0]
    with limits.metered("a", lambda: used[0]):
        used[0] = 30
        limits.check("a")
        limits.check("b")
        used[0] = 60
        assert refusal(limits, "a").retry_after_s == 1
        used[0] = 90
    assert refusal(limits, "a").retry_after_s == 31
    assert not limits._meters
    clock.now += 31
    limits.check("a")


def test_a_long_pause_saves_no_more_than_a_minute(clock: Clock) -> None:
    limits = RateLimits(tokens_per_minute=60, clock=clock)
    limits.charge("a", 1)
    clock.now += 10_000
    limits.charge("a", 60)
    refusal(limits, "a")


def test_the_tokens_of_a_million_labels_are_not_kept(clock: Clock) -> None:
    limits = RateLimits(tokens_per_minute=60_000, clock=clock)
    for number in range(10_000):
        limits.charge(f"label-{number}", 1)
        clock.now += 1
    assert len(limits._empty_until) < 300


@given(
    rate=st.integers(1, 10**7),
    charges=st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1000)), min_size=1, max_size=10),
    start=st.floats(0, 1e7),
)
def test_retry_after_is_right(rate: int, charges: list[tuple[int, float]], start: float) -> None:
    """After so many seconds the next request passes; a second earlier it does not."""
    clock = Clock()
    clock.now = start
    limits = RateLimits(tokens_per_minute=rate, clock=clock)
    for tokens, pause in charges:
        limits.charge("a", tokens)
        clock.now += pause
    try:
        limits.check("a")
    except RateLimitedError as error:
        assert error.retry_after_s is not None and error.retry_after_s >= 1
        now = clock.now
        clock.now = now + error.retry_after_s - 1.001
        with pytest.raises(RateLimitedError):
            limits.check("a")
        clock.now = now + error.retry_after_s + 1e-6
        limits.check("a")
