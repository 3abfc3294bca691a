"""Killed with SIGKILL at any moment, a server comes back with everything it acknowledged and nothing half-written.

The short form of `make soak`, whose moments are many more.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.soak import kills_of_the_fake_server, kills_of_the_real_server
from tests.soak.model import NameModel, State, WrongError

SEED = 20261122


def test_at_seeded_moments_of_changes_and_of_starts(tmp_path: Path) -> None:
    report = kills_of_the_fake_server.run(tmp_path, moments=20, seed=SEED)
    assert report.moments == 20
    assert report.acknowledged["upload"] and report.acknowledged["delete"], report
    assert report.in_doubt and report.staged, "no kill fell into a change"


def test_with_the_real_engine(tiny_model: Path, tmp_path: Path) -> None:
    """Also: no process outlives the one that is killed, and every version answers with the tokens it gave before."""
    report, contents = kills_of_the_real_server.run(tiny_model, tmp_path, moments=1, seed=SEED)
    assert report.acknowledged["upload"] and contents > 1, report


BEFORE = State({1: "a", 2: "b"}, active=2)
WRONG = {
    "a version is lost": ([(2, "b")], 2),
    "the activation is lost": ([(1, "a"), (2, "b")], None),
    "a version has other content": ([(1, "a"), (2, "c")], 2),
    "a version nobody uploaded": ([(1, "a"), (2, "b"), (4, "c")], 2),
    "half of a patch": ([(1, "a"), (2, "b")], 1),
    "a number given before": ([(1, "a"), (2, "b"), (3, "d")], 2),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_restart_must_not_show_is_noticed(what: str) -> None:
    """After an upload of d and a patch without answers: version 3 was another one, which is gone."""
    versions, active = WRONG[what]
    model = NameModel("name", [BEFORE], {1: "a", 2: "b", 3: "c"}, gone={3})
    uploaded, patched = BEFORE.uploaded("d", activate=True), BEFORE.patched(active=1, allowed_keys=("alice",))
    possible = [*uploaded.on_the_way, *uploaded.after, *patched.after]
    with pytest.raises(WrongError):
        model.agree(adapter(versions, active), possible)
    for right in (([(1, "a"), (2, "b"), (4, "d")], 4), ([(1, "a"), (2, "b"), (4, "d")], 2), ([(1, "a"), (2, "b")], 2)):
        NameModel("name", [BEFORE], dict(model.digests), gone={3}).agree(adapter(*right), possible)


def adapter(versions: list[tuple[int, str]], active: int | None) -> dict[str, Any]:
    """What a server would say."""
    listed = [{"version": number, "digest": digest, "state": "ready"} for number, digest in versions]
    return {"versions": listed, "active": active, "allowed_keys": None, "pinned": False}
