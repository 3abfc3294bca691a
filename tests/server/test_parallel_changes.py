"""Changes to different names do not wait for each other's files, and a content that leaves while it comes back stays
whole."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.store import verify_folder
from tests.server.desk import ADMIN, ROWS, Audit, Desk, Quotas, opened
from tests.server.fakes import FakeEngine, ready_status

PATIENCE_S = 60.0


class Gate:
    """Stops the disk at an operation on some path, in its thread, until it is opened."""

    def __init__(self, desk: Desk, operation: str, where: Callable[[Path], bool]) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self._operation, self._where = operation, where
        desk.disk.step = self._step  # type: ignore[method-assign]

    def _step(self, operation: str, path: Path) -> None:
        if operation == self._operation and self._where(path) and not self._open.is_set():
            self.reached.set()
            assert self._open.wait(PATIENCE_S), "the gate was never opened"

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, PATIENCE_S), "nothing came to the gate"

    def open(self) -> None:
        self._open.set()


async def every_change(desk: Desk) -> None:
    """What there is to do with a name that nothing large is done to."""
    async with asyncio.timeout(PATIENCE_S):
        assert (await desk.patch("poet", active=1, if_active=2)).active == 1
        await desk.patch("poet", pinned=True, allowed_keys=["alice"])
        await desk.patch("poet", active=2)
        await desk.service.delete("poet", 1, ADMIN)
        async with desk.request("poet"):
            pass


@pytest.mark.parametrize("at", ["sync_file", "sync_folder"])
def test_a_rollback_does_not_wait_for_the_upload_of_another_name(tmp_path: Path, at: str) -> None:
    """The upload stands still in the middle of its fsync for as long as the others take."""

    async def scenario() -> None:
        async with opened(tmp_path / "store") as desk:
            for seed in (1, 2):
                await desk.upload("poet", seed)
            gate = Gate(desk, at, lambda path: "staging" in path.parts)
            uploads = [asyncio.create_task(desk.upload(name, 9)) for name in ("large", "larger")]
            await gate.wait()
            await every_change(desk)
            assert not any(upload.done() for upload in uploads)
            gate.open()
            for upload in uploads:
                assert (await upload)[0].active == 1
            await desk.until(lambda: len(desk.registry.versions("poet")) == 1)
        assert verify_folder(tmp_path / "store") == []

    asyncio.run(scenario())


def test_nor_for_the_comparison_with_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.store.folder import blobs

    reached, opened_again = threading.Event(), threading.Event()
    compare = blobs._is_same

    def slow(folder: Path, blob: Path) -> bool:
        reached.set()
        assert opened_again.wait(PATIENCE_S)
        return compare(folder, blob)

    async def scenario() -> None:
        async with opened(tmp_path / "store") as desk:
            for seed in (1, 2):
                await desk.upload("poet", seed)
            await desk.upload("large", 9)
            monkeypatch.setattr(blobs, "_is_same", slow)
            upload = asyncio.create_task(desk.upload("large", 9))
            assert await asyncio.to_thread(reached.wait, PATIENCE_S)
            await every_change(desk)
            assert not upload.done()
            opened_again.set()
            assert (await upload)[1] is False

    asyncio.run(scenario())


def test_nor_for_the_removal_of_another_names_files(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "store") as desk:
            for seed in (1, 2):
                await desk.upload("poet", seed)
            await desk.upload("large", 9)
            gate = Gate(desk, "remove_tree", lambda path: "trash" in path.parts)
            await desk.service.delete("large", None, ADMIN)
            await gate.wait()
            await every_change(desk)
            gate.open()
            await desk.until_gone("large")
        assert verify_folder(tmp_path / "store") == []

    asyncio.run(scenario())


def test_uploads_at_once_do_not_exceed_a_quota_together(tmp_path: Path) -> None:
    """Their files are stored beside each other; the room is counted one by one."""

    async def scenario() -> None:
        async with opened(tmp_path / "store", quotas=Quotas(max_adapters=3)) as desk:
            uploads = (desk.upload(f"name-{seed}", seed) for seed in range(8))
            results = await asyncio.gather(*uploads, return_exceptions=True)
            assert sorted(type(result).__name__ for result in results) == ["QuotaExceededError"] * 5 + ["tuple"] * 3
            assert desk.registry.count() == 3 and not list((tmp_path / "store" / "staging").iterdir())
        assert verify_folder(tmp_path / "store") == []

    asyncio.run(scenario())


def test_many_changes_at_once_leave_the_store_as_they_say(tmp_path: Path) -> None:
    """Names that share contents, uploaded, rolled back and deleted beside each other."""

    async def churn(desk: Desk, name: str) -> None:
        for turn in range(3):
            for seed in (1, 2, 3):
                await desk.upload(name, seed)
            first = desk.registry.record(name)
            assert first is not None
            await desk.patch(name, active=first.versions[0].version)
            await desk.service.delete(name, None if turn < 2 else first.versions[1].version, ADMIN)

    async def scenario() -> None:
        async with opened(tmp_path / "store", FakeEngine(ready_status(rows_total=2 * ROWS)), audit=Audit()) as desk:
            names = [f"name-{number}" for number in range(5)]
            await asyncio.gather(*(churn(desk, name) for name in names))
            await desk.until(lambda: all(len(desk.registry.versions(name)) == 2 for name in names))
            for name in names:
                numbers = [version.number for version in desk.registry.versions(name)]
                assert len(numbers) == 2 and numbers[0] == 7 and desk.found(name).number == 7
                async with desk.request(name):
                    pass
            assert {v.id for v in desk.registry.all_versions()} == desk.followed.table
            assert [desk.registry.record(name) for name in names] == desk.store.adapters()
        assert verify_folder(tmp_path / "store") == []

    asyncio.run(scenario())


@pytest.mark.parametrize("leaving", ["evict", "drop", "forget"])
@pytest.mark.parametrize("activate", [True, False])
def test_a_content_uploaded_while_it_leaves_is_whole(tmp_path: Path, leaving: str, activate: bool) -> None:
    """Its last version is being deleted: the engine frees it while another name gets the same content."""

    async def scenario() -> None:
        engine = FakeEngine()
        held = engine.holds[leaving] = tmp_path / "held"
        async with opened(tmp_path / "store", engine) as desk:
            await desk.upload("old", 1)
            async with desk.request("old"):
                pass
            held.touch()
            await desk.service.delete("old", None, ADMIN)
            await desk.until(lambda: any(operation == leaving for operation, _ in engine.calls))
            upload = asyncio.create_task(desk.upload("new", 1, activate=activate))
            await desk.until(lambda: desk.registry.has("new"))
            held.unlink()
            adapter, created = await upload
            assert created and adapter.versions[0].state == "ready"
            await desk.until_gone("old")
            digest = desk.found("new@1").record.digest
            if activate:
                assert desk.found("new").number == 1 and digest in engine.on_host, "active, so on the host"
            async with desk.request("new@1"):
                assert digest in engine.on_device
            assert desk.store.folder(digest).is_dir() and desk.store.problems == []
        assert verify_folder(tmp_path / "store") == []

    asyncio.run(scenario())
