"""Owns what a server and the process that it runs in know of each other: `perft serve`, or another host of vLLM's app.

A host calls `prepare` (app/serve.py), puts itself onto the arguments as `perft_host`, builds vLLM's app with them and
has our endpoint plugin initialized. Signals, exit statuses and listeners are the host's own.
"""

from collections.abc import Sequence
from typing import Protocol

from starlette.datastructures import State

from server.api.dependencies import Services
from server.settings.model import Settings

HOST_ARGUMENT = "perft_host"
"""The attribute of vLLM's arguments that holds the host."""


class Host(Protocol):
    """settings: of this server. adapters: NAME=PATH, each to be served from the start."""

    settings: Settings
    adapters: Sequence[str]

    def serving(self, state: State, services: Services) -> None:
        """Called on the server's loop once it admits requests.

        From now on the host ends the server, when it was asked to or `services.engine_health.died` returns: it sets
        `services.lifecycle.is_draining`, waits for `responses_running`, and awaits `services.close`.
        """
