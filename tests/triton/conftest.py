"""The Triton back end's tests run in a process of their own: `make test` starts it.

With TRITON_INTERPRET=1 they run on the CPU, under Triton's interpreter; without it, on a GPU (`pytest -m gpu`), where
every test of this folder needs one. Where Triton is not to be had nothing is collected, so that naming this folder
alone is an error (no test ran), and where it was asked for, by TRITON_INTERPRET, it is a failure. `test_reads.py` needs
the interpreter, which sees every address.
"""

import importlib.util

import pytest
import torch

from tests.triton.device import IS_INTERPRETED

IS_INSTALLED = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if IS_INSTALLED else ["test_*.py"]
collect_ignore = [] if IS_INTERPRETED else ["test_reads.py"]

if IS_INTERPRETED and not IS_INSTALLED:
    raise pytest.UsageError(
        "found no triton, expected it in .triton: `make test` installs it (requirements/triton.txt)"
    )
if IS_INTERPRETED:
    from perft.operator.gpu import backend as triton_backend
    from tests.triton import interpreter

    interpreter.mend()
    triton_backend.SHRINK_PROGRAMS = 64  # those that find nothing to do cost the interpreter most of its time


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the interpreter every test needs a GPU; with it, those that are about a GPU are left out."""
    here = [item for item in items if "tests/triton/" in item.nodeid]
    for item in here:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))  # NumPy's, of infinities
        if not IS_INTERPRETED:
            item.add_marker(pytest.mark.gpu)
    if IS_INTERPRETED or not torch.cuda.is_available():
        left_out = [item for item in here if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
