"""The plugin's entry point: takes effect once, a second call changes nothing, and the kill switch is really off."""

import subprocess
import sys

import pytest

SAY = """
from perft.engine.plugin import register
register(); register()
from vllm.model_executor.custom_op import op_registry_oot
from vllm.v1.worker import lora_model_runner_mixin
print(sorted(op_registry_oot), lora_model_runner_mixin.LRUCacheWorkerLoRAManager.__name__)
"""


REPLACED = "GptOssRoutedExperts MoERunner RoutedExperts TransformersMoERunner TransformersRoutedExperts"


@pytest.mark.parametrize(
    ("switch", "expected"), [("0", f"{REPLACED.split()} make_manager"), ("1", "[] LRUCacheWorkerLoRAManager")]
)
def test_register(switch: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFT_DISABLED", switch)
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == expected
