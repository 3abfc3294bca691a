"""Every change to adapters, on a real store and a real residency scheduler, with the fake engine."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InvalidAdapterError, StoreError
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.store import FolderStore
from server.api.error_responses import as_api_error
from server.auth.keys import Caller
from server.errors import AdapterUnavailableError, ServerError
from tests.server.desk import ADMIN, ALICE, BOB, PATIENCE_S, ROWS, Audit, Desk, Quotas, on_a_loop, opened
from tests.server.fakes import BASE, FakeEngine, ready_status
from tests.synthetic import RANDOM_R


@asynccontextmanager
async def refused(code: str, status: int, words: str = "") -> AsyncIterator[None]:
    with pytest.raises((ServerError, InvalidAdapterError, StoreError)) as refusal:
        yield
    error = as_api_error(refusal.value)
    assert (error.code, error.status) == (code, status), error.message
    assert words in error.message


async def started(work: Any, at: Callable[[], bool], desk: Desk) -> asyncio.Task[Any]:
    """A change that has come so far."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0)  # to its first pause
    await desk.until(at)
    assert not task.done()
    return task


# Upload, activate, roll back


@on_a_loop
async def test_an_upload_is_the_active_version_on_the_host_and_on_disk(folder: Path) -> None:
    async with opened(folder) as desk:
        adapter, created = await desk.upload("poet")
        assert created and adapter.active == 1 and [v.id for v in adapter.versions] == ["poet@1"]
        version = adapter.versions[0]
        assert (version.state, version.resident, version.rows, version.reason) == ("ready", "host", ROWS, None)
        assert version.digest in desk.engine.on_host and desk.followed.table == {"poet@1"}
        assert desk.found("poet") is desk.found("poet@1")
        assert desk.registry.adapter("poet", ADMIN) == replace(adapter, uploaded=None)
        assert desk.registry.servable(BOB) == [("poet", version.created)]
        weights = desk.registry.weights_file(desk.registry.version("poet", 1, BOB))
        assert weights.stat().st_size < version.size_bytes
        assert desk.followed.uploads == ["created"]


@on_a_loop
async def test_an_upload_that_is_not_to_be_active_reads_nothing_into_memory(folder: Path) -> None:
    async with opened(folder) as desk:
        adapter, _ = await desk.upload("poet", activate=False)
        assert adapter.active is None and adapter.versions[0].resident == "disk" and not desk.engine.calls
        assert desk.found("poet@1") and desk.registry.servable(BOB) == []
        async with refused("model_not_found", 404):
            desk.registry.resolve("poet", BOB)


@on_a_loop
async def test_the_same_content_again_is_the_version_that_is_there(folder: Path) -> None:
    async with opened(folder) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        adapter, created = await desk.upload("poet", 1, activate=False)
        assert not created and adapter.active == 2 and len(adapter.versions) == 2
        adapter, created = await desk.upload("poet", 1)
        assert not created and adapter.active == 1 and len(adapter.versions) == 2
        assert desk.followed.uploads == ["created", "created", "existing", "existing"]


