"""Several servers over one store, in virtual time: what one answered, all keep to, whatever becomes of the network."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreError
from adapters.format.files import WEIGHTS_FILE
from adapters.store import Look
from adapters.store.log.bucket import Bucket
from adapters.store.log.objects import Objects
from adapters.store.log.store import LogStore
from server.errors import (
    ActiveChangedError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ModelNotFoundError,
    QuotaExceededError,
    StoreUnreachableError,
    VersionNotFoundError,
)
from server.following.follower import POLL_S, WAIT_S, Follower
from server.inference.selection import selected
from server.registry.version import Version
from tests.server.desk import ADMIN, ALICE, BOB, GRACE_S, LAG_S, SMALL, Desk, Quotas, on_a_loop, opened
from tests.server.virtual_time import run_virtually
from tests.store.faults import Faulty


@asynccontextmanager
async def servers(
    folder: Path, count: int = 2, quotas: Quotas | None = None, cache_bytes: int | None = None
) -> AsyncIterator[list[Desk]]:
    """Servers of one store, each behind a network of its own (`networks[desk]`)."""
    place = Bucket("memory:///")
    async with AsyncExitStack() as stack:
        desks = []
        for number in range(count):
            network = Faulty(place)
            desk = await stack.enter_async_context(
                opened(folder, shared=log_store(network, folder / str(number), cache_bytes), quotas=quotas)
            )
            desk.network = network  # type: ignore[attr-defined]
            desks.append(desk)
        yield desks


def log_store(objects: Objects, cache: Path, cache_bytes: int | None = None) -> LogStore:
    loop = asyncio.get_running_loop()
    return LogStore.open(objects, cache, cache_bytes=cache_bytes, clock=loop.time, pause=lambda seconds: None)


def ready(desk: Desk, name: str) -> list[int]:
    return [version.number for version in desk.registry.versions(name) if not version.is_draining]


SCRIPT: list[tuple[int, Callable[[Desk], Coroutine[Any, Any, object]]]] = [
    (0, lambda desk: desk.upload("a", 1)),
    (1, lambda desk: desk.upload("b", 2, allowed_keys=("alice",))),
    (1, lambda desk: desk.upload("a", 2)),
    (0, lambda desk: desk.patch("a", active=ready(desk, "a")[0], pinned=True)),
    (1, lambda desk: desk.patch("b", allowed_keys=None)),
    (0, lambda desk: desk.service.delete("a", ready(desk, "a")[-1], ADMIN)),
    (1, lambda desk: desk.service.delete("b", None, ADMIN)),
    (0, lambda desk: desk.upload("b", 1)),
]
"""Changes, and the server (0, 1) that makes each. A version that cannot be activated is taken back, and its number not
given again: so versions are named by what is there."""


async def follow_script(desks: list[Desk]) -> int:
    """Make the changes; one that fails because of the store is made once more. Returns how many failed."""
    failed = 0
    for who, change in SCRIPT:
        try:
            await change(desks[who])
        except (StoreError, StoreUnreachableError, AdapterUnavailableError):
            failed += 1
            with suppress(VersionNotFoundError, AdapterNotFoundError):  # it was made, and its answer was lost
                await change(desks[who])
    return failed


def known(desk: Desk) -> dict[str, Any]:
    """What a server knows of names and versions, without what is being deleted."""
    return {
        record.name: (
            record.active,
            record.pinned,
            record.allowed_keys,
            [v.number for v in versions if not v.is_draining],
        )
        for record, versions in desk.registry.snapshot()
        if any(not version.is_draining for version in versions)
    }


def store_steps(folder: Path) -> int:
    """How many steps the first server's store takes for the script."""
    counted: list[int] = []

    async def run() -> None:
        async with servers(folder) as desks:
            assert await follow_script(desks) == 0
            counted.append(len(desks[0].network.steps))  # type: ignore[attr-defined]

    run_virtually(run())
    return counted[0]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_fault_at_every_step_of_the_store(tmp_path: Path, moment: str) -> None:
    """Nothing is sent, or an answer is lost: in the end all servers and the store agree, and serve what they list."""
    steps = store_steps(tmp_path / "undisturbed")
    assert steps > 30

    async def run(step: int) -> None:
        async with servers(tmp_path / f"{moment}-{step}") as desks:
            network = desks[0].network  # type: ignore[attr-defined]
            begun = len(network.steps)

            def fail(operation: str, key: str) -> None:
                if len(network.steps) == begun + step:
                    raise OSError(f"{operation} {key}: lost")

            setattr(network, moment, fail)
            await follow_script(desks)
            mend(desks[0])
            for desk in desks:
                await desk.following.fresh()
            found = known(desks[0])
            assert found == known(desks[1]) and found.keys() == {"a", "b"}, step
            assert found["a"][1:3] == (True, None) and found["b"][1:3] == (False, None), step
            for desk in desks:
                for name in found:
                    async with desk.request(name):
                        pass

    for step in range(1, steps):
        run_virtually(run(step))


