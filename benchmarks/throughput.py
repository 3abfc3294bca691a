"""Tokens per second with 0, 1, 8 and 32 different adapters in the batch, on the demo base (`make bench`).

One engine, rounds interleaved (0, 1, 8, 32, 0, 1, ...), because machines drift: compare the ratio to the base
of the same round. Adapters: R, M 4, K 2, bottleneck 16, all layers, random weights.

    python benchmarks/throughput.py [--rounds 5] [--tokens 32] [--output FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONCURRENCY = (8, 32)
ADAPTERS = (0, 1, 8, 32)


def start_engine(base: Path) -> Any:
    """The engine as `make serve` starts it, without prefix caching (prompts repeat)."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    return LLM(
        model=str(base), dtype="float32", enforce_eager=True, enable_lora=True, max_loras=64, max_model_len=512,
        gpu_memory_utilization=0.5, enable_prefix_caching=False, disable_log_stats=True,
        worker_extension_cls="perft.engine.worker.PerftWorkerExtension",
    )  # fmt: skip


def make_adapters(llm: Any, folder: Path) -> list[Any]:
    """32 different random adapters, loaded."""
    from vllm.lora.request import LoRARequest

    from server.engine.vllm import base_shape_of
    from tests.synthetic import write_adapter

    base = base_shape_of(llm.collective_rpc("perft_status")[0]["base"])
    requests = [
        LoRARequest(f"bench-{n}@1", n + 1, str(write_adapter(folder / str(n), base, n))) for n in range(max(ADAPTERS))
    ]
    for request in requests:
        llm.llm_engine.add_lora(request)
    return requests


def measure(llm: Any, requests: list[Any], concurrency: int, adapters: int, tokens: int) -> float:
    """Output tokens per second of `concurrency` requests at once, taking turns over `adapters` adapters."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [1 + (7 * i + j) % 4000 for j in range(24)]} for i in range(concurrency)]
    loras = [requests[i % adapters] if adapters else None for i in range(concurrency)]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
    seconds = time.perf_counter() - began
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def table(found: dict[tuple[int, int], list[float]]) -> str:
    """Median and range of tokens per second, and of the ratio to the base of the same round."""
    lines = ["| requests | adapters | tok/s, median (range) | against the base, median (range) |", "|---|---|---|---|"]
    for (concurrency, adapters), speeds in found.items():
        ratios = [speed / base for speed, base in zip(speeds, found[concurrency, 0], strict=True)]
        lines.append(f"| {concurrency} | {adapters} | {summary(speeds, 1)} | {summary(ratios, 2)} |")
    return "\n".join(lines)


def summary(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="write the raw numbers there, as JSON")
    options = parser.parse_args()

    from server.demo.base.build import build, default_folder

    base = default_folder()
    build(base)
    llm = start_engine(base)
    with tempfile.TemporaryDirectory() as folder:
        requests = make_adapters(llm, Path(folder))
    found: dict[tuple[int, int], list[float]] = {(c, a): [] for c in CONCURRENCY for a in ADAPTERS}
    for key in found:
        measure(llm, requests, *key, tokens=4)  # warm up every shape
    for number in range(options.rounds):
        for key, speeds in found.items():
            speeds.append(measure(llm, requests, *key, tokens=options.tokens))
            print(f"round {number + 1}: {key[0]} requests, {key[1]} adapters: {speeds[-1]:.1f} tok/s", flush=True)
    facts = machine()
    print(f"\n{json.dumps(facts)}\n\n{table(found)}")
    if options.output:
        raw = {f"{concurrency} requests, {adapters} adapters": v for (concurrency, adapters), v in found.items()}
        options.output.write_text(json.dumps({"machine": facts, "tokens_per_second": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
