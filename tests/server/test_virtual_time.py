"""The clock of the tests: it stands still while anybody works, in a thread too, and jumps when everybody waits."""

import asyncio
import threading

import pytest

from tests.server.virtual_time import run_virtually


def test_hours_pass_in_a_moment_and_in_order() -> None:
    async def main() -> list[int]:
        woken: list[int] = []

        async def sleep(hours: int) -> None:
            await asyncio.sleep(3600 * hours)
            woken.append(hours)

        began = asyncio.get_running_loop().time()
        await asyncio.gather(*map(sleep, (3, 1, 2)))
        assert asyncio.get_running_loop().time() - began == pytest.approx(3 * 3600)
        return woken

    assert run_virtually(main()) == [1, 2, 3]


def test_work_in_a_thread_takes_no_time() -> None:
    """A timer that is due in a microsecond waits for work that somebody began before it."""

    async def main() -> list[str]:
        told: list[str] = []
        may_end = threading.Event()

        def work() -> None:
            assert may_end.wait(300)
            told.append("work")

        async def timer() -> None:
            await asyncio.sleep(1e-6)
            told.append("timer")

        working, timing = asyncio.create_task(asyncio.to_thread(work)), asyncio.create_task(timer())
        await asyncio.sleep(0)
        threading.Timer(0.2, may_end.set).start()
        began = asyncio.get_running_loop().time()
        await working
        assert asyncio.get_running_loop().time() == began
        await timing
        return told

    assert run_virtually(main()) == ["work", "timer"]


def test_a_call_that_nobody_waits_for_any_more_still_holds_the_clock() -> None:
    async def main() -> None:
        may_end, ended = threading.Event(), threading.Event()

        def work() -> None:
            assert may_end.wait(300)
            ended.set()

        waiting = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.sleep(0)
        waiting.cancel()
        threading.Timer(0.2, may_end.set).start()
        await asyncio.sleep(1)
        assert ended.is_set()

    run_virtually(main())


def test_a_wait_for_what_can_never_come_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="never come"):
        run_virtually(main())