async def found(desk: Desk, model: str) -> Version:
    version = await selected(desk, model, ADMIN)
    assert version is not None
    return version


def cut(desk: Desk) -> None:
    def refuse(operation: str, key: str) -> None:
        raise OSError("no route to host")

    desk.network.before = refuse  # type: ignore[attr-defined]


def mend(desk: Desk) -> None:
    network = desk.network  # type: ignore[attr-defined]
    network.before = network.after = lambda operation, key: None


@on_a_loop
async def test_what_was_uploaded_on_one_is_usable_on_the_other_at_once(folder: Path) -> None:
    async with servers(folder) as (one, two):
        await one.upload("poet", 1)
        assert (await found(two, "poet")).id == "poet@1"
        async with two.request("poet@1") as version:
            assert version.accepted is not None and two.is_on_device("poet@1")
        two_again, created = await two.upload("poet", 1)
        assert not created and two_again.active == 1


@on_a_loop
async def test_no_server_serves_the_old_version_after_the_answer(folder: Path) -> None:
    async with servers(folder, 3) as desks:
        one, two, three = desks
        await one.upload("poet", 1)
        await two.upload("poet", 2)
        for desk in desks:
            assert (await found(desk, "poet")).number == 2
        for number in (1, 2, 1):
            began = asyncio.get_running_loop().time()
            await three.patch("poet", active=number)
            assert asyncio.get_running_loop().time() - began >= LAG_S
            for desk in desks:
                assert (await found(desk, "poet")).number == number


@on_a_loop
async def test_a_restriction_holds_everywhere_after_the_answer(folder: Path) -> None:
    async with servers(folder) as (one, two):
        await one.upload("poet", 1)
        assert await selected(two, "poet", BOB) is not None
        await one.patch("poet", allowed_keys=["alice"])
        assert await selected(two, "poet", ALICE) is not None
        with pytest.raises(ModelNotFoundError):
            await selected(two, "poet", BOB)


@on_a_loop
async def test_a_deleted_version_ends_on_every_server_and_then_in_the_store(folder: Path) -> None:
    async with servers(folder) as (one, two):
        await one.upload("poet", 1, values=SMALL)
        await found(two, "poet")
        finished = asyncio.Event()

        async def stream() -> None:
            async with two.request("poet"):
                await finished.wait()

        running = asyncio.create_task(stream())
        await two.until(lambda: two.is_on_device("poet@1"))
        await one.service.delete("poet", None, ADMIN)
        with pytest.raises(ModelNotFoundError):
            await selected(two, "poet", ADMIN)
        await asyncio.sleep(10)
        assert two.is_on_device("poet@1"), "a running request may finish"
        finished.set()
        await running
        await asyncio.sleep(LAG_S + GRACE_S + Quotas().drain_timeout_s + 40)
        for desk in (one, two):
            assert not desk.registry.has("poet") and not desk.engine.on_device and not desk.engine.on_host
        assert not list(two.network.inner.list("blobs/"))  # type: ignore[attr-defined]
        assert (await two.upload("poet", 1, values=SMALL))[0].active == 2, "its number is not given again"


@on_a_loop
async def test_a_server_that_is_cut_off_admits_nobody_and_serves_on_what_runs(folder: Path) -> None:
    async with servers(folder) as (one, two):
        await one.upload("poet", 1)
        await one.upload("poet", 2)
        assert (await found(two, "poet")).number == 2
        async with two.request("poet"):
            cut(two)
            await asyncio.sleep(LAG_S + 1)
            with pytest.raises(StoreUnreachableError, match="the store does not answer"):
                await selected(two, "poet", ADMIN)
            assert await selected(two, "base", ADMIN) is None, "the base needs no store"
            await one.patch("poet", active=1)
            assert two.service.following.problem() is None
            await asyncio.sleep(GRACE_S)
            assert "has not answered for" in (two.service.following.problem() or "")
        mend(two)
        assert (await found(two, "poet")).number == 1
        assert two.service.following.problem() is None


