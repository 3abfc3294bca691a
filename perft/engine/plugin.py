"""Entry point of `vllm.general_plugins`: runs in the API process, the engine core and every worker.

vLLM logs and swallows an exception raised while this module is IMPORTED, and then serves without us; one raised by
`register()` stops the process. So this module imports the standard library only, and all work is in `register()`.
"""

import os

KILL_SWITCH = "PERFT_DISABLED"


def is_switched_off() -> bool:
    return os.environ.get(KILL_SWITCH, "0").lower() not in ("", "0", "false")


def register() -> None:
    """Check every seam, then put our classes in their places. A second call in one process does nothing.

    Raises SeamError if this vLLM is not the supported one. With PERFT_DISABLED=1 nothing at all is touched.
    """
    if is_switched_off():
        return
    from perft.engine.seams import check_seams

    check_seams()

    from perft.engine.manager import install_manager
    from perft.engine.moe_layer import install_moe_runner

    install_moe_runner()
    install_manager()
