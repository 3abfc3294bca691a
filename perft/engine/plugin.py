"""Owns the entry point of `vllm.general_plugins`: it runs in the API process, the engine core and every worker.

vLLM logs and swallows an exception raised while this module is IMPORTED, and then serves without PERFT; one raised
by `register()` stops the process. Invariant: this module imports the standard library only; all work is in
`register()`.
"""

import os

KILL_SWITCH = "PERFT_DISABLED"


def is_switched_off() -> bool:
    """Whether the environment disables PERFT."""
    return os.environ.get(KILL_SWITCH, "0").lower() not in ("", "0", "false")


def register() -> None:
    """Check every seam, then register our classes with vLLM. A second call in one process changes nothing.

    Raises SeamError if this vLLM is not the supported one, ForeignPackageError if another package has the name of one
    of ours. With PERFT_DISABLED=1 vLLM is left untouched.
    """
    if is_switched_off():
        return
    from perft.command import ForeignPackageError, check_packages
    from perft.engine.seams import check_seams

    try:
        check_packages(["adapters"])
    except ForeignPackageError as error:
        raise ForeignPackageError(f"{error}; or set {KILL_SWITCH}=1 to run vLLM without PERFT") from error
    check_seams()

    from perft.engine.layer_classes import install_layer_classes
    from perft.engine.make_manager import install_manager
    from perft.engine.nan_counts import install_nan_counts
    from perft.engine.parent import end_engines_with_parents, install_engine_core
    from perft.logs import log_as

    log_as("vllm", "perft")
    end_engines_with_parents()
    install_engine_core()
    install_layer_classes()
    install_manager()
    install_nan_counts()
