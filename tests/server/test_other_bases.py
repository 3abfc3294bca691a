"""A store belongs to no base: each version belongs to the one it was accepted on, and answers on no other."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.store import FolderStore, VersionRecord, verify_folder
from perft.base_model import BaseShape
from server.errors import AdapterUnavailableError
from tests.server.desk import ADMIN, BOB, Desk, on_a_loop, opened
from tests.server.fakes import BASE
from tests.store_contents import lora
from tests.synthetic import RANDOM_R

SHARED_VALUES = {k: v for k, v in RANDOM_R.items() if k not in ("top_k", "renormalize")}
VARIANTS: dict[str, dict[str, Any]] = {
    "r": RANDOM_R,
    "s": SHARED_VALUES | {"variant": "S", "num_experts": 1},
    "d": SHARED_VALUES | {"variant": "D", "num_experts": 3},
}
OTHER = replace(BASE, fingerprint="1" * 64)
UNKNOWN = replace(BASE, fingerprint=None)


def states(desk: Desk) -> dict[str, str]:
    return {v.id: v.state for adapter in desk.adapters(ADMIN) for v in adapter.versions}


async def check_fails(desk: Desk, model: str, *words: str) -> None:
    """It is listed with the reason, is no model, and can neither be used nor become active."""
    version = desk.found(model)
    view = desk.registry.version_view(version, ADMIN)
    assert view.state == "failed" and all(word in (view.reason or "") for word in words), view.reason
    assert version.name not in [name for name, _ in desk.registry.servable(BOB)]
    refused = pytest.raises(AdapterUnavailableError, match="cannot be served: base: found one of")
    with refused, desk.registry.lease(version):
        raise AssertionError
    with pytest.raises(AdapterUnavailableError):
        await desk.patch(version.name, active=version.number)
    assert version.id not in desk.followed.table


@on_a_loop
async def test_no_adapter_of_one_base_answers_on_another(folder: Path) -> None:
    async with opened(folder) as desk:
        for seed, (name, values) in enumerate(VARIANTS.items()):
            await desk.upload(name, seed, values=values)
    for other in (OTHER, replace(BASE, fingerprint="1" * 64, top_k=1)):
        async with opened(folder, base=other) as desk:
            assert set(states(desk).values()) == {"failed"} and not desk.engine.calls
            for name in VARIANTS:
                await check_fails(desk, name, "1" * 64, "0" * 64, "--allow-other-base")
                await check_fails(desk, f"{name}@1", "accepted on")
    async with opened(folder, base=OTHER, allow_other_base=True) as desk:
        assert set(states(desk).values()) == {"ready"}
        for name in VARIANTS:
            async with desk.request(name):
                pass
    async with opened(folder, base_names=("the same", "under another name")) as desk:
        assert set(states(desk).values()) == {"ready"}, "it was never lost"
        for name in VARIANTS:
            async with desk.request(name):
                pass
        assert sorted(name for name, _ in desk.registry.servable(BOB)) == sorted(VARIANTS)


@on_a_loop
async def test_what_does_not_fit_is_not_allowed_either(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet")
    async with opened(folder, base=replace(OTHER, hidden_size=16), allow_other_base=True) as desk:
        view = desk.registry.version_view(desk.found("poet"), ADMIN)
        assert view.state == "failed" and "shape" in (view.reason or "")


@pytest.mark.parametrize(
    ("accepted", "served", "answers"),
    [
        (BASE, BASE, True),
        (BASE, OTHER, False),
        (BASE, UNKNOWN, True),
        (UNKNOWN, BASE, True),
        (UNKNOWN, UNKNOWN, True),
        (UNKNOWN, replace(UNKNOWN, num_experts=8), False),
        (UNKNOWN, replace(OTHER, top_k=3), False),
        (BASE, replace(UNKNOWN, num_layers=3), False),
        (BASE, replace(BASE, dtype=torch.bfloat16), True),
    ],
)
def test_by_the_fingerprint_where_it_is_known_and_else_by_the_shape(
    tmp_path: Path, accepted: BaseShape, served: BaseShape, answers: bool
) -> None:
    async def scenario(folder: Path) -> None:
        async with opened(folder, base=accepted) as desk:
            await desk.upload("poet", values=VARIANTS["s"])
        async with opened(folder, base=served) as desk:
            assert states(desk) == {"poet@1": "ready" if answers else "failed"}

    on_a_loop(scenario)(tmp_path)


@on_a_loop
async def test_a_peft_lora_adapter_belongs_to_its_base_too(folder: Path) -> None:
    """Its own checks see shapes alone."""

    def fits(folder: Path, *, values: bool = True) -> tuple[list[str], str | None]:
        return [], lora().digest

    async with opened(folder, check_lora=fits) as desk:
        staged = desk.service.stage()
        await desk.service.upload("lora", lora().write(staged), False, ADMIN)
        assert states(desk) == {"lora@1": "ready"}
    async with opened(folder, base=OTHER, check_lora=fits) as desk:
        await check_fails(desk, "lora@1", "accepted on")
    async with opened(folder, base=OTHER, check_lora=fits, allow_other_base=True) as desk:
        assert states(desk) == {"lora@1": "ready"}


@on_a_loop
async def test_one_content_under_two_names_on_two_bases(folder: Path) -> None:
    """They share files; each answers on its own base."""
    async with opened(folder) as desk:
        await desk.upload("poet", 1)
    async with opened(folder, base=OTHER) as desk:
        adapter, created = await desk.upload("bard", 1)
        assert created and adapter.versions[0].state == "ready" and states(desk)["poet@1"] == "failed"
        async with desk.request("bard"):
            pass
        with pytest.raises(AdapterUnavailableError, match="accepted on"):
            await desk.upload("poet", 1)
        again, created = await desk.upload("poet", 1, activate=False)
        assert not created and again.versions[0].state == "failed" and again.uploaded == 1
    async with opened(folder) as desk:
        assert states(desk) == {"bard@1": "failed", "poet@1": "ready"}
        await desk.service.delete("bard", None, ADMIN)
        await desk.until_gone("bard")
        async with desk.request("poet"):
            pass


@on_a_loop
async def test_what_is_of_another_base_can_be_deleted_and_kept_and_changed(folder: Path) -> None:
    async with opened(folder) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        await desk.patch("poet", pinned=True)
    async with opened(folder, base=OTHER) as desk:
        assert (await desk.upload("poet", 3))[0].active == 3
        await desk.patch("poet", allowed_keys=["alice"])
        await desk.service.delete("poet", 1, ADMIN)
        await desk.until(lambda: len(desk.registry.versions("poet")) == 2)
        assert states(desk) == {"poet@2": "failed", "poet@3": "ready"}
    async with opened(folder) as desk:
        assert states(desk) == {"poet@2": "ready", "poet@3": "failed"} and desk.found("poet").number == 3
        assert (await desk.patch("poet", active=2)).active == 2
    assert verify_folder(folder) == []


# Stores of schema 1, which knew nothing of bases


def forget_bases(folder: Path) -> None:
    """As schema 1 wrote the records."""
    for path in (folder / "names").iterdir():
        record = json.loads(path.read_bytes())
        for version in record["versions"]:
            del version["base"]
        path.write_text(json.dumps(record, indent=1))
    (folder / "STORE.json").write_text('{"schema":1,"floor":0}')
    shutil.rmtree(folder / "deleted")


def bases(folder: Path) -> dict[str, str | None]:
    """The fingerprint recorded with each version; "none" where no base is recorded."""
    store = FolderStore.open(folder)
    found = {(record.name, version.version): version for record in store.adapters() for version in record.versions}
    store.close()

    def shown(version: VersionRecord) -> str | None:
        return "none" if version.base is None else version.base.fingerprint

    return {f"{name}@{number}": shown(version) for (name, number), version in found.items()}


def test_a_version_without_a_base_takes_the_first_one_that_it_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(folder: Path) -> None:
        async with opened(folder) as desk:
            await desk.upload("poet", 1)
            await desk.upload("poet", 2, values=RANDOM_R | {"base_fingerprint": BASE.fingerprint})
            await desk.upload("clerk", 3)
        forget_bases(folder)
        with caplog.at_level(logging.WARNING, "server.registry"):
            async with opened(folder, base=OTHER) as desk:
                assert states(desk) == {"clerk@1": "ready", "poet@1": "ready", "poet@2": "failed"}
        (said,) = [r.getMessage() for r in caplog.records if "no base recorded" in r.getMessage()]
        assert said.startswith("2 stored versions had no base recorded") and "1" * 64 in said
        assert bases(folder) == {"clerk@1": "1" * 64, "poet@1": "1" * 64, "poet@2": "none"}
        caplog.clear()
        async with opened(folder) as desk:
            assert states(desk) == {"clerk@1": "failed", "poet@1": "failed", "poet@2": "ready"}
        assert bases(folder) == {"clerk@1": "1" * 64, "poet@1": "1" * 64, "poet@2": "0" * 64}
        assert verify_folder(folder) == []

    on_a_loop(scenario)(tmp_path)


@on_a_loop
async def test_where_other_bases_are_allowed_none_is_recorded_as_a_versions_own(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet", 1, values=RANDOM_R | {"base_fingerprint": BASE.fingerprint})
        await desk.upload("poet", 2)
    forget_bases(folder)
    async with opened(folder, base=OTHER, allow_other_base=True) as desk:
        assert states(desk) == {"poet@1": "ready", "poet@2": "ready"}
    assert bases(folder) == {"poet@1": "none", "poet@2": "none"}


@on_a_loop
async def test_a_base_that_cannot_be_recorded_keeps_no_server_from_starting(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet")
    forget_bases(folder)
    FolderStore.open(folder).close()
    async with opened(folder, disk_is_full=True) as desk:
        assert states(desk) == {"poet@1": "ready"}
    assert bases(folder) == {"poet@1": "none"}
