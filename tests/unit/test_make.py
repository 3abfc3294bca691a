"""`make test`: the kernels' tests beside the others; it fails when one of the two does, and leaves nothing running."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.server.processes import LIMIT_S, wait_until

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "python $*"
case "$*" in
  *tests/triton) {kernels} ;;
  *) {others} ;;
esac
"""


def make(folder: Path, kernels: str, others: str) -> subprocess.Popen[str]:
    """`make test` with a Python that does this instead of the tests, without what has to be there before."""
    python = folder / "python"
    python.write_text(PYTHON.format(kernels=kernels, others=others))
    python.chmod(0o755)
    ready = folder / "ready"
    ready.touch()
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text())
    return subprocess.Popen(
        ["make", "-o", "check", "-o", str(ready), "test", f"BIN={folder}", f"TRITON={folder}"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(("kernels", "others"), [(0, 0), (1, 0), (0, 1), (1, 2), (139, 0)])
def test_it_fails_when_one_of_the_two_does(tmp_path: Path, kernels: int, others: int) -> None:
    done = make(tmp_path, f"echo of kernels; exit {kernels}", f"echo of others; exit {others}")
    output, _ = done.communicate(timeout=LIMIT_S)
    assert (done.returncode == 0) == (kernels == others == 0), output
    assert "of others" in output and "of kernels" in output


def test_they_run_beside_each_other(tmp_path: Path) -> None:
    """Each waits for the other one's file."""
    meet = "touch {mine}; while [ ! -e {other} ]; do sleep 0.05; done"
    done = make(tmp_path, meet.format(mine="a", other="b"), meet.format(mine="b", other="a"))
    output, _ = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, output


def test_ctrl_c_ends_both(tmp_path: Path) -> None:
    done = make(tmp_path, "touch kernels; exec sleep 1000", "touch others; exec sleep 1000")
    wait_until(lambda: (tmp_path / "kernels").exists() and (tmp_path / "others").exists())
    started = psutil.Process(done.pid).children(recursive=True)
    os.killpg(done.pid, signal.SIGINT)
    done.communicate(timeout=LIMIT_S)
    assert done.returncode != 0
    wait_until(lambda: not any(each.is_running() for each in started))
