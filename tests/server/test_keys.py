"""Keys: whose a request is, in constant time, and which keys cannot stand together."""

import hmac
from typing import Any

import pytest

from server.auth import keys
from server.auth.keys import Caller, KeyProblems, KeyRing, labelled_key, labelled_keys, presented_key

TEAM_A, TEAM_B, ADMIN, METRICS = "key-of-team-a", "key-of-team-b", "key-of-the-admin", "key-of-metrics"


@pytest.fixture
def ring() -> KeyRing:
    return KeyRing([("a", TEAM_A), ("b", TEAM_B)], ADMIN, METRICS)


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "expected"),
    [
        (f"Bearer {TEAM_A}", None, Caller("a", False)),
        (f"bearer   {TEAM_B} ", None, Caller("b", False)),
        (f"BEARER {ADMIN}", None, Caller("admin", True)),
        (None, TEAM_A, Caller("a", False)),
        (f"Bearer {TEAM_A}", TEAM_B, Caller("a", False)),
        ("Bearer wrong-key", TEAM_B, None),
        (f"Basic {TEAM_A}", None, None),
        (TEAM_A, None, None),
        (f"Bearer {TEAM_A}x", None, None),
        (f"Bearer {TEAM_A[:-1]}", None, None),
        (f"Bearer {TEAM_A} {TEAM_A}", None, None),
        (f"Bearer {METRICS}", None, None),
        ("Bearer ", None, None),
        ("Bearer", None, None),
        ("", "", None),
        (None, None, None),
        ("Bearer \xff\xfe", None, None),
        ("Bearer \udcff", None, None),
    ],
)
def test_whose_key_it_is(ring: KeyRing, authorization: str | None, x_api_key: str | None, expected: Caller) -> None:
    assert ring.identify(authorization, x_api_key) == expected


def test_an_empty_ring_knows_nobody() -> None:
    ring = KeyRing()
    assert not ring.needs_key and not ring.has_admin and not ring.has_metrics_key
    assert ring.identify("Bearer ") is None and ring.identify(None, "") is None
    assert not ring.may_read_metrics(None) and not ring.may_read_metrics("Bearer ")


def test_what_a_ring_says_of_itself(ring: KeyRing) -> None:
    assert ring.needs_key and ring.has_admin and ring.has_metrics_key
    assert not KeyRing(admin_key=ADMIN).needs_key


def test_every_key_is_compared_each_time(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    real = hmac.compare_digest

    def spy(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return real(known, given)

    monkeypatch.setattr(keys.hmac, "compare_digest", spy)
    for given in (f"Bearer {TEAM_A}", f"Bearer {ADMIN}", "Bearer nobody", None):
        compared.clear()
        ring.identify(given)
        assert len(compared) == 3, given


def test_a_ring_keeps_no_key(ring: KeyRing) -> None:
    kept = repr(vars(ring))
    assert not any(key in kept for key in (TEAM_A, TEAM_B, ADMIN, METRICS))


@pytest.mark.parametrize(
    ("given", "expected"), [(METRICS, True), (ADMIN, True), (TEAM_A, False), ("nobody", False), ("", False)]
)
def test_who_may_read_metrics(ring: KeyRing, given: str, expected: bool) -> None:
    assert ring.may_read_metrics(f"Bearer {given}") is expected


def test_the_admin_key_reads_metrics_without_a_metrics_key() -> None:
    ring = KeyRing([("a", TEAM_A)], ADMIN)
    assert ring.may_read_metrics(f"Bearer {ADMIN}") and not ring.may_read_metrics(f"Bearer {TEAM_A}")


def test_labels_and_keys_there_twice_are_all_named() -> None:
    with pytest.raises(KeyProblems) as refused:
        KeyRing([("a", TEAM_A), ("a", TEAM_B), ("c", TEAM_A)], TEAM_B)
    assert set(refused.value.problems) == {
        "found the label 'a' twice, expected a label each",
        "found the same key for a, c, expected a key each",
        "found the same key for a, admin, expected a key each",
    }
    assert TEAM_A not in str(refused.value) and TEAM_B not in str(refused.value)


@pytest.mark.parametrize("label", ["a", "A.b_c-9", "x" * 64, "admins"])
def test_labels(label: str) -> None:
    assert labelled_key(f"{label}=12345678") == (label, "12345678")


@pytest.mark.parametrize("label", ["", "x" * 65, "a b", "a\n", "ä", "a,b", "a/b", "admin"])
def test_labels_that_are_none(label: str) -> None:
    with pytest.raises(ValueError, match="label"):
        labelled_key(f"{label}=12345678")


@pytest.mark.parametrize("key", ["", "1234567", "with space", "tab\there", "naïve-key", "line\nbreak", "\x00" * 9])
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(ValueError, match="found a key"):
        labelled_key(f"a={key}")


def test_every_broken_entry_is_named_by_its_place() -> None:
    with pytest.raises(KeyProblems) as refused:
        labelled_keys([("one", "bare-secret"), ("two", "a=12345678"), ("three", "b=x")])
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["one", "three"]
    assert "bare-secret" not in str(refused.value)


def test_presented_key() -> None:
    assert presented_key("Bearer  k ", None) == "k" and presented_key("Basic k", "x") is None
    assert presented_key(None, "x") == "x" and presented_key(None, "") is None