@on_a_loop
async def test_a_version_is_on_the_host_before_it_becomes_the_active_one(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet", 1)
        await desk.upload("poet", 2, activate=False)
        desk.engine.delays["prepare"] = 0.1
        change = await started(desk.patch("poet", active=2), lambda: ("prepare", "poet@2") in desk.engine.calls, desk)
        assert desk.found("poet").id == "poet@1"
        assert (await change).active == 2 and desk.found("poet").id == "poet@2"
        assert desk.found("poet").record.digest in desk.engine.on_host


@on_a_loop
async def test_a_rollback_names_what_it_expects(folder: Path) -> None:
    async with opened(folder) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        async with refused("active_changed", 409, "found version 2"):
            await desk.patch("poet", active=1, if_active=1)
        assert desk.found("poet").number == 2
        assert (await desk.patch("poet", active=1, if_active=2)).active == 1


@on_a_loop
async def test_the_condition_comes_before_what_it_is_the_condition_of(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet", 1)
        await desk.upload("poet", 2, activate=False)
        calls = list(desk.engine.calls)
        for version in (2, 7):
            async with refused("active_changed", 409):
                await desk.patch("poet", active=version, if_active=2)
        assert desk.engine.calls == calls


@on_a_loop
async def test_a_name_without_an_active_version(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet")
        assert (await desk.patch("poet", active=None, if_active=1)).active is None
        async with refused("model_not_found", 404):
            desk.registry.resolve("poet", BOB)
        assert desk.found("poet@1") and desk.registry.servable(BOB) == []
    async with opened(folder) as desk:
        assert desk.registry.adapter("poet", BOB).active is None
        assert (await desk.patch("poet", active=1, if_active=None)).active == 1


@on_a_loop
async def test_a_version_that_is_not_there_cannot_become_active(folder: Path) -> None:
    async with opened(folder) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        async with desk.request("poet@1"):
            await desk.service.delete("poet", 1, ADMIN)
            for number in (1, 3):
                async with refused("version_not_found", 404):
                    await desk.patch("poet", active=number)
        async with refused("adapter_not_found", 404):
            await desk.patch("nobody", active=1)


@on_a_loop
async def test_a_request_keeps_the_version_it_was_admitted_with(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet", 1)
        async with desk.request("poet") as version:
            await desk.upload("poet", 2)
            assert desk.found("poet").id == "poet@2" and version.id == "poet@1"
            assert desk.is_on_device("poet@1") and version.leases == 1


# Deletes


@on_a_loop
async def test_a_delete_lets_what_runs_finish_and_admits_nothing_new(folder: Path) -> None:
    async with opened(folder) as desk:
        adapter, _ = await desk.upload("poet")
        blob = desk.store.folder(adapter.versions[0].digest)
        async with desk.request("poet"):
            adapter = await desk.service.delete("poet", None, ADMIN)
            assert adapter.active is None and adapter.versions[0].state == "draining"
            for model in ("poet", "poet@1"):
                async with refused("model_not_found", 404):
                    desk.registry.resolve(model, ADMIN)
            await asyncio.sleep(0.05)
            assert desk.registry.has("poet") and desk.is_on_device("poet@1") and blob.exists()
        await desk.until_gone("poet")
        assert not desk.aborted and not desk.engine.on_device and not desk.engine.on_host and not blob.exists()
        assert not desk.followed.table and desk.followed.names_removed == ["poet"]
        async with refused("adapter_not_found", 404):
            desk.registry.adapter("poet", BOB)


@on_a_loop
async def test_after_the_deadline_requests_and_waiters_end(folder: Path) -> None:
    engine = FakeEngine(ready_status(rows_total=ROWS))
    async with opened(folder, engine, Quotas(drain_timeout_s=0.05)) as desk:
        await desk.upload("poet", 1)
        await desk.upload("clerk", 2)
        ended = asyncio.Event()
        desk.on_abort = lambda request_id: ended.set()

        async def generate() -> None:
            async with desk.request("poet", "poets"):
                await ended.wait()

        async def wait_for_the_device() -> None:
            async with desk.request("clerk", "clerks"):
                raise AssertionError("there was no room")

        running = await started(generate(), lambda: desk.is_on_device("poet@1"), desk)
        clerk = desk.ref("clerk@1")
        waiting = await started(wait_for_the_device(), lambda: desk.scheduler.requests_waiting(clerk) == 1, desk)
        await desk.service.delete("clerk", None, ADMIN)
        async with refused("adapter_deleted", 410, "clerk@1"):
            await waiting
        assert not desk.aborted
        await desk.service.delete("poet", None, ADMIN)
        await running
        assert desk.aborted == ["poets"]
        for name in ("poet", "clerk"):
            await desk.until_gone(name)


@on_a_loop
async def test_an_engine_request_that_still_runs_keeps_its_rows_until_it_ended(folder: Path) -> None:
    """The client may be gone, and its lease with it, before vLLM has ended the engine's request."""
    async with opened(folder, quotas=Quotas(drain_timeout_s=0.01)) as desk:
        await desk.upload("poet")
        version = desk.found("poet")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(desk.scheduler.lease(version.ref, PATIENCE_S))
            await stack.enter_async_context(desk.engine.request(version.ref))
            version.running.add("request")
            await desk.service.delete("poet", None, ADMIN)
            await desk.until(lambda: desk.aborted == ["request"])
            await asyncio.sleep(0.3)
            assert desk.is_on_device("poet@1")
            version.running.discard("request")
        await desk.until_gone("poet")


@on_a_loop
async def test_the_active_one_of_several_is_not_deleted_alone(folder: Path) -> None:
    async with opened(folder) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        async with refused("version_active", 409):
            await desk.service.delete("poet", 2, ADMIN)
        async with refused("version_not_found", 404):
            await desk.service.delete("poet", 3, ADMIN)
        await desk.service.delete("poet", 1, ADMIN)
        await desk.until(lambda: len(desk.registry.versions("poet")) == 1)
        assert desk.found("poet").number == 2
        await desk.service.delete("poet", 2, ADMIN)
        await desk.until_gone("poet")


@on_a_loop
async def test_a_name_made_again_gets_higher_numbers(folder: Path) -> None:
    async with opened(folder) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        async with desk.request("poet"):
            await desk.service.delete("poet", None, ADMIN)
            adapter, created = await desk.upload("poet", 2)
            assert created and adapter.active == 3, "while the old ones drain"
        await desk.until(lambda: len(desk.registry.versions("poet")) == 1)
        assert desk.found("poet").number == 3 and desk.followed.names_removed == []
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")
        assert (await desk.upload("poet", 2))[0].active == 4
    async with opened(folder) as desk:
        assert (await desk.upload("other", 1))[0].active == 1, "numbers are each name's own"
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")
    async with opened(folder) as desk:
        assert (await desk.upload("poet", 2))[0].active == 5, "and stay used after a restart"


@on_a_loop
async def test_one_content_under_two_names_stays_for_the_second(folder: Path) -> None:
    async with opened(folder) as desk:
        for name in ("poet", "bard"):
            await desk.upload(name, 1)
        async with desk.request("bard"):
            await desk.service.delete("poet", None, ADMIN)
            await desk.until_gone("poet")
            assert desk.is_on_device("bard@1") and desk.store.folder(desk.found("bard").record.digest).exists()


@on_a_loop
async def test_a_delete_that_the_disk_refuses_is_tried_again(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet")
        async with desk.request("poet"):
            await desk.service.delete("poet", None, ADMIN)
            desk.disk.full = True
        await desk.until(lambda: not desk.engine.on_host)
        await asyncio.sleep(0.1)
        assert desk.registry.adapter("poet", BOB).versions[0].state == "draining"
        desk.disk.full = False
        await desk.until_gone("poet")


@on_a_loop
async def test_an_engine_that_fails_keeps_no_delete_from_the_disk(folder: Path) -> None:
    engine = FakeEngine()
    async with opened(folder, engine) as desk:
        await desk.upload("poet")
        engine.down = True
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")
    assert FolderStore.open(folder).adapters() == []


# Restarts


@on_a_loop
async def test_after_a_restart_all_is_there_again(folder: Path) -> None:
    engine = FakeEngine()
    async with opened(folder, engine) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        await desk.upload("clerk", 3)
        await desk.patch("poet", active=1, allowed_keys=["alice"], pinned=True)
        before = desk.adapters(ADMIN)
    async with opened(folder, engine) as desk:
        after = desk.adapters(ADMIN)
        assert desk.is_on_device("poet@1") and not desk.is_on_device("clerk@1")
        assert [forget_places(asdict(a)) for a in after] == [forget_places(asdict(b)) for b in before]
        assert desk.followed.table == {"poet@1", "poet@2", "clerk@1"}
        async with desk.request("poet@2"), desk.request("clerk"):
            pass


def forget_places(adapter: dict[str, Any]) -> dict[str, Any]:
    """What is where, and when it was used, is this run's own."""
    for version in adapter["versions"]:
        del version["resident"], version["last_used"]
    return adapter


@on_a_loop
async def test_a_delete_under_way_is_finished_by_the_next_start(folder: Path) -> None:
    engine = FakeEngine()
    async with opened(folder, engine) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        await desk.upload("clerk", 3)
        async with AsyncExitStack() as stack:
            for model in ("poet", "clerk"):
                await stack.enter_async_context(desk.request(model))
            await desk.service.delete("poet", None, ADMIN)
            await desk.close()
    store = FolderStore.open(folder)
    assert [(a.name, [v.state for v in a.versions]) for a in store.adapters()] == [
        ("clerk", ["ready"]), ("poet", ["draining", "draining"]),
    ]  # fmt: skip
    store.close()
    async with opened(folder, engine) as desk:
        await desk.until_gone("poet")
        assert desk.registry.names() == ["clerk"]


@on_a_loop
async def test_what_this_base_or_pool_does_not_take_is_shown_as_failed(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet")
        await desk.patch("poet", pinned=True)
    smaller = FakeEngine(ready_status(rows_total=ROWS - 1))
    for engine, base, reason in (
        (FakeEngine(), replace(BASE, fingerprint="1" * 64, moe_layers=(0,), num_layers=1), "layers"),
        (smaller, BASE, f"too_many_rows: the adapter takes {ROWS} rows"),
    ):
        async with opened(folder, engine, base=base) as desk:
            adapter = desk.registry.adapter("poet", BOB)
            assert adapter.active == 1 and adapter.versions[0].state == "failed"
            assert reason in (adapter.versions[0].reason or ""), adapter.versions[0].reason
            assert desk.registry.servable(BOB) == [] and not desk.followed.table
            async with refused("adapter_unavailable", 503, reason):
                with desk.registry.lease(desk.found("poet")):
                    raise AssertionError
            async with refused("adapter_unavailable", 503, reason):
                await desk.patch("poet", active=1)
            await desk.patch("poet", pinned=False)
            await desk.patch("poet", pinned=True)
    async with opened(folder) as desk:
        assert desk.registry.adapter("poet", BOB).versions[0].state == "ready" and desk.is_on_device("poet@1")
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")


@on_a_loop
async def test_what_is_failed_can_be_deleted(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet")
    async with opened(folder, FakeEngine(ready_status(rows_total=1))) as desk:
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")


@on_a_loop
async def test_a_pin_that_does_not_fit_after_a_restart_can_be_taken_off(folder: Path) -> None:
    async with opened(folder, FakeEngine(ready_status(rows_total=2 * ROWS))) as desk:
        for seed, name in enumerate(("poet", "clerk")):
            await desk.upload(name, seed)
            await desk.patch(name, pinned=True)
    engine = FakeEngine(ready_status(rows_total=ROWS))
    async with opened(folder, engine) as desk:
        assert desk.is_on_device("clerk@1") and not desk.is_on_device("poet@1")
        await desk.patch("poet", pinned=False)
        await desk.patch("clerk", pinned=False)
        for name in ("poet", "clerk", "poet"):
            async with desk.request(name):
                assert desk.engine.rows_used == ROWS


@on_a_loop
async def test_a_damaged_content_is_mended_by_an_upload_under_any_name(folder: Path) -> None:
    async with opened(folder) as desk:
        for name in ("poet", "bard"):
            await desk.upload(name, 1)
        await desk.patch("bard", pinned=True)
        blob = desk.store.folder(desk.found("poet").record.digest)
    (blob / WEIGHTS_FILE).unlink()
    async with opened(folder) as desk:
        for name in ("poet", "bard"):
            version = desk.registry.adapter(name, BOB).versions[0]
            assert version.state == "failed" and WEIGHTS_FILE in (version.reason or ""), version.reason
        adapter, created = await desk.upload("poet", 1)
        assert not created and adapter.versions[0].state == "ready"
        await desk.until(lambda: desk.is_on_device("bard@1"))  # which is pinned
        async with desk.request("poet"), desk.request("bard"):
            pass


@on_a_loop
async def test_a_delete_beside_the_upload_that_mends_the_content_leaves_nothing_of_it(folder: Path) -> None:
    """The version that is deleted is another object once it was mended."""
    async with opened(folder) as desk:
        for name in ("poet", "bard"):
            await desk.upload(name, 1)
        blob = desk.store.folder(desk.found("poet").record.digest)
    (blob / WEIGHTS_FILE).unlink()
    async with opened(folder) as desk:
        loop, deletes = asyncio.get_running_loop(), list[asyncio.Task[Any]]()
        ref = desk.ref("bard@1")

        def begin_delete() -> None:
            deletes.append(loop.create_task(desk.service.delete("bard", None, ADMIN)))

        def on_record() -> None:
            desk.audit.on_record = lambda: None
            loop.call_soon_threadsafe(begin_delete)
            time.sleep(0.05)  # the delete's record is next

        def add(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.05)  # the delete itself is next
            return FolderStore.add(desk.store, *args, **kwargs)

        desk.audit.on_record = on_record
        desk.store.add = add  # type: ignore[method-assign]
        await desk.upload("poet", 1)
        await asyncio.gather(*deletes)
        await desk.until_gone("bard")
        resident = desk.scheduler.resident(ref.key)
        assert resident is not None
        assert [owner.name for owner in resident.owners.values()] == ["poet@1"]


# Refusals


@on_a_loop
async def test_quotas(folder: Path) -> None:
    async with opened(folder, quotas=Quotas(max_adapters=2, max_versions=2)) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        async with refused("quota_exceeded", 429, "max_versions"):
            await desk.upload("poet", 3)
        assert not (await desk.upload("poet", 1))[1], "an existing version takes no place"
        await desk.upload("clerk", 1)
        async with refused("quota_exceeded", 429, "max_adapters"):
            await desk.upload("third", 1)
        assert desk.registry.names() == ["clerk", "poet"] and desk.followed.uploads[-1] == "quota_exceeded"
        await desk.service.delete("poet", 2, ADMIN)
        await desk.until(lambda: len(desk.registry.versions("poet")) == 1)
        await desk.upload("poet", 3)


@on_a_loop
async def test_bytes_are_counted_once_for_a_content(folder: Path) -> None:
    async with opened(folder) as desk:
        size = (await desk.upload("poet", 1))[0].versions[0].size_bytes
    async with opened(folder, quotas=Quotas(max_store_bytes=2 * size - 1)) as desk:
        assert desk.registry.store_bytes() == size
        await desk.upload("bard", 1)
        async with refused("quota_exceeded", 429, "max_store_bytes"):
            await desk.upload("clerk", 2)
        assert desk.registry.store_bytes() == size


@on_a_loop
async def test_names_that_are_refused(folder: Path) -> None:
    async with opened(folder) as desk:
        for name in ("base", "org/alias"):
            async with refused("name_conflict", 409):
                await desk.upload(name)
        for name in ("Poet", "a@1", "", ".x", "a/b", "x" * 64, "a\n"):
            async with refused("invalid_name", 400):
                await desk.upload(name)
        assert desk.store.adapters() == [] and not desk.audit.records


@on_a_loop
async def test_a_broken_adapter_is_refused_with_everything_that_is_wrong(folder: Path) -> None:
    async with opened(folder) as desk:
        staged = desk.service.stage()
        (staged / CONFIG_FILE).write_text('{"peft_type": "PERFT", "variant": "X"}')
        (staged / WEIGHTS_FILE).write_bytes(b"")
        with pytest.raises(InvalidAdapterError) as refusal:
            await desk.service.upload("poet", staged, True, ADMIN)
        assert len(refusal.value.violations) > 3
        assert desk.store.adapters() == [] and desk.followed.uploads == ["invalid_adapter"]


@on_a_loop
async def test_pins_that_leave_no_room_are_refused(folder: Path) -> None:
    async with opened(folder, FakeEngine(ready_status(rows_total=ROWS))) as desk:
        for seed, name in enumerate(("poet", "clerk")):
            await desk.upload(name, seed)
        assert (await desk.patch("poet", pinned=True)).pinned and desk.is_on_device("poet@1")
        async with refused("device_full", 409):
            await desk.patch("clerk", pinned=True, allowed_keys=[])
        adapter = desk.registry.adapter("clerk", BOB)
        assert (adapter.pinned, adapter.allowed_keys) == (False, None)
        async with refused("device_full", 409), desk.request("clerk"):
            raise AssertionError
        await desk.patch("poet", pinned=False)
        async with desk.request("clerk"):
            assert not desk.is_on_device("poet@1")


@on_a_loop
async def test_the_pin_goes_with_the_active_version(folder: Path) -> None:
    engine = FakeEngine(ready_status(rows_total=2 * ROWS))
    async with opened(folder, engine) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        await desk.patch("poet", active=1, pinned=True)
        await desk.patch("poet", active=2)
        await desk.upload("third", 3)
        await desk.patch("third", pinned=True)
        assert desk.is_on_device("poet@2") and desk.is_on_device("third@1") and not desk.is_on_device("poet@1")
        async with refused("device_full", 409):
            await desk.upload("poet", 4)
        assert desk.found("poet").number == 2 and desk.is_on_device("poet@2")
        await desk.until(lambda: len(desk.registry.versions("poet")) == 2)
        await desk.service.delete("poet", None, ADMIN)
        await desk.until_gone("poet")
        await desk.upload("clerk", 5)
        await desk.patch("clerk", pinned=True)


@on_a_loop
async def test_who_may_not_use_an_adapter_does_not_see_it(folder: Path) -> None:
    async with opened(folder) as desk:
        await desk.upload("poet", 1)
        await desk.upload("clerk", 2)
        await desk.patch("poet", allowed_keys=["alice"])
        assert [a.name for a in desk.adapters(BOB)] == ["clerk"] == [n for n, _ in desk.registry.servable(BOB)]
        assert [a.name for a in desk.adapters(ALICE)] == ["clerk", "poet"]
        nobodys = Caller(None, False)
        for caller in (BOB, nobodys):
            for model in ("poet", "poet@1"):
                async with refused("model_not_found", 404):
                    desk.registry.resolve(model, caller)
            async with refused("adapter_not_found", 404):
                desk.registry.adapter("poet", caller)
            async with refused("adapter_not_found", 404):
                desk.registry.version("poet", 1, caller)
            async with refused("adapter_not_found", 404):
                await desk.patch("poet", caller, active=None)
            async with refused("adapter_not_found", 404):
                await desk.service.delete("poet", None, caller)
        assert desk.found("poet", ALICE).id == "poet@1" == desk.registry.version("poet", 1, ALICE).id
        await desk.patch("poet", allowed_keys=[])
        async with refused("model_not_found", 404):
            desk.registry.resolve("poet", ALICE)
        await desk.patch("poet", allowed_keys=None)
        assert desk.found("poet", nobodys)


@on_a_loop
async def test_what_a_name_selects(folder: Path) -> None:
    async with opened(folder, base_names=("base", "org/base@main")) as desk:
        await desk.upload("poet")
        for name in ("base", "org/base@main"):
            assert desk.registry.resolve(name, BOB) is None
        for model in ("poet@2", "poet@01", "poet@", "poet@1@1", "poet ", "Poet", "", "@1", "base@1", "\ud800"):
            async with refused("model_not_found", 404):
                desk.registry.resolve(model, BOB)


# What goes wrong on the way


@on_a_loop
async def test_a_version_whose_load_fails_after_its_201_says_why(folder: Path) -> None:
    engine = FakeEngine()
    engine.failures["prepare", "poet@1"] = 1
    async with opened(folder, engine) as desk:
        await desk.upload("poet", activate=False)
        async with refused("adapter_unavailable", 503, "told to fail"), desk.request("poet@1"):
            raise AssertionError
        version = desk.registry.version_view(desk.registry.version("poet", 1, BOB), BOB)
        assert version.state == "failed" and "told to fail" in (version.reason or "")
        assert desk.found("poet@1").leases == 0
        async with refused("adapter_unavailable", 503, "told to fail"):
            await desk.patch("poet", active=1)
        assert desk.registry.adapter("poet", BOB).active is None


@on_a_loop
async def test_an_upload_that_shall_be_active_and_cannot_be_loaded_leaves_nothing(folder: Path) -> None:
    engine = FakeEngine()
    engine.failures["prepare", "poet@2"] = engine.failures["prepare", "clerk@1"] = 1
    async with opened(folder, engine) as desk:
        await desk.upload("poet", 1)
        async with refused("adapter_unavailable", 503, "told to fail"):
            await desk.upload("poet", 2)
        async with refused("adapter_unavailable", 503, "told to fail"):
            await desk.upload("clerk", 3)
        await desk.until(lambda: len(desk.registry.versions("poet")) == 1)
        await desk.until_gone("clerk")
        assert desk.found("poet").number == 1 and desk.followed.table == {"poet@1"}
        assert desk.followed.uploads == ["created", "adapter_unavailable", "adapter_unavailable"]
        actions = [(action, details.get("version")) for action, details in desk.audit.records]
        assert actions == [("upload", None), ("upload", None), ("delete", 2), ("upload", None), ("delete", 1)]
        assert (await desk.upload("poet", 2))[0].active == 3
    assert [len(adapter.versions) for adapter in FolderStore.open(folder).adapters()] == [2]


@on_a_loop
async def test_a_load_that_never_ends_holds_up_no_other_change(folder: Path) -> None:
    engine = FakeEngine()
    async with opened(folder, engine, Quotas(load_timeout_s=0.05)) as desk:
        await desk.upload("poet", activate=False)
        await desk.upload("clerk", 1)
        engine.delays["prepare"] = 3600
        async with refused("adapter_unavailable", 503, "0.05 s"):
            await desk.patch("poet", active=1)
        async with refused("adapter_unavailable", 503, "0.05 s"):
            await desk.patch("poet", active=1, pinned=True)
        assert (await desk.patch("clerk", active=None)).active is None


@on_a_loop
async def test_other_changes_go_on_while_a_version_loads(folder: Path) -> None:
    engine = FakeEngine()
    async with opened(folder, engine) as desk:
        await desk.upload("clerk", 1)
        await desk.upload("poet", 2, activate=False)
        engine.delays["prepare"] = 1
        patch = await started(desk.patch("poet", active=1), lambda: ("prepare", "poet@1") in engine.calls, desk)
        upload = await started(desk.upload("cook", 3), lambda: ("prepare", "cook@1") in engine.calls, desk)
        await desk.patch("clerk", active=None)
        await desk.upload("baker", 4, activate=False)
        await desk.service.delete("clerk", None, ADMIN)
        assert not patch.done() and not upload.done()
        assert (await patch).active == 1 and (await upload)[0].active == 1
        assert desk.found("poet").number == desk.found("cook").number == 1


@on_a_loop
async def test_a_delete_waits_for_the_load_of_its_own_name(folder: Path) -> None:
    engine = FakeEngine(delays={"prepare": 0.1})
    async with opened(folder, engine) as desk:
        upload = await started(desk.upload("poet"), lambda: ("prepare", "poet@1") in engine.calls, desk)
        deleted = await desk.service.delete("poet", None, ADMIN)
        assert (await upload)[0].active == 1 and deleted.active is None
        await desk.until_gone("poet")
        assert [action for action, _ in desk.audit.records] == ["upload", "delete"] and not engine.on_host


@on_a_loop
async def test_uploads_at_once_are_activated_in_their_order(folder: Path) -> None:
    engine = FakeEngine(delays={"prepare": 0.2})
    async with opened(folder, engine) as desk:
        first = await started(desk.upload("poet", 1), lambda: ("prepare", "poet@1") in engine.calls, desk)
        engine.delays["prepare"] = 0
        assert (await desk.upload("poet", 2))[0].active == 2 and first.done()
        assert desk.found("poet").number == 2


@on_a_loop
async def test_uploads_at_once_to_one_name_get_a_number_each(folder: Path) -> None:
    async with opened(folder) as desk:
        answers = await asyncio.gather(*(desk.upload("poet", seed, activate=seed % 2 == 0) for seed in range(6)))
        assert all(created for _, created in answers)
        assert [v.number for v in desk.registry.versions("poet")] == [1, 2, 3, 4, 5, 6]
        assert len({v.record.digest for v in desk.registry.versions("poet")}) == 6
        active = desk.found("poet").number
    async with opened(folder) as desk:
        assert len(desk.registry.versions("poet")) == 6 and desk.found("poet").number == active


@on_a_loop
async def test_changes_at_once_lose_none(folder: Path) -> None:
    async with opened(folder) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        await asyncio.gather(
            desk.patch("poet", active=1), desk.patch("poet", pinned=True), desk.patch("poet", allowed_keys=["alice"]),
            desk.upload("poet", 3, activate=False),
        )  # fmt: skip
        adapter = desk.registry.adapter("poet", ALICE)
        assert (adapter.active, adapter.pinned, adapter.allowed_keys, len(adapter.versions)) == (1, True, ["alice"], 3)
        results = await asyncio.gather(
            *(desk.patch("poet", active=number, if_active=1) for number in (2, 3)), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["ActiveChangedError", "AdapterView"]


@on_a_loop
async def test_a_change_whose_client_goes_away_is_finished(folder: Path) -> None:
    engine = FakeEngine(delays={"prepare": 0.1})
    async with opened(folder, engine) as desk:
        upload = await started(desk.upload("poet"), lambda: ("prepare", "poet@1") in engine.calls, desk)
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        assert upload.cancelled() and desk.found("poet").number == 1
        assert not list((folder / "staging").iterdir())


@on_a_loop
async def test_the_staged_folder_stays_until_the_change_has_ended(folder: Path) -> None:
    """The route discards it as soon as it goes on, also where it was cancelled."""
    async with opened(folder) as desk:
        there: list[bool] = []
        desk.audit.on_record = lambda: there.append(any((folder / "staging").iterdir()))
        upload = await started(desk.upload("poet"), lambda: any((folder / "staging").iterdir()), desk)
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        assert there == [True] and desk.found("poet").number == 1


@on_a_loop
async def test_closing_waits_for_the_change_under_way(folder: Path) -> None:
    engine = FakeEngine(delays={"prepare": 0.1})
    async with opened(folder, engine) as desk:
        upload = await started(desk.upload("poet"), lambda: ("prepare", "poet@1") in engine.calls, desk)
        upload.cancel()
        await desk.close()
        await asyncio.gather(upload, return_exceptions=True)
    assert [(adapter.name, adapter.active) for adapter in FolderStore.open(folder).adapters()] == [("poet", 1)]


@on_a_loop
async def test_every_change_is_on_record_before_it_is_made(folder: Path) -> None:
    async with opened(folder) as desk:
        seen: list[Any] = []
        desk.audit.on_record = lambda: seen.append(desk.store.get("poet"))
        await desk.upload("poet")
        await desk.patch("poet", active=None, pinned=True)
        await desk.service.delete("poet", 1, ADMIN)
        await desk.until_gone("poet")
        assert [action for action, _ in desk.audit.records] == ["upload", "patch", "delete"]
        assert desk.audit.records[0][1].keys() == {"name", "digest", "activate"}
        assert desk.audit.records[1][1] == {"name": "poet", "active": None, "pinned": True}
        assert desk.audit.records[2][1] == {"name": "poet", "version": 1}
        assert [record and (record.active, record.pinned) for record in seen] == [None, (1, False), (None, True)]


@on_a_loop
async def test_what_cannot_be_recorded_is_not_done(folder: Path) -> None:
    audit = Audit()
    async with opened(folder, FakeEngine(ready_status(rows_total=ROWS)), audit=audit) as desk:
        await desk.upload("poet", 1)
        await desk.upload("clerk", 3)
        audit.is_broken = True
        before = desk.store.adapters()
        for change in (
            desk.upload("poet", 2),
            desk.patch("poet", active=None, pinned=True),
            desk.patch("poet", pinned=True),
            desk.service.delete("poet", None, ADMIN),
        ):
            async with refused("storage_full", 507, "audit log"):
                await change
        assert desk.store.adapters() == before and desk.found("poet").number == 1
        async with desk.request("clerk"):
            assert not desk.is_on_device("poet@1"), "no pin is left"


@on_a_loop
async def test_a_change_is_made_whole_or_not_at_all(folder: Path) -> None:
    engine = FakeEngine(ready_status(rows_total=2 * ROWS))
    async with opened(folder, engine) as desk:
        for seed in (1, 2):
            await desk.upload("poet", seed)
        await desk.upload("clerk", 3)
        await desk.patch("poet", pinned=True)
        before = desk.store.get("poet")
        desk.disk.full = True
        for change in (
            desk.patch("poet", active=1, allowed_keys=["alice"], pinned=False),
            desk.patch("poet", active=1),
            desk.patch("poet", active=None),
            desk.service.delete("poet", None, ADMIN),
        ):
            async with refused("storage_full", 507):
                await change
            assert desk.store.get("poet") == before and desk.found("poet", BOB).number == 2
        async with desk.request("clerk"), desk.request("poet"):
            assert desk.is_on_device("poet@2"), "it is pinned as before"
            assert not desk.is_on_device("poet@1"), "and nothing else is"
        desk.disk.full = False
        writes: list[str] = []
        desk.disk.step = lambda operation, path: writes.append(operation)  # type: ignore[method-assign]
        await desk.patch("poet", active=1, allowed_keys=["alice"], pinned=False)
        assert writes.count("write") == 1, "one commit: a crash leaves all of it or nothing"


@on_a_loop
async def test_an_upload_that_the_disk_refuses_leaves_nothing(folder: Path) -> None:
    async with opened(folder) as desk:
        desk.disk.full = True
        async with refused("storage_full", 507):
            await desk.upload("poet")
        assert not desk.registry.has("poet") and not list((folder / "staging").iterdir())
        desk.disk.full = False
        assert (await desk.upload("poet"))[0].active == 1
        version = desk.registry.version_view(desk.found("poet"), BOB)
        assert version.bottleneck == RANDOM_R["bottleneck"]


@on_a_loop
async def test_a_pin_that_cannot_be_restored_holds_up_no_other_change(folder: Path) -> None:
    async with opened(folder, FakeEngine(ready_status(rows_total=2 * ROWS))) as desk:
        for seed, name in enumerate(("poet", "clerk")):
            await desk.upload(name, seed)
            await desk.patch(name, pinned=True)
        await desk.upload("clerk", 7, activate=False)
    async with opened(folder, FakeEngine(ready_status(rows_total=ROWS))) as desk:
        off_device = next(name for name in ("poet", "clerk") if not desk.is_on_device(f"{name}@1"))
        assert (await desk.patch(off_device, allowed_keys=[])).allowed_keys == []
        await desk.service.delete("clerk", 2, ADMIN)
        async with refused("device_full", 409):
            await desk.patch(off_device, pinned=True)


@on_a_loop
async def test_an_abort_that_fails_leaves_no_rows_behind(folder: Path) -> None:
    async with opened(folder, quotas=Quotas(drain_timeout_s=0.05)) as desk:
        await desk.upload("poet")
        ends = asyncio.Event()

        def fail(request_id: str) -> None:
            ends.set()
            raise RuntimeError("the engine does not know this request")

        async def run() -> None:
            async with desk.request("poet"):
                await ends.wait()

        desk.on_abort = fail
        running = asyncio.create_task(run())
        await desk.until(lambda: bool(desk.found("poet").running))
        await desk.service.delete("poet", None, ADMIN)
        await running
        await desk.until_gone("poet")
        assert not desk.scheduler.residents() and not desk.engine.on_device and not desk.engine.on_host


@on_a_loop
async def test_the_end_of_a_wait_says_what_was_waited_for(folder: Path) -> None:
    async with opened(folder, FakeEngine(ready_status(rows_total=ROWS))) as desk:
        for seed, name in enumerate(("poet", "clerk", "sage")):
            await desk.upload(name, seed, activate=name != "sage")
        desk.engine.delays["prepare"] = 1000
        async with desk.request("poet"):
            for model, words in (
                ("clerk", "no room on the device within 0.05 s"),
                ("sage@1", "was not read from disk"),
            ):
                with pytest.raises(AdapterUnavailableError, match=words):
                    async with desk.scheduler.lease(desk.ref(model if "@" in model else f"{model}@1"), 0.05):
                        pass
        desk.engine.delays.clear()
