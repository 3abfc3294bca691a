"""Every attack is refused as it should be, leaves nothing behind, and the next sound upload is taken."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile import ATTACKS, FAMILIES, good_uploads
from tests.hostile.local_app import SETTING, LocalApp, run, setting_for

GOOD = good_uploads(SETTING)
FAR_OVER = 4 * 1024 * 1024


def open_files() -> list[str]:
    """What this process holds open."""
    gc.collect()
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue
    return sorted(target for target in found if not target.endswith("/fd"))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApp]:
    """The app after one upload of each form, so that what is opened once is open."""
    app = LocalApp(tmp_path_factory.mktemp("staging"), SETTING)
    for upload in GOOD.values():
        run(app, upload)
    gc.collect()
    gc.freeze()
    yield app
    gc.unfreeze()


def assert_taken(app: LocalApp, name: str) -> None:
    outcome = run(app, GOOD[name])
    assert outcome.status == 201, outcome.body
    assert set(outcome.answer["files"]) - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("name", GOOD)
def test_good_uploads_are_taken(app: LocalApp, name: str) -> None:
    assert_taken(app, name)
    assert run(app, GOOD[name]).answer["activate"] is (name != "not activated")
    assert not list(app.folder.iterdir())


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(app: LocalApp, name: str) -> None:
    attack = ATTACKS[name]
    setting = setting_for(attack)
    attacked = LocalApp(app.folder, setting)
    before = open_files()
    outcome = run(attacked, attack.make(setting))
    assert not attack.problems(outcome.status, outcome.body)
    assert not list(app.folder.iterdir()), "left on disk"
    assert open_files() == before
    assert outcome.taken_bytes <= attacked.limits.body_bytes + FAR_OVER, f"{outcome.taken_bytes} bytes were taken"
    assert_taken(app, "zip" if len(name) % 2 else "two files")


def test_there_are_attacks_of_every_family() -> None:
    assert len(ATTACKS) >= 60 and all(len(family) >= 20 for family in FAMILIES.values())


def test_a_wrong_answer_is_a_problem() -> None:
    """The judge of the attacks can say no."""
    attack = ATTACKS["JSON body"]
    good = b'{"error": {"code": "invalid_request", "message": "expected multipart/form-data"}}'
    assert not attack.problems(400, good)
    for status, body in ((0, b""), (201, b"{}"), (500, good), (400, b"oops"), (400, good.replace(b"_request", b"_x"))):
        assert attack.problems(status, body), (status, body)
    assert attack.problems(400, good.replace(b"form-data", b"mixed"))
    assert ATTACKS["weights: NaN"].problems(
        400, b'{"error": {"code": "invalid_adapter", "message": "are not finite 1 of"}}'
    )
