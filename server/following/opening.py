"""Owns opening the store that the settings name, and following it where other servers change it too."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

from adapters.errors import StoreError
from adapters.ref import AdapterRef
from adapters.store import Store, Timing, open_store
from adapters.store.log.log import clock
from adapters.store.log.store import LogStore
from server.engine.protocol import AdapterLoadError, ReadFiles
from server.errors import StartError
from server.following.follower import Follower
from server.following.following import Following
from server.settings.model import Settings

FETCH_THREADS = 4
T = TypeVar("T")


class Followers(Protocol):
    """What is brought up to what others changed (registry/service)."""

    following: Following

    async def take_over(self, name: str) -> None: ...


async def open_store_of(settings: Settings) -> Store:
    """Raises StartError."""
    opening = partial(
        open_store, settings.adapter_store, settings.adapter_cache,
        cache_bytes=settings.adapter_cache_bytes, writer=socket.gethostname(),
        timing=Timing(store_lag_s=settings.store_lag_s, store_grace_s=settings.store_grace_s),
    )  # fmt: skip
    try:
        return await asyncio.get_running_loop().run_in_executor(None, opening)
    except StoreError as error:
        raise StartError(f"--adapter-store: {error}") from error


def reading(store: Store) -> ReadFiles:
    """How the engine reads an adapter's files: they are brought to this machine, and kept there meanwhile. A copy that
    was damaged here is brought again. Raises AdapterLoadError."""
    threads = ThreadPoolExecutor(FETCH_THREADS, "perft-fetch")

    async def on_thread(work: Callable[[str], T], adapter: AdapterRef) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work, adapter.digest)
        except StoreError as error:
            raise AdapterLoadError(str(error)) from error

    async def read(adapter: AdapterRef, load: Callable[[AdapterRef], Awaitable[None]]) -> None:
        with store.used(adapter.digest):
            if not store.folder(adapter.digest).is_dir():
                await on_thread(store.fetch, adapter)
            try:
                await load(adapter)
            except AdapterLoadError:
                if not await on_thread(store.renew, adapter):
                    raise
                await load(adapter)

    return read


def make_follower(store: Store, adapters: Followers, settings: Settings) -> Follower | None:
    """What follows the changes of others in a shared store, not started; None for another store."""
    if not isinstance(store, LogStore):
        return None
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "perft-follow")
    follower = Follower(
        store, adapters.take_over, partial(loop.run_in_executor, thread), clock,
        settings.store_lag_s, settings.store_grace_s, settings.drain_timeout_s,
    )  # fmt: skip
    adapters.following = follower
    return follower


async def start_following(follower: Follower | None) -> None:
    """Once this server knows what the store held when it was opened. Raises StartError."""
    if follower is None:
        return
    try:
        await follower.start()
    except StoreError as error:
        raise StartError(f"--adapter-store: {error}") from error
