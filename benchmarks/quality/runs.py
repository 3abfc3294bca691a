"""Owns one run: a training by the project's own `perft train`, its scores, and the result file; and doing what is left.

Scores are of answers that greedy decoding would give exactly, token for token (perft.training.scoring).
"""

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.common.report import commit
from benchmarks.quality import data, wordnet
from benchmarks.quality.grid import BASE, METHODS, ORDER, Projections, Run, activated, planned, width_of
from benchmarks.quality.places import BASE as SMALL_BASE
from benchmarks.quality.places import BUILD, LARGER_BASE, RUNS
from perft.hf import attach, load, read_config, shape_of
from perft.hf.base import load_model, load_tokenizer
from perft.inspection.figures import base_figures
from perft.training.data import read_examples
from perft.training.encoding import encode_all, template_of
from perft.training.options import read_options
from perft.training.run import train
from perft.training.scoring import score


class Steps(NamedTuple):
    """How long a run trains, the same for all methods that are compared."""

    steps: int = 250
    batch: int = 16
    looks: int = 3
    """Times that the tune part is looked at; the weights of the lowest loss are kept."""


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""As `perft train` chooses it."""
STEPS = {"small": Steps(), "larger": Steps(), "demo": Steps(steps=100, looks=2)}


def results(folder: Path = RUNS) -> dict[str, Any]:
    """Name of a run -> what its file says."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def next_runs(base: str | None, folder: Path = RUNS, task: str | None = None, begun: Collection[Run] = ()) -> list[Run]:
    """The runs of the grid that have no result and wait for none: learning rates to try, or else those of one seed, of
    the first part where some are left. base, task: of these alone. begun: runs that go on at the moment."""
    found = results(folder)
    for part in ORDER:
        if base in (None, part.base) and task in (None, part.task):
            for seeds in ((), *((seed,) for seed in part.seeds)):
                runs = {run.name: run for run in planned(found, [part._replace(seeds=seeds)])}
                unfinished = [run for name, run in runs.items() if name not in found]
                left = [run for run in unfinished if run not in begun]
                if left or (unfinished and not seeds):  # the seeds wait for the learning rate
                    return left
    return []


def run_all(base: str | None, seconds: float, task: str | None = None, at_once: int = 1) -> None:
    """Do the runs that are left until `seconds` are over; those begun are finished. at_once: in processes beside each
    other. Raises what a run raises, once those beside it are finished."""
    end = time.monotonic() + seconds

    def left(begun: Collection[Run]) -> list[Run]:
        return next_runs(base, task=task, begun=begun) if time.monotonic() < end else []

    with ProcessPoolExecutor(at_once, get_context("spawn"), max_tasks_per_child=1) as pool:
        keep_busy(pool, at_once, left)


def keep_busy(pool: Executor, at_once: int, left: Callable[[Collection[Run]], Sequence[Run]]) -> None:
    """Do runs until none is left. left: those that can be done now, beside those that have begun."""
    begun = dict[Future[None], Run]()
    while True:
        while len(begun) < at_once and (runs := left(begun.values())):
            base_folder(runs[0].base)  # made once, before several need it
            begun[pool.submit(_do_and_tell, runs[0])] = runs[0]
        if not begun:
            return
        for done in wait(begun, return_when=FIRST_COMPLETED).done:
            del begun[done]
            done.result()


def _do_and_tell(run: Run) -> None:
    print(run.name, flush=True)
    usual = STEPS[run.base]
    steps = usual._replace(steps=run.longer * usual.steps)
    torch.set_num_threads(1)
    result = do(run, base_folder(run.base), task_files(run.task), steps)
    write(run, result)
    print(f"{run.name}: tune {result['tune']}, test {result['test']}, {result['seconds']} s", flush=True)


