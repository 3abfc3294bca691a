"""Owns what the server says once it answers: one request to paste."""

import shlex
from argparse import Namespace

from server.app.services import Runtime
from server.auth.keys import Caller


def banner(args: Namespace, runtime: Runtime) -> str:
    """The names served and a request to try."""
    scheme = "https" if args.ssl_certfile else "http"
    host = args.host or "127.0.0.1"
    where = url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}/v1"
    if args.uds:
        where, url = args.uds, f"--unix-socket {shlex.quote(args.uds)} {scheme}://localhost/v1"
    catalog, base = runtime.catalog, runtime.base_names[0]
    names = [name for name, _ in catalog.servable(Caller(None, is_admin=True))]
    shown = (": " if names else "") + ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    keys = runtime.settings.key_ring
    key = " -H 'Authorization: Bearer KEY'" if keys.needs_key else ""
    return (
        f"\nPERFT is serving at {where}: base {base!r} and {len(names)} adapters{shown}. Try:\n\n"
        f"  curl {url}/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{names[0] if names else base}", '
        f'"messages": [{{"role": "user", "content": "What is 27 + 58?"}}]}}\'\n'
    )
