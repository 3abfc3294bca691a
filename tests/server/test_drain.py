"""The end of a server: what runs is finished, what is new is refused, and a real signal starts it."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api.dependencies import Lifecycle
from server.api.route_table import match
from server.hosting import process as process_module
from server.hosting.process import SignalHandler
from server.middleware.drain import DrainMiddleware
from tests.server.partial_services import partial_services

WAIT_S = 300.0


def on_a_real_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that is a coroutine. In real time: signals come from outside of the loop."""

    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


class App:
    """Answers once it is let; keeps what was sent."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.asked = 0
        self.error: BaseException | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        await self.let.wait()
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b"fine", "more_body": False})


async def ask(app: App, drain: Lifecycle | None, method: str = "POST", path: str = "/v1/completions") -> list[Message]:
    sent: list[Message] = []
    state = SimpleNamespace() if drain is None else SimpleNamespace(services=partial_services(lifecycle=drain))
    scope: dict[str, Any] = {
        "type": "http", "method": method, "path": path, "headers": [],
        "state": {"route": match(method, path)}, "app": SimpleNamespace(state=state),
    }  # fmt: skip

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await DrainMiddleware(app)(scope, receive, send)
    return sent


async def until(is_so: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.005)


class Interrupted:
    """Whether SIGINT came; vLLM's handler stands there in a real server."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.event.set)

    def leave(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)


async def closed() -> None:
    """Services that are closed at once."""


@pytest.mark.parametrize("ending", ["at once", "with an error", "never"])
def test_the_services_are_closed_before_the_server_ends(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(process_module, "CLOSE_TIMEOUT_S", 0.2)
    asked: list[str] = []

    async def close() -> None:
        asked.append(ending)
        if ending == "with an error":
            raise OSError("the disk is gone")
        if ending == "never":
            await asyncio.Event().wait()

    @on_a_real_loop
    async def test() -> None:
        interrupted = Interrupted()
        SignalHandler(Lifecycle(), 3600.0, close).install()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(interrupted.event.wait(), WAIT_S)
        assert asked == [ending]
        interrupted.leave()

    test()


@on_a_real_loop
async def test_a_signal_lets_what_runs_finish_and_then_ends_the_server() -> None:
    interrupted, drain, app = Interrupted(), Lifecycle(), App()
    SignalHandler(drain, 3600.0, closed).install()
    asked = [asyncio.create_task(ask(app, drain)) for _ in range(3)]
    await until(lambda: drain.responses_running == 3)
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: drain.is_draining)
    refused = await ask(app, drain)
    assert refused[0]["status"] == 503 and b'"engine_unavailable"' in refused[1]["body"] and app.asked == 3
    headers = dict(refused[0]["headers"])
    assert headers[b"connection"] == b"close" and headers[b"retry-after"]
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.2)
    assert not interrupted.event.is_set(), "responses are under way"
    app.let.set()
    for messages in await asyncio.gather(*asked):
        assert messages[0]["status"] == 200 and messages[1]["body"] == b"fine"
        assert (b"connection", b"close") in messages[0]["headers"] and (b"x", b"y") in messages[0]["headers"]
    await asyncio.wait_for(interrupted.event.wait(), WAIT_S)
    interrupted.leave()


@on_a_real_loop
async def test_the_limit_ends_the_wait() -> None:
    interrupted, drain, app = Interrupted(), Lifecycle(), App()
    SignalHandler(drain, 0.2, closed).install()
    asked = asyncio.create_task(ask(app, drain))
    await until(lambda: drain.responses_running == 1)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(interrupted.event.wait(), WAIT_S)
    assert drain.responses_running == 1
    interrupted.leave()
    app.let.set()
    await asked


@on_a_real_loop
async def test_with_nothing_under_way_it_ends_at_once() -> None:
    interrupted, drain = Interrupted(), Lifecycle()
    SignalHandler(drain, 3600.0, closed).install()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(interrupted.event.wait(), WAIT_S)
    interrupted.leave()


@on_a_real_loop
async def test_an_exception_and_a_cancellation_are_counted_out() -> None:
    drain, app = Lifecycle(), App()
    app.error = RuntimeError("the app's own")
    app.let.set()
    with pytest.raises(RuntimeError, match="the app's own"):
        await ask(app, drain)
    app.let.clear()
    asked = asyncio.create_task(ask(app, drain))
    await until(lambda: drain.responses_running == 1)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert drain.responses_running == 0


@on_a_real_loop
async def test_health_and_metrics_answer_while_draining_and_ready_does_not() -> None:
    drain, app = Lifecycle(), App()
    app.let.set()
    drain.is_draining = True
    for path, status in (("/health", 200), ("/metrics", 200), ("/ready", 503), ("/v1/models", 503)):
        messages = await ask(app, drain, "GET", path)
        assert messages[0]["status"] == status, path
        assert dict(messages[0]["headers"]).get(b"connection") == (b"close" if status == 503 else None)


@on_a_real_loop
async def test_before_the_server_is_put_together_everything_passes() -> None:
    app = App()
    app.let.set()
    messages = await ask(app, None)
    assert messages[0]["headers"] == [(b"x", b"y")]


@on_a_real_loop
async def test_other_scopes_pass() -> None:
    app = App()
    app.let.set()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    await DrainMiddleware(app)({"type": "lifespan"}, receive, send)
    assert len(sent) == 2
