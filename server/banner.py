"""Owns what the server says once it answers: one request to paste."""

from argparse import Namespace

from server.keys import Caller
from server.runtime import Runtime


def banner(args: Namespace, runtime: Runtime) -> str:
    """The names served and a request to try."""
    host = args.host or "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{args.port}/v1"
    catalog, base = runtime.catalog, runtime.base_names[0]
    names = [name for name, _ in catalog.servable(Caller(None, is_admin=True))]
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    keys = runtime.settings.key_ring
    key = " -H 'Authorization: Bearer KEY'" if keys.needs_key else ""
    return (
        f"\nPERFT is serving at {url}: base {base!r} and {len(names)} adapters{': ' + shown if names else ''}. Try:\n\n"
        f"  curl {url}/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{names[0] if names else base}", '
        f'"messages": [{{"role": "user", "content": "What is 27 + 58?"}}]}}\'\n'
    )
