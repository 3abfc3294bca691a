"""The seam table read off a wheel that is not imported: the installed vLLM holds, and every difference is named."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import vllm

from perft.engine.seam_check import Seam, SeamGroup
from perft.engine.seam_wheel import Wheel, main, wheel_problems
from perft.engine.seams import SEAM_GROUPS, SUPPORTED_VLLM

INSTALLED = Path(vllm.__file__).parents[1]
SEAMS = [seam for group in SEAM_GROUPS for seam in group.seams]
VERSION = "9.1"


@pytest.fixture(scope="module")
def installed() -> Wheel:
    return Wheel(INSTALLED)


def test_every_seam_holds_in_the_installed_vllm(installed: Wheel) -> None:
    assert installed.version == SUPPORTED_VLLM
    assert wheel_problems(installed) == []


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_seam_that_differs_is_named(installed: Wheel, seam: Seam) -> None:
    gone = replace(seam, name=f"{seam.name}_gone", parameters=None)
    assert f"{seam.name}_gone does not exist" in (installed.problem(gone) or "")
    if seam.parameters is not None:
        longer = replace(seam, parameters=(*seam.parameters, "parameter_of_the_future"))
        assert f"{seam.name}: found parameters" in (installed.problem(longer) or "")
    if seam.sets:
        further = replace(seam, sets=(*seam.sets, "of_the_future"))
        assert "does not set the attributes ['of_the_future']" in (installed.problem(further) or "")


SOURCES = {
    "__init__": "",
    "moved": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm.bases import Only\nLIMIT: int = 4\n",
    "bases": """
from dataclasses import dataclass
class Base:
    def begin(self, first, *, second=None): self.ready = True
    size = 1
class Other: ...
@dataclass
class Record:
    one: int
@dataclass
class Longer(Record):
    two: int = 2
""",
    "children": """
try:
    import fast
except ImportError:
    fast = None
from .bases import Base as Parent, Longer
class Child(Parent, fast.Thing):
    async def end(self, last, /, *rest, **others): ...
if fast:
    def work(a): ...
else:
    def work(a, b): ...
""",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Iterator[Wheel]:
    """A small vLLM of version 9.1."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / f"vllm-{VERSION}.dist-info").mkdir()
    for name, source in SOURCES.items():
        (tmp_path / "vllm" / f"{name}.py").write_text(source)
    yield Wheel(tmp_path)


def seam(module: str, name: str, **changes: object) -> Seam:
    values = {"module": f"vllm.{module}", "name": name, "use": "read", "checked": (VERSION,)}
    return Seam(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "holds",
    [
        seam("bases", "Base.begin", parameters=("first", "second"), sets=("ready",)),
        seam("children", "Child.begin", parameters=("first",), sets=("ready",)),
        seam("children", "Child.size"),
        seam("children", "Child.end", parameters=("last", "rest", "others")),
        seam("children", "work", parameters=("a", "b")),
        seam("children", "fast"),
        seam("children", "Longer", parameters=("one", "two")),
        seam("bases", "Record.one"),
        seam("gone", "LIMIT", elsewhere=((VERSION, "vllm.moved"),)),
    ],
    ids=lambda seam: seam.name,
)
def test_what_is_there_is_found(wheel: Wheel, holds: Seam) -> None:
    assert wheel.problem(holds) is None


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        (seam("gone", "LIMIT"), "vllm.gone.LIMIT does not exist (no module vllm.gone)"),
        (seam("gone", "LIMIT", elsewhere=(("9.0", "vllm.moved"),)), "vllm.gone.LIMIT does not exist"),
        (seam("moved", "LIMIT", elsewhere=((VERSION, "vllm.bases"),)), "vllm.bases.LIMIT does not exist"),
        (seam("moved", "Only"), "vllm.moved has no Only"),
        (seam("children", "Child.middle"), "Child has no middle"),
        (seam("bases", "Other.begin"), "Other has no begin"),
        (seam("moved", "LIMIT.real"), "no class has real"),
        (seam("moved", "LIMIT", parameters=()), "it is no function"),
        (seam("children", "work", parameters=("b",)), "found parameters ('a', 'b')"),
        (seam("bases", "Base.begin", sets=("size",)), "does not set the attributes ['size']"),
    ],
)
def test_what_differs_is_told(wheel: Wheel, differs: Seam, said: str) -> None:
    assert said in (wheel.problem(differs) or "")


def test_a_seam_that_holds_unsaid_is_told_too(wheel: Wheel) -> None:
    groups = [SeamGroup(breaks="b", gone_when="g", seams=(seam("moved", "LIMIT", checked=("9.0",)),))]
    assert wheel_problems(wheel, groups) == [f"vllm.moved.LIMIT holds; add {VERSION} to its `checked`"]


def test_a_folder_without_one_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="expected one unpacked vLLM"):
        Wheel(tmp_path)


def test_the_command_tells_by_its_status(wheel: Wheel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(INSTALLED)]) == 0 and SUPPORTED_VLLM in capsys.readouterr().out
    assert main([str(tmp_path)]) == 1 and len(capsys.readouterr().out.splitlines()) == len(SEAMS)
    assert main([]) == 2