@on_a_loop
async def test_quotas_and_if_active_are_decided_on_what_the_store_holds_by_then(folder: Path) -> None:
    async with servers(folder, quotas=Quotas(max_adapters=2)) as (one, two):
        await one.upload("a", 1)
        await one.upload("a", 2)
        results = await asyncio.gather(
            one.patch("a", active=1, if_active=2), two.patch("a", active=1, if_active=2), return_exceptions=True
        )
        assert sorted(isinstance(result, ActiveChangedError) for result in results) == [False, True]
        results = await asyncio.gather(
            *(desk.upload(f"{n}", n) for n, desk in enumerate((one, two))), return_exceptions=True
        )
        assert sorted(isinstance(result, QuotaExceededError) for result in results) == [False, True]


@on_a_loop
async def test_a_pin_is_kept_on_every_server(folder: Path) -> None:
    async with servers(folder) as (one, two):
        await one.upload("poet", 1)
        await one.patch("poet", pinned=True)
        await two.until(lambda: two.is_on_device("poet@1"))
        await two.patch("poet", pinned=False)
        await one.until(lambda: not one.scheduler.resident(one.ref("poet@1").key).pinned_by)  # type: ignore[union-attr]


@on_a_loop
async def test_many_wait_for_one_look(folder: Path) -> None:
    async with servers(folder) as (one, two):
        await one.upload("poet", 1)
        steps = len(two.network.steps)  # type: ignore[attr-defined]
        results = await asyncio.gather(
            *(selected(two, f"nobody-{n}", ADMIN) for n in range(200)), return_exceptions=True
        )
        assert all(isinstance(result, ModelNotFoundError) for result in results)
        assert len(two.network.steps) - steps <= 6  # type: ignore[attr-defined]


@on_a_loop
async def test_a_server_that_starts_again_has_everything(folder: Path) -> None:
    place = Bucket("memory:///")
    async with opened(folder, shared=log_store(place, folder / "a")) as desk:
        await desk.upload("poet", 1)
        await desk.upload("poet", 2)
        await desk.patch("poet", active=1, pinned=True)
        await desk.service.delete("poet", 2, ADMIN)
    async with opened(folder, shared=log_store(place, folder / "a")) as desk:
        assert (await found(desk, "poet")).number == 1 and desk.is_on_device("poet@1")
        await asyncio.sleep(LAG_S + GRACE_S + Quotas().drain_timeout_s + 5)
        assert [v.number for v in desk.registry.versions("poet")] == [1]


@pytest.mark.timeout(120)  # an event loop that is held ends in nothing else
@on_a_loop
async def test_who_asks_just_as_a_look_ends_asks_again(folder: Path) -> None:
    """The look is over and those who waited for it were not told yet: whoever comes then must not wait for it."""
    times = itertools.count()

    def clock() -> float:
        now = float(next(times))
        assert now < 100, "the event loop is held"
        return now

    answers = [asyncio.get_running_loop().create_future() for _ in range(2)]
    questions = iter(answers)
    follower = Follower(
        FakeStore(), take_nothing_over, lambda look: next(questions), clock, lag_s=2.0, grace_s=60.0, drain_s=0.0
    )
    early = asyncio.create_task(follower.fresh())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    answers[0].set_result(Look(set(), clock()))
    late = asyncio.create_task(follower.fresh())  # its first step follows the look's last one at once
    answers[1].set_result(Look(set(), 99.0))
    await asyncio.gather(early, late)
    assert next(questions, None) is None and follower.seen == 99.0


class FakeStore:
    def catch_up(self) -> Look:
        raise AssertionError("looks are answered by the test")


async def take_nothing_over(name: str) -> None: ...


@on_a_loop
async def test_a_request_waits_for_the_store_for_a_moment_only(folder: Path) -> None:
    async with servers(folder) as (one, two):
        await one.upload("poet", 1)
        assert (await found(two, "poet")).number == 1
        follower = two.following
        assert isinstance(follower, Follower)
        answers = follower._in_thread

        async def hang(work: Callable[[], Look]) -> Look:
            await asyncio.sleep(3600)
            return await answers(work)

        follower._in_thread = hang
        await asyncio.sleep(LAG_S + POLL_S)
        began = asyncio.get_running_loop().time()
        waiting = [selected(two, model, ADMIN) for model in ("poet", "poet@1", "painter")]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(each, StoreUnreachableError) and "has not caught up" in str(each) for each in results)
        assert asyncio.get_running_loop().time() - began == pytest.approx(WAIT_S)


