"""When a load that is asked for again is the same load, and when it is the next one."""

import asyncio
from pathlib import Path
from typing import Any

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from server.auth.keys import Caller
from server.sources.fetching import FetchLimits
from server.sources.loading import AdapterSources
from server.sources.place import parse_place

ADMIN = Caller(None, True)


class Uploads:
    """Takes what was fetched; `until` lets an upload end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.until = folder, list[bytes](), asyncio.Event()

    def stage(self) -> Path:
        staged = self.folder / f"staged-{len(list(self.folder.iterdir()))}"
        staged.mkdir()
        return staged

    def discard(self, staged: Path) -> None:
        for file in staged.iterdir():
            file.unlink()

    async def upload(self, name: str, folder: Path, *_: Any, **__: Any) -> tuple[None, bool]:
        self.seen.append((folder / CONFIG_FILE).read_bytes())
        await self.until.wait()
        return None, True


def write(folder: Path, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).write_bytes(content)


def test_what_was_changed_after_a_load_began_is_loaded_by_the_next_one(tmp_path: Path) -> None:
    """A trainer whose first call timed out, and which has written the next step since."""
    place, staging = tmp_path / "policy", tmp_path / "staging"
    staging.mkdir()

    async def test() -> None:
        uploads = Uploads(staging)
        sources = AdapterSources([parse_place(str(tmp_path))], uploads, FetchLimits(2**20, 60.0, 60.0), 4, print)
        found = sources.allowed(str(place))

        def load() -> asyncio.Task[None]:
            return asyncio.create_task(sources.load("policy", found, ADMIN, replaces=True))

        write(place, b"step 2")
        first = [load() for _ in range(3)]
        while not uploads.seen:
            await asyncio.sleep(0.01)
        write(place, b"step 3")
        later = [load() for _ in range(3)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in (*first, *later))
        uploads.until.set()
        await asyncio.gather(*first, *later)
        assert uploads.seen == [b"step 2", b"step 3"]
        await asyncio.gather(load(), load())
        assert len(uploads.seen) == 3, "and what ended is forgotten"
        await sources.close()

    asyncio.run(test())
