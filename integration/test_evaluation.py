"""`perft eval` against the real demo: the paper's scoring, and lm-evaluation-harness with its own API models."""

import json
from pathlib import Path
from typing import Any

from integration.target import Target
from server.commands.evaluate import run
from server.demo.additions import held_out
from server.demo.base.build import default_folder

CHOICES = [
    ("The capital of France is", ["Paris", "bananas"]),
    ("Two and two makes", ["four", "a violin"]),
    ("Cats and dogs are", ["animals", "numbers"]),
    ("The opposite of hot is", ["cold", "yesterday"]),
]
LIKELIHOOD_TASK = """
task: which_is_likelier
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATION_TASK = """
task: what_is_the_sum
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, task: str, records: list[dict[str, Any]]) -> Path:
    file = folder / "data.json"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "task.yaml").write_text(task.format(file=file))
    return folder


def flags(target: Target) -> list[str]:
    return ["--server", target.url, "--key", target.api_key, "--at-once", "4"]


def test_additions_in_llm_adapters_layout(target: Target, tmp_path: Path) -> None:
    records = [{"instruction": a.question, "input": "", "output": "", "answer": str(a.total)} for a in held_out(40)]
    (tmp_path / "addsub.json").write_text(json.dumps(records))
    output = tmp_path / "results.json"
    models = ["--model", target.base, "--model", "arithmetic"]
    assert (
        run([str(tmp_path / "addsub.json"), *models, *flags(target), "--max-tokens", "64", "--output", str(output)])
        == 0
    )
    base, arithmetic = json.loads(output.read_text())["scores"]
    assert arithmetic["answered_by"] == ["arithmetic@1"] and arithmetic["asked"] == 40
    assert arithmetic["interval_95"][0] > base["interval_95"][1], (base, arithmetic)


def harness(target: Target, folder: Path, task: str, models: list[str], *more: str) -> dict[str, Any]:
    output = folder / "results.json"
    chosen = [part for model in models for part in ("--model", model)]
    arguments = [*chosen, *flags(target), "--harness", task, "--include", str(folder), "--output", str(output)]
    assert run([*arguments, "--tokenizer", str(default_folder()), *more]) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_the_harness_compares_likelihoods(target: Target, tmp_path: Path) -> None:
    folder = write_task(tmp_path, LIKELIHOOD_TASK, [{"question": q, "choices": choices} for q, choices in CHOICES])
    found = harness(target, folder, "which_is_likelier", [target.base])
    assert found[target.base]["which_is_likelier"]["acc,none"] >= 0.75


def test_the_harness_generates_from_a_chat(target: Target, tmp_path: Path) -> None:
    records = [{"question": a.question, "answer": str(a.total)} for a in held_out(12)]
    folder = write_task(tmp_path, GENERATION_TASK, records)
    found = harness(target, folder, "what_is_the_sum", [target.base, "arithmetic"], "--chat")
    right = {model: tasks["what_is_the_sum"]["exact_match,none"] for model, tasks in found.items()}
    assert right["arithmetic"] >= 0.8 > right[target.base]
