"""Owns what the server says once it answers: one line to paste."""

import asyncio
import sys
from argparse import Namespace

from starlette.datastructures import State

from server.registry import Registry


async def announce(state: State, args: Namespace, registry: Registry) -> None:
    """Wait until the HTTP server has started, then print the names served and a request to try."""
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(0.1)
    print(banner(args.host or "127.0.0.1", args.port, registry), file=sys.stderr, flush=True)


def banner(host: str, port: int, registry: Registry) -> str:
    """The text itself."""
    names = [version.name for version in registry.active()]
    model = names[0] if names else registry.base_names[0]
    url = f"http://{host}:{port}/v1"
    return (
        f"\nPERFT is serving at {url}: base {registry.base_names[0]!r} and {len(names)} adapters"
        f"{': ' + ', '.join(names) if names else ''}. Try:\n\n"
        f"  curl {url}/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 27 + 58?"}}]}}\'\n'
    )
