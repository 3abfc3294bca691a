"""Owns `perft ray up`: our application on a Ray cluster, with progress while replicas start, until it is stopped."""

import logging
import os
import pkgutil
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import yaml

from server.errors import StartError
from server.ray_serve.needs import ADVISED, SWITCHES

POLL_S = 1.0
EVERY_S = 15.0
"""Seconds after which a start that goes on says so again."""
REASON_LINES = 12


def run(arguments: list[str]) -> int:
    """Run `perft ray ...`; returns the exit status."""
    parser = ArgumentParser(prog="perft ray", description="Many replicas of the server, under Ray Serve.")
    up = parser.add_subparsers(dest="command", required=True).add_parser(
        "up",
        help="run the application of a Ray Serve config file, on the cluster that RAY_ADDRESS names or on one here",
    )
    up.add_argument("config", type=Path, metavar="CONFIG", help="see deploy/ray/demo.yaml")
    parsed = parser.parse_args(arguments)
    try:
        return _up(read_config(parsed.config))
    except StartError as error:
        print(f"perft: {error.headline}:\n{error}", file=sys.stderr, flush=True)
        return 1


def read_config(path: Path) -> dict[str, Any]:
    """The config file. Raises StartError."""
    try:
        config: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise StartError(f"{path}: cannot be read ({error})") from error
    found = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise StartError(f"{path}: expected a Ray Serve config file with one application, as deploy/ray/demo.yaml")
    return dict(config)


def _up(config: dict[str, Any]) -> int:
    os.environ.update({**ADVISED, **os.environ, **SWITCHES})
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise StartError(f"found no Ray ({error}): pip install 'perft-server[ray]'") from error

    [given] = config["applications"]
    logging.getLogger("ray").setLevel(logging.WARNING)
    print("perft: Ray starts", flush=True)
    try:
        ray.init(log_to_driver=False, logging_level="warning")
    except (ValueError, RuntimeError, OSError) as error:
        raise StartError(f"Ray did not start, or does not answer at RAY_ADDRESS: {error}") from error
    asked_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has set its own
        signal.signal(number, lambda *_: asked_to_end.set())
    name = given.get("name", "perft")
    try:
        target = serve.RunTarget(build(given), name=name, route_prefix=given.get("route_prefix", "/"))
        try:
            serve.start(http_options=config.get("http_options"))
            serve.run_many([target], wait_for_applications_running=False)
        except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            raise StartError(f"Ray Serve did not start:\n{reason_of(str(error))}") from error
        if not _wait_until_running(name, asked_to_end):
            return 0
        options = config.get("http_options") or {}
        print(_banner(options, given), flush=True)
        _watch(name, asked_to_end)
    finally:
        print("perft: the replicas end", flush=True)
        serve.shutdown()
        ray.shutdown()
    return 0


def build(given: dict[str, Any]) -> Any:
    """The application of a config file, as `serve run` makes it. Raises StartError."""
    try:
        builder = pkgutil.resolve_name(given["import_path"])
    except (KeyError, ValueError, ImportError, AttributeError) as error:
        raise StartError(
            f"import_path: cannot be imported ({error!r}), expected server.ray_serve.application:build"
        ) from error
    return builder(given.get("args") or {})


def _wait_until_running(name: str, asked_to_end: threading.Event) -> bool:
    """Print what becomes of the replicas. Returns whether all run; False if the start was interrupted. Raises
    StartError with the reason if they cannot start."""
    began = said_at = time.monotonic()
    said = ""
    while not asked_to_end.wait(POLL_S):
        state, replicas, reason = _look(name)
        if state == "RUNNING":
            return True
        if reason:
            raise StartError(f"a replica did not start:\n{reason}")
        now = time.monotonic()
        if replicas != said or now - said_at > EVERY_S:
            print(f"perft: {replicas} ({now - began:.0f} s)", flush=True)
            said, said_at = replicas, now
    return False


def _watch(name: str, asked_to_end: threading.Event) -> None:
    """Print what changes, until the application is to end."""
    said = _look(name)[1]
    while not asked_to_end.wait(POLL_S):
        _, replicas, reason = _look(name)
        if replicas != said:
            print(f"perft: {replicas}" + (f"\n{reason}" if reason else ""), flush=True)
            said = replicas


def _look(name: str) -> tuple[str, str, str]:
    """The application's state, its replicas in words and what they wait for, and why one did not start ("": none)."""
    from ray import serve

    found = serve.status().applications.get(name)
    if found is None:
        return "", "the application is being deployed", ""
    servers = [each for title, each in found.deployments.items() if title.startswith("PerftServer")]
    counts = {str(getattr(s, "value", s)): n for each in servers for s, n in each.replica_states.items()}
    words = ", ".join(f"{count} {state.lower()}" for state, count in sorted(counts.items())) or "none yet"
    messages = [each.message for each in servers]
    waits = "".join(f"; {text}" for text in messages if "to be scheduled" in text)
    failed = [text for text in messages if "failed to start" in text.lower()]
    if found.status.value == "DEPLOY_FAILED":
        failed.append(found.message)
    return found.status.value, f"replicas: {words}{waits}", next((reason_of(text) for text in failed if text), "")


def reason_of(message: str) -> str:
    """The end of a traceback that Ray passes on: our own words, where they are ours."""
    lines = message.strip().splitlines()
    ours = next((n for n, line in enumerate(lines) if "StartError: " in line), None)
    return "\n".join(
        lines[-REASON_LINES:] if ours is None else [lines[ours].partition("Error: ")[2], *lines[ours + 1 :]]
    )


def _banner(options: dict[str, Any], given: dict[str, Any]) -> str:
    host, port = options.get("host", "127.0.0.1"), options.get("port", 8000)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/v1"
    base = (given.get("args") or {}).get("name")
    return (
        f"\nPERFT is serving at {url}: base {base!r} and the adapters of its store. Try:\n\n"
        f"  curl {url}/models -H 'Authorization: Bearer KEY'\n"
    )