def write(run: Run, result: Mapping[str, Any], folder: Path = RUNS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    unfinished = BUILD / f"{run.name}.new"
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    shutil.move(unfinished, folder / f"{run.name}.json")


def base_folder(base: str) -> Path:
    """Raises FileNotFoundError: the larger base has to be made first."""
    if base == "small":
        return SMALL_BASE
    if base == "larger":
        if not (LARGER_BASE / "config.json").is_file():
            raise FileNotFoundError(f"found no larger base in {LARGER_BASE}: make it with pretrain --larger-minutes")
        return LARGER_BASE
    from server.demo.base.build import build, default_folder

    return build(default_folder())


def task_files(task: str) -> dict[str, Path]:
    """part -> file; written if they are not there."""
    synsets = wordnet.synsets(wordnet.folder(), ("noun",)) if task == "kinds" else []
    return data.write(task, BUILD / "data", synsets)


def do(run: Run, base: Path, files: Mapping[str, Path], steps: Steps, work: Path = BUILD / "runs") -> dict[str, Any]:
    """Train and score; what the result file says. A run that was killed goes on from its last checkpoint."""
    began = time.monotonic()
    model = load_model(str(base), torch.float32).to(DEVICE)  # an adapter is made where its model is
    shape, projections = shape_of(model), projections_of(model)
    whole = base_figures(model, shape)
    told: dict[str, Any] = {
        **run._asdict(), "steps": steps._asdict(), "commit": commit(), "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}, "device": DEVICE,
        "base_fingerprint": shape.fingerprint, "base_parameters": whole.parameters, "base_activated": whole.activated,
    }  # fmt: skip
    if run.method != BASE:
        output = work / run.name
        width = width_of(run.method, run.budget, shape, projections)
        options = train_options(run, base, files, steps, width, output)
        if not (output / "adapter_config.json").is_file():
            train(read_options(options), lambda line: None)
        model = with_adapter(model, run.method, output)
        weights = load_file(output / "adapter_model.safetensors")
        told |= {
            "width": width, "activated": activated(run.method, width, shape, projections),
            "trainable": sum(each.numel() for each in weights.values()),
        }  # fmt: skip
    for part in ("tune", "test"):
        told[part] = scored(model, base, files[part])
    told["seconds"] = round(time.monotonic() - began, 1)
    return told


def train_options(
    run: Run, base: Path, files: Mapping[str, Path], steps: Steps, width: int, output: Path
) -> dict[str, Any]:
    """What `perft train` is told."""
    of = METHODS[run.method]
    options: dict[str, Any] = {
        "base": str(base), "base_name": run.base, "data": [files["train"]], "validation": [files["tune"]],
        "output": output, "bottleneck": width, "loss_on": "answer", "steps": steps.steps, "batch_size": steps.batch,
        "learning_rate": run.learning_rate, "seed": run.seed, "evaluate_every": max(1, steps.steps // steps.looks),
        "threads": 1, "dtype": "float32",
    }  # fmt: skip
    if of.variant is None:
        return options | {"method": run.method}
    options |= {"variant": of.variant, "num_experts": of.experts, "top_k": of.top_k}
    return {key: value for key, value in options.items() if value is not None}


def with_adapter(model: Any, method: str, folder: Path) -> Any:
    """The base with a trained adapter."""
    if METHODS[method].variant is None:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(folder)).eval()
    adapter = attach(model, read_config(folder))
    load(adapter, folder)
    return model


def scored(model: Any, base: Path, file: Path, batch: int = 100) -> dict[str, Any]:
    """Loss of the answers' tokens, and how many answers are right."""
    tokenizer = load_tokenizer(str(base))
    template = template_of(tokenizer, "auto")
    encoded = encode_all(tokenizer, read_examples([file]), template, "answer", 256, "error")
    found = score(model, encoded, batch, tokenizer.pad_token_id, torch.device(DEVICE))
    return {"loss": round(found.loss, 5), "right": found.right, "examples": found.examples}


def projections_of(model: Any) -> Projections:
    """Of the first layer; all are alike."""
    attention = next(each for name, each in model.named_modules() if name.endswith("self_attn"))
    query, value = attention.q_proj, attention.v_proj
    return Projections((query.in_features, query.out_features), (value.in_features, value.out_features))