@on_a_loop
async def test_a_name_whose_change_waits_for_another_holds_up_no_other_name(folder: Path) -> None:
    """A pinned adapter that is being loaded, and was changed again elsewhere: as after a release that is taken back."""
    async with servers(folder) as (one, two):
        await one.upload("poet", 1)
        await one.upload("painter", 2)
        await one.patch("poet", pinned=True)
        await two.until(lambda: two.is_on_device("poet@1"))
        two.engine.delays["prepare"] = 30
        await one.upload("poet", 3)
        await two.until(lambda: ("prepare", "poet@2") in two.engine.calls)
        await one.patch("poet", active=1)
        assert (await found(two, "painter")).number == 1
        with pytest.raises(StoreUnreachableError, match="waits for a change under way on this one"):
            await selected(two, "poet", ADMIN)
        assert two.following.names_behind() == 1
        await asyncio.sleep(31)
        assert (await found(two, "poet")).number == 1
        assert two.following.problem() is None and two.following.names_behind() == 0
        assert 0 <= (two.following.silent_s() or 0) <= LAG_S


@on_a_loop
async def test_what_is_being_loaded_stays_in_a_cache_that_is_too_small(folder: Path) -> None:
    """Both at once are more than it may have: the second to come does not take the place of the first."""
    async with servers(folder, cache_bytes=1) as (one, two):
        for seed, name in enumerate(("poet", "painter", "singer", "dancer")):
            await one.upload(name, seed)
        await two.following.fresh()
        two.engine.delays["prepare"] = 5
        network = two.network  # type: ignore[attr-defined]
        begun = len(network.steps)

        async def ask(name: str, after_s: float) -> None:
            await asyncio.sleep(after_s)
            async with two.request(name):
                pass

        await asyncio.gather(ask("poet", 0), ask("painter", 1), ask("singer", 2))
        assert sum(operation == "get_file" for operation, _ in network.steps[begun:]) == 6, "each came once"
        await ask("dancer", 0)
        here = [two.store.folder(two.ref(f"{name}@1").digest).exists() for name in ("poet", "painter", "singer")]
        assert here == [False] * 3, "once it is loaded, it may go"


@on_a_loop
async def test_a_copy_that_was_damaged_on_this_machine_is_fetched_again(folder: Path) -> None:
    async with servers(folder) as (one, two):
        await one.upload("poet", 1)
        await two.following.fresh()
        weights = two.store.fetch(two.ref("poet@1").digest) / WEIGHTS_FILE
        whole = weights.read_bytes()
        weights.write_bytes(bytes(len(whole)))
        two.engine.failures["prepare", "poet@1"] = 1  # which the engine finds out, by the digest
        async with two.request("poet"):
            assert weights.read_bytes() == whole
        await one.upload("painter", 2)
        await two.following.fresh()
        two.engine.failures["prepare", "painter@1"] = 1
        with pytest.raises(AdapterUnavailableError, match="told to fail"):
            async with two.request("painter"):
                pass
        assert two.engine.calls.count(("prepare", "painter@1")) == 1, "its files are whole: it fails for another reason"


@on_a_loop
async def test_an_upload_on_one_server_mends_damaged_files_on_all_and_under_every_name(folder: Path) -> None:
    place = Bucket("memory:///")
    async with opened(folder, shared=log_store(place, folder / "first")) as desk:
        await desk.upload("poet", 1)
        await desk.upload("double", 1)
    for lost in [each.key for each in place.list("blobs/")]:
        place.remove(lost)
    async with (
        opened(folder, shared=log_store(place, folder / "one")) as one,
        opened(folder, shared=log_store(place, folder / "two")) as two,
    ):
        for desk in (one, two):
            for name in ("poet", "double"):
                with pytest.raises(AdapterUnavailableError, match="its files are missing"):
                    async with desk.request(name):
                        pass
        assert (await one.upload("poet", 1))[1] is False
        for desk in (one, two):
            await desk.following.fresh()
            for name in ("poet", "double"):
                async with desk.request(name):
                    assert desk.is_on_device(f"{name}@1")
