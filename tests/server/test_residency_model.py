"""Any order of requests, cancellations, pins, loads, new and removed versions, failures: the scheduler keeps its
promises at every round of the loop, every waiter is served in bounded time, and nothing is left at the end."""

import asyncio
import logging
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

from adapters.ref import AdapterRef
from server.errors import AdapterDeletedError, ServerError
from server.residency.allocation import PATIENCE_S
from server.residency.state import GRACE_S
from server.residency.waiting import TURN_S
from tests.server.residency_world import FOREVER, Request, World, write_sizes
from tests.server.virtual_time import VirtualLoop

LONGEST_S = 3.0
SLOWEST_S = 0.3
ONE_AFTER_THE_OTHER_S = PATIENCE_S + LONGEST_S + GRACE_S + 4 * SLOWEST_S
"""What each of those who came before may cost at most: a drop, a read, an evict, a place, its patience, its run."""
PAUSES = st.sampled_from([0.0, 0.001, 0.05, 0.2, 1.0])


class SchedulerMachine(RuleBasedStateMachine):
    versions = Bundle("versions")
    asked = Bundle("asked")
    pins = Bundle("pins")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        write_sizes(Path(self.folder.name))
        self.loop = VirtualLoop(self.check)
        self.world: World | None = None
        self.tasks: list[asyncio.Task[Any]] = []
        self.before: dict[Request, int] = {}

    def check(self) -> None:
        if self.world is not None:
            self.world.check()

    @property
    def most_each(self) -> float:
        """Where the engine can be full, each may also cost a turn in which another key's sequence runs."""
        is_bounded = self.there.scheduler.capacity.sequences is not None
        return ONE_AFTER_THE_OTHER_S + (TURN_S + LONGEST_S if is_bounded else 0)

    def then(self, pause: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(pause))

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def ends() -> None:
            with suppress(ServerError):
                await work

        self.tasks.append(self.loop.create_task(ends()))
        return self.tasks[-1]

    @property
    def there(self) -> World:
        assert self.world is not None
        return self.world

    @initialize(
        target=versions,
        units=st.integers(2, 5),
        lora_slots=st.integers(0, 2),
        host=st.integers(0, 5),
        running=st.integers(1, 4),
        sequences=st.sampled_from([None, None, 1, 3]),
        delays=st.fixed_dictionaries(
            {name: st.sampled_from([0.0, 0.02, SLOWEST_S]) for name in ("prepare", "place", "evict", "drop", "forget")}
        ),
        sizes=st.lists(st.integers(1, 2), min_size=3, max_size=5),
    )
    def begin(
        self,
        units: int,
        lora_slots: int,
        host: int,
        running: int,
        sequences: int | None,
        delays: dict[str, float],
        sizes: list[int],
    ) -> Any:
        async def make() -> World:
            return World(Path(self.folder.name), units, lora_slots, host, running, sequences, **delays)

        self.world = self.loop.run_until_complete(make())
        return multiple(*(self.there.add("first", size) for size in sizes))

    @rule(target=versions, size=st.integers(1, 5), content=st.sampled_from(["", "", "x", "y"]), lora=st.booleans())
    def add(self, size: int, content: str, lora: bool) -> AdapterRef:
        capacity = self.there.scheduler.capacity
        if lora and capacity.lora_slots:
            return self.there.add("lora", 1, "", "LORA")
        return self.there.add("more", min(size, capacity.rows // 4), content)

    @rule(
        target=asked,
        adapter=versions,
        seconds=st.sampled_from([0.0, 0.05, 0.7, LONGEST_S]),
        timeout_s=st.sampled_from([FOREVER, FOREVER, 0.3]),
        count=st.integers(1, 3),
        pause=PAUSES,
    )
    def ask(self, adapter: AdapterRef, seconds: float, timeout_s: float, count: int, pause: float) -> Any:
        requests = [self.ask_once(adapter, seconds, timeout_s) for _ in range(count)]
        self.then(pause)
        return multiple(*requests)

    @rule(target=asked, seconds=st.sampled_from([0.05, LONGEST_S]), label=st.sampled_from("ab"), pause=PAUSES)
    def ask_the_base(self, seconds: float, label: str, pause: float) -> Any:
        request = self.there.ask(None, seconds, label=label)
        self.then(pause)
        return request

    def ask_once(self, adapter: AdapterRef, seconds: float, timeout_s: float) -> Request:
        ahead = sum(not task.done() for task in self.tasks)
        ahead += sum(request.task is not None and not request.task.done() for request in self.there.requests)
        request = self.there.ask(adapter, seconds, timeout_s)
        self.before[request] = ahead
        return request

    @rule(adapters=st.lists(versions, min_size=2, max_size=4), pause=PAUSES)
    def crowd(self, adapters: list[AdapterRef], pause: float) -> None:
        """Several come again and again for a while."""
        for _ in range(6):
            for adapter in adapters:
                self.ask_once(adapter, 0.5, FOREVER)
            self.then(0.3)
        self.then(pause)

    @rule(request=consumes(asked), pause=PAUSES)
    def cancel(self, request: Request, pause: float) -> None:
        self.there.cancel(request)
        self.then(pause)

    @rule(target=pins, adapter=versions, pause=PAUSES)
    def pin(self, adapter: AdapterRef, pause: float) -> Any:
        task = self.start(self.there.scheduler.pin(adapter))
        self.then(pause)
        return adapter, task

    @rule(pin=consumes(pins), pause=PAUSES)
    def unpin(self, pin: tuple[AdapterRef, asyncio.Task[None]], pause: float) -> None:
        adapter, task = pin
        task.cancel()
        self.loop.call_soon(self.there.scheduler.unpin, adapter)
        self.then(pause)

    @rule(adapter=versions, pause=PAUSES, is_cancelled=st.booleans())
    def load(self, adapter: AdapterRef, pause: float, is_cancelled: bool) -> None:
        task = self.start(self.there.scheduler.load(adapter))
        self.then(pause)
        if is_cancelled:
            task.cancel()

    @rule(adapter=consumes(versions), pause=PAUSES, is_cancelled=st.booleans())
    def remove(self, adapter: AdapterRef, pause: float, is_cancelled: bool) -> None:
        """As the service does it: what waits is ended first, or it would take the place of what runs, which is next."""
        self.loop.call_soon(self.there.scheduler.fail_waiters, adapter, AdapterDeletedError("deleted"))
        self.then(0.0)
        for request in self.there.requests:
            if request.adapter == adapter and request.is_admitted:
                self.there.cancel(request)
        self.then(0.0)
        self.then(0.0)
        task = self.start(self.there.scheduler.remove(adapter))
        self.then(pause)
        if is_cancelled:
            task.cancel()

    @rule(adapter=versions, operation=st.sampled_from(["prepare", "place", "evict", "drop"]))
    def fail_once(self, adapter: AdapterRef, operation: str) -> None:
        self.there.engine.failures[operation, adapter.name] = 1

    @rule(seconds=PAUSES)
    def go_down_for(self, seconds: float) -> None:
        self.there.engine.down = True
        self.then(seconds)
        self.there.engine.down = False

    @rule(pause=st.sampled_from([0.1, 0.6, 5.0]))
    def wait(self, pause: float) -> None:
        self.then(pause)

    def teardown(self) -> None:
        if self.world is None:
            return
        self.there.engine.failures.clear()
        unended = len(self.tasks) + len(self.there.requests)
        self.then(unended * self.most_each + LONGEST_S)
        assert all(request.task is not None and request.task.done() for request in self.there.requests)
        assert all(task.done() for task in self.tasks)
        for request, ahead in self.before.items():
            if request.is_admitted:
                assert request.waited <= (ahead + 1) * self.most_each, (request.waited, ahead)
        self.loop.run_until_complete(self.there.leave_nothing())
        self.loop.close()
        self.folder.cleanup()
        assert not self.loop.problems, self.loop.problems


logging.getLogger("server.residency.transfers").addFilter(lambda record: False)
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
