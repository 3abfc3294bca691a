"""Owns the host of `perft serve`: a process of the server's own. After SIGTERM, or the death of its engine, it admits
nothing new, lets running responses finish, then stops.

vLLM's own handler ends the engine at once; ours waits first and then hands over to it (as SIGINT).
"""

import asyncio
import logging
import math
import os
import shlex
import signal
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import State

from server.api.dependencies import Lifecycle, Services
from server.auth.keys import Caller
from server.engine.health import EngineHealth
from server.hosting.run import Run
from server.settings.model import Settings

POLL_S = 0.05
CLOSE_TIMEOUT_S = 5.0
"""Seconds that changes whose clients have left may take to finish."""
LAST_ANSWERS_S = 2.0
"""Seconds for which a server whose engine died still answers (503), so that probes and clients learn of it."""
LAST_RESPONSES_S = 5
"""Seconds that the server, once it ends, waits for responses that are not read and uploads that do not arrive."""

logger = logging.getLogger(__name__)


class SignalHandler:
    """Drains on SIGTERM and SIGHUP, for at most `limit_s` seconds, closes the services, then sends SIGINT."""

    def __init__(self, lifecycle: Lifecycle, limit_s: float, close: Callable[[], Awaitable[None]]) -> None:
        self._lifecycle, self._limit_s, self._close = lifecycle, limit_s, close
        self._until = math.inf
        self._tasks: list[asyncio.Task[None]] = []

    def install(self) -> None:
        """From now on SIGTERM drains, then ends the server. Call it on its loop, once vLLM's own handlers are set."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._start)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            loop.add_signal_handler(signal.SIGHUP, self._start)

    def watch(self, health: EngineHealth, died: Callable[[str], None]) -> None:
        """End the server once its engine died; `died` is then called with what died."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._end_with_engine(health, died)))

    def _start(self) -> None:
        if not self._lifecycle.is_draining:
            self._lifecycle.is_draining = True
            self._until = time.monotonic() + self._limit_s
            self._tasks.append(asyncio.get_running_loop().create_task(self._finish()))

    async def _end_with_engine(self, health: EngineHealth, died: Callable[[str], None]) -> None:
        death, lifecycle = await health.died(), self._lifecycle
        if lifecycle.is_draining and health.was_asked_to_end():
            return  # the signal went to all of the server's processes
        logger.critical("%s; the server ends", death)
        died(death)
        was_draining, lifecycle.is_draining = lifecycle.is_draining, True
        lifecycle.reason = f"{death}; retry on another server"
        self._until = min(self._until, time.monotonic() + LAST_ANSWERS_S)
        if not was_draining:
            await asyncio.sleep(LAST_ANSWERS_S)
            await self._finish()

    async def _finish(self) -> None:
        while self._lifecycle.responses_running and time.monotonic() < self._until:
            await asyncio.sleep(POLL_S)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._close()
        except Exception as error:  # whatever it is, the server ends; the store bears a kill at any moment
            logger.warning("the server ends with changes under way: %r", error)
        os.kill(os.getpid(), signal.SIGINT)


@dataclass
class ProcessHost:
    """See `server.hosting.host.Host`. args: of `perft serve`."""

    settings: Settings
    adapters: Sequence[str]
    args: Namespace
    run: Run
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def serving(self, state: State, services: Services) -> None:
        """See `Host.serving`."""
        drain = SignalHandler(services.lifecycle, self.settings.shutdown_timeout_s, services.close)
        drain.watch(services.engine_health, self.run.engine_died)
        self._tasks.append(asyncio.create_task(self._once_listening(state, drain, services)))

    async def _once_listening(self, state: State, drain: SignalHandler, services: Services) -> None:
        """Once the server listens (and vLLM's signal handlers are set): drain on SIGTERM, print the banner."""
        while not getattr(getattr(state, "server", None), "started", False):
            await asyncio.sleep(0.1)
        state.server.config.timeout_graceful_shutdown = LAST_RESPONSES_S
        drain.install()
        self.run.has_started = True
        print(banner(self.args, services, _bound_port(state.server, self.args.port)), flush=True)


def _bound_port(server: Any, asked: int) -> int:
    """The port that vLLM's uvicorn server listens on: the one asked for, or the free one that 0 asks for."""
    names = [sock.getsockname() for each in server.servers for sock in each.sockets]
    return next((name[1] for name in names if isinstance(name, tuple)), asked)


def banner(args: Namespace, services: Services, port: int) -> str:
    """What the server prints once it answers: the names served, and a request to paste."""
    scheme = "https" if args.ssl_certfile else "http"
    host = args.host or "127.0.0.1"
    where = url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if args.uds:
        where, url = args.uds, f"--unix-socket {shlex.quote(args.uds)} {scheme}://localhost/v1"
    base = services.base_names[0]
    names = [name for name, _ in services.registry.servable(Caller(None, is_admin=True))]
    shown = (": " if names else "") + ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    count = f"{len(names)} adapter" + ("s" if len(names) != 1 else "")
    key = " -H 'Authorization: Bearer KEY'" if services.keys.needs_key else ""
    has_page = services.settings.console and not args.uds
    page = f"The console, in a browser: {url.removesuffix('v1')}\n" if has_page else ""
    return (
        f"\nPERFT is serving at {where}: base {base!r} and {count}{shown}. Try:\n\n"
        f"  curl {url}/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{names[0] if names else base}", '
        f'"messages": [{{"role": "user", "content": "What is 27 + 58?"}}]}}\'\n\n{page}'
    )
