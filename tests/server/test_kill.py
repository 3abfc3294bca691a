"""Killed with SIGKILL at any moment, a server comes back with everything it acknowledged and nothing half-written.

The short form of `make soak`, whose moments are many more.
"""

from pathlib import Path

from tests.soak import kills_of_the_fake_server, kills_of_the_real_server

SEED = 20261122


def test_at_seeded_moments_of_changes_and_of_starts(tmp_path: Path) -> None:
    report = kills_of_the_fake_server.run(tmp_path, moments=20, seed=SEED)
    assert report.moments == 20
    assert report.acknowledged["upload"] and report.acknowledged["delete"], report
    assert report.in_doubt and report.staged, "no kill fell into a change"


def test_with_the_real_engine(tiny_model: Path, tmp_path: Path) -> None:
    """Also: no process of the group outlives it, and every version answers with the tokens it gave before."""
    report, _ = kills_of_the_real_server.run(tiny_model, tmp_path, moments=1, seed=SEED)
    assert report.acknowledged["upload"] and report.in_doubt, report
