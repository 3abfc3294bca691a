"""`python -m server.demo`: builds the demo base once, then serves it with the demo's adapters (`make serve`)."""

import argparse
import os
import secrets
import socket
import sys
from pathlib import Path

from server.demo.base.build import build, cache_folder, default_folder
from server.demo.errors import DemoError

ADAPTERS = Path(__file__).parent / "adapters"
BASE_NAME = "demo-base"
# The KV cache takes 1 GiB, and only what a newcomer must read is printed.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library.triton",
    "PYTHONWARNINGS": "ignore",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m server.demo", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    port: int = parser.parse_args().port
    try:
        check_port(port)
        folder = default_folder()
        build(folder)
    except DemoError as error:
        print(f"perft: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PERFT_ADAPTER_STORE", str(cache_folder() / "demo-store"))
    print(f"perft: the adapter store is {os.environ['PERFT_ADAPTER_STORE']}", flush=True)
    make_admin_key(port)
    print("perft: starting the engine (30 to 60 seconds)", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "server.cli", *serve_arguments(folder, port)])


def serve_arguments(base: Path, port: int) -> list[str]:
    """The `perft serve` command of the demo."""
    arguments = base_arguments(base, port)
    for adapter in sorted(path for path in ADAPTERS.iterdir() if path.is_dir()):
        arguments += ["--adapter", f"{adapter.name}={adapter}"]
    return arguments


def base_arguments(base: Path, port: int) -> list[str]:
    """The same, without the adapters."""
    arguments = ["serve", str(base), "--served-model-name", BASE_NAME, "--port", str(port)]
    return [*arguments, "--dtype", "float32", "--max-model-len", "2048"]


def make_admin_key(port: int) -> None:
    """Unless the environment has an admin key, make one for this run; print how to use it."""
    if "PERFT_ADMIN_KEY" in os.environ or "PERFT_ADMIN_KEY_FILE" in os.environ:
        print("perft: the admin key is the one of this environment", flush=True)
        return
    key = os.environ["PERFT_ADMIN_KEY"] = secrets.token_urlsafe(24)
    print(
        f"perft: the admin key of this run, for every change to adapters and for GET /metrics; in another shell:\n\n"
        f"  export PERFT_SERVER=http://127.0.0.1:{port}\n"
        f"  export PERFT_ADMIN_KEY={key}\n"
        "  .venv/bin/perft adapters list\n",
        flush=True,
    )


def check_port(port: int) -> None:
    """Raises DemoError if the port is taken: better now than after minutes of building."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DemoError(
                f"port {port} is taken: stop the program that listens on it, or run `make serve PORT=...`"
            ) from error


if __name__ == "__main__":
    main()
