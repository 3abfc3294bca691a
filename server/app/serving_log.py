"""Owns what vLLM's handlers leave in the log of a request that fails: no traceback of a client's mistake, one with the
request's ID of anything else.

Invariant: a traceback is left out only where the response says why the request failed.
"""

import logging

from vllm.entrypoints.serve import create_error_response

from server.inference.request_context import CURRENT

LIBRARY = "vllm"
OURS = ("server", "perft", "adapters")


class ServingLogFilter(logging.Filter):
    """For handlers of vLLM's logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = CURRENT.get()
        error = record.exc_info[1] if record.exc_info else None
        if context is None or error is None:
            return True
        if context.failure is not None or context.refusal is not None:
            return False
        is_in_stream = "stream" in record.funcName  # the parameters are accepted by then: no mistake of the client's
        if isinstance(error, Exception) and not is_in_stream and create_error_response(error).error.code < 500:
            return False
        prefix = f"request {context.caller.request_id}: "
        if not str(record.msg).startswith(prefix):  # several handlers may see it
            record.msg = f"{prefix}{record.msg}"
        return True


SERVING = ServingLogFilter()


def install() -> None:
    """Filter what vLLM logs from now on, wherever its records are handled, and keep our own warnings: a library that
    vLLM imports raises the root logger's level to ERROR."""
    for name in OURS:
        if (ours := logging.getLogger(name)).level == logging.NOTSET:
            ours.setLevel(logging.WARNING)
    logger: logging.Logger | None = logging.getLogger(LIBRARY)
    while logger is not None:
        for handler in logger.handlers:
            handler.addFilter(SERVING)
        logger = logger.parent if logger.propagate else None
