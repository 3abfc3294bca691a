"""Uploads of the two files of a random adapter, as a client sends them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from fastapi.testclient import TestClient

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from tests.server.fakes import BASE
from tests.synthetic import RANDOM_R, write_adapter

Upload = Callable[..., httpx.Response]
"""(name, seed of the content, config=values that differ, **other fields of the form) -> the response"""


def uploader(client: TestClient, folder: Path) -> Upload:
    """What uploads through `client`; the contents are written in `folder`."""

    def send(name: str, seed: int, config: Mapping[str, Any] = MappingProxyType({}), **fields: str) -> httpx.Response:
        content = write_adapter(folder / f"given-{seed}", BASE, seed, RANDOM_R | dict(config))
        parts = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}
        files = {part: (file, (content / file).read_bytes()) for part, file in parts.items()}
        return client.post("/v1/adapters", data={"name": name, **fields}, files=files)

    return send
