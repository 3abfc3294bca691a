"""The openai clients, Python and JavaScript: each runs its contract program against one real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.fetch import program
from integration.target import Target
from tests.server.processes import LIMIT_S

HERE = Path(__file__).parent
CHECKS = 7


def contract(language: str) -> list[str]:
    if language == "python":
        return [sys.executable, str(HERE / "python_contract.py")]
    return [str(program("node")), str(HERE / "js" / "contract.mjs")]


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_the_openai_client(target: Target, language: str) -> None:
    done = subprocess.run(
        contract(language), env={**os.environ, **target.environment()}, capture_output=True, text=True, check=False,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == CHECKS, done.stdout
