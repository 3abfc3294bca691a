"""Owns which switches Ray needs, in every process that it starts, for what we build on. Imports no Ray: it reads them
when it is imported."""

import os

from server.errors import StartError

SWITCHES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
}
"""HAProxy in front, which talks to the replicas themselves; the router reads which model a request asks for."""

ADVISED = {"RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S": "60"}
"""Seconds within which a request's body, or its first 8 MiB, has to be with HAProxy; Ray's 5 refuse slow uploads."""


def check_switches() -> None:
    """Raises StartError unless Ray was started with them."""
    lacking = [f"{name}={value}" for name, value in SWITCHES.items() if os.environ.get(name) != value]
    if lacking:
        raise StartError(
            f"found Ray without {' '.join(lacking)}, expected them in the environment of every `ray start` (and of "
            "`serve run`): without them Ray hides the replicas behind a proxy of its own; `perft ray up` sets them"
        )
