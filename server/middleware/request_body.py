"""Owns how long the body of a request may take, and whether its client went away before it was complete.

Invariant: an app that reads the body of a request waits for it no longer than the limits; uploads have their own.
"""

import asyncio
from typing import Protocol

from starlette.types import Message, Receive

from server.api.error_responses import as_api_error
from server.errors import RequestTimeoutError


class BodyLimits(Protocol):
    """The settings: seconds for the whole body, and between two arrivals."""

    @property
    def body_timeout_s(self) -> float: ...

    @property
    def body_idle_timeout_s(self) -> float: ...


class RequestBody:
    """The `receive` of one request. limits: None if its reader has its own. is_cut_off: the client went away."""

    def __init__(self, receive: Receive, limits: BodyLimits | None) -> None:
        self._receive, self._limits = receive, limits
        self._end: float | None = None
        self._is_complete = False
        self.is_cut_off = False

    async def __call__(self) -> Message:
        """The next message. Raises ApiError if it does not come in time."""
        if self._is_complete:
            return await self._receive()
        message = await (self._receive() if self._limits is None else self._in_time(self._limits))
        self.is_cut_off = message["type"] == "http.disconnect"
        self._is_complete = not message.get("more_body", False)
        return message

    async def _in_time(self, limits: BodyLimits) -> Message:
        now = asyncio.get_running_loop().time()
        self._end = self._end or now + limits.body_timeout_s
        try:
            async with asyncio.timeout_at(min(self._end, now + limits.body_idle_timeout_s)):
                return await self._receive()
        except TimeoutError:
            message = (
                f"the body was too slow: at most {limits.body_idle_timeout_s:g} s between two arrivals and "
                f"{limits.body_timeout_s:g} s in all are allowed"
            )
            raise as_api_error(RequestTimeoutError(message)) from None
