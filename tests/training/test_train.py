"""`perft train` on tiny bases: what it writes, that it learns, that it goes on after a kill, what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.format.folder import read_folder
from perft.checkpoint import checkpoint_fingerprint
from perft.hf import shape_of
from server.commands.train import run
from tests import tiny
from tests.server.adapter_api import KEY, AdapterApi, serving
from tests.server.processes import free_port
from tests.training import tiny_base

ROOT = Path(__file__).parents[2]
FAST = ("--learning-rate", "1e-2", "--loss-on", "answer", "--batch-size", "8", "--bottleneck", "4")


def trained(base: Path, data: Path, output: Path, *flags: str, steps: int = 12) -> Path:
    arguments = [
        "--base",
        str(base),
        "--data",
        str(data),
        "--output",
        str(output),
        "--steps",
        str(steps),
        *FAST,
        *flags,
    ]
    assert run(arguments) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it says when it refuses, which is not a traceback."""
    capsys.readouterr()
    assert run(list(arguments)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


VARIANTS: list[tuple[str, ...]] = [
    ("--variant", "R"),
    ("--variant", "R", "--expert-type", "parallel", "--num-experts", "3", "--top-k", "1"),
    ("--variant", "E"),
    ("--variant", "D", "--num-experts", "3"),
    ("--variant", "S", "--bottleneck", "5", "--layers", "1", "2"),
]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
def test_an_adapter_is_written_and_has_learned(
    request: pytest.FixtureRequest, data: Path, tmp_path: Path, kind: str, flags: tuple[str, ...]
) -> None:
    base = request.getfixturevalue(kind)
    output = trained(base, data, tmp_path / "adapter", *flags)
    shape = shape_of(tiny.load(base))
    checked = read_folder(output, shape)
    assert checked.config.variant == flags[1]
    assert checked.config.base_fingerprint == checkpoint_fingerprint(base) == shape.fingerprint
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert all(bool(tensor.any()) for tensor in load_file(output / "adapter_model.safetensors").values())
    before, after = losses(output)
    assert after < before - 0.5


def losses(output: Path) -> tuple[float, float]:
    """The held-out loss before and after, from the card."""
    rows = [line.split("|") for line in (output / "README.md").read_text().splitlines()]
    found = {
        row[1].strip(): float(row[2])
        for row in rows
        if len(row) == 5 and row[1].strip() in ("before (the base)", "after")
    }
    return found["before (the base)"], found["after"]


def test_the_card(olmoe: Path, data: Path, tmp_path: Path) -> None:
    output = trained(olmoe, data, tmp_path / "sums", "--description", "Adds.")
    card = (output / "README.md").read_text()
    for expected in (
        "# sums",
        "Adds.",
        "PERFT-R",
        "| data | ",
        "54 examples",
        "| parameters | ",
        "answers exactly right",
    ):
        assert expected in card, expected
    assert json.loads((output / "adapter_config.json").read_text())["description"] == "Adds."


def test_the_same_seed_gives_the_same_adapter(olmoe: Path, data: Path, tmp_path: Path) -> None:
    first, second = (weights(trained(olmoe, data, tmp_path / name)) for name in ("a", "b"))
    assert first == second
    assert weights(trained(olmoe, data, tmp_path / "c", "--seed", "7")) != first


def weights(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [("--variant", "R"), ("--variant", "E", "--expert-type", "parallel")], ids=" ".join)
def test_a_training_that_was_killed_goes_on_to_the_same_adapter(
    olmoe: Path, data: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """SIGKILL after a checkpoint appeared, twice; the third run ends with the bytes of a training that was let run."""
    command = [sys.executable, "-m", "perft.command", "train"]
    arguments = ["--base", str(olmoe), "--data", str(data), "--steps", "30", *FAST, *flags, "--evaluate-every", "5"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, *arguments, "--output", str(whole)], check=True)
    arguments += ["--output", str(killed)]
    for step in (5, 15):
        process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE)
        try:
            wait_for(killed / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json", process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (killed / "adapter_config.json").exists()
    last = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
    assert re.search(r"going on from .*checkpoint-(15|20|25)\n", last.stderr), "it must not begin anew"
    assert weights(killed) == weights(whole)


def wait_for(file: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_checkpoint_that_was_being_written_is_passed_over(
    olmoe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--evaluate-every", "4", "--keep-checkpoints")
    whole = trained(olmoe, data, tmp_path / "whole", *flags)
    output = trained(olmoe, data, tmp_path / "again", *flags)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (output / name).unlink()
    (output / "checkpoints" / "checkpoint-12" / "trainer_state.json").write_text('{"epoch": ')
    capsys.readouterr()
    assert weights(trained(olmoe, data, output, *flags)) == weights(whole)
    assert "/checkpoint-8\n" in capsys.readouterr().err


def test_other_options_do_not_go_on(
    olmoe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = trained(olmoe, data, tmp_path / "a", "--keep-checkpoints")
    arguments = ["--base", str(olmoe), "--data", str(data), "--output", str(output), "--steps", "12", *FAST]
    assert "has an adapter already" in refused(capsys, *arguments)
    (output / "adapter_config.json").unlink()
    (output / "adapter_model.safetensors").unlink()
    message = refused(capsys, *arguments, "--seed", "3")
    assert "with other options" in message and "--seed: found 42 there, and 3 now" in message
    assert run([*arguments, "--seed", "3", "--overwrite"]) == 0


def test_options_from_a_file(olmoe: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        f"base: {olmoe}\ndata: {data}\noutput: {tmp_path / 'a'}\nvariant: D\nnum-experts: 2\nsteps: 99\nbottleneck: 4\n"
        "learning_rate: 0.01\nbatch_size: 8\n"
    )
    assert run(["--config", str(file), "--steps", "3"]) == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["variant"], config["num_experts"], config["bottleneck"]) == ("D", 2, 4)


@pytest.mark.parametrize("method", ["qvlora", "router-lora"])
def test_the_baselines_are_pefts_own(olmoe: Path, data: Path, tmp_path: Path, method: str) -> None:
    output = trained(olmoe, data, tmp_path / "a", "--method", method)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4
    names = set(load_file(output / "adapter_model.safetensors"))
    assert all(("self_attn" if method == "qvlora" else "gate") in name for name in names), names
    before, after = losses(output)
    assert after < before


def test_gradient_checkpointing_changes_nothing(olmoe: Path, data: Path, tmp_path: Path) -> None:
    plain = load_file(trained(olmoe, data, tmp_path / "a", "--dropout", "0") / "adapter_model.safetensors")
    flags = ("--dropout", "0", "--gradient-checkpointing")
    less = load_file(trained(olmoe, data, tmp_path / "b", *flags) / "adapter_model.safetensors")
    assert all(torch.allclose(plain[name], less[name], atol=1e-5) for name in plain)


def test_accumulated_batches_are_one_large_batch(olmoe: Path, data: Path, tmp_path: Path) -> None:
    """Up to the mean over the answers' tokens, which is taken within each batch."""
    flags = ("--dropout", "0", "--aux-loss", "0")
    large = load_file(trained(olmoe, data, tmp_path / "a", *flags, steps=4) / "adapter_model.safetensors")
    parts = ("--batch-size", "4", "--gradient-accumulation", "2")
    small = load_file(trained(olmoe, data, tmp_path / "b", *flags, *parts, steps=4) / "adapter_model.safetensors")
    assert all(torch.nn.functional.cosine_similarity(large[n].flatten(), small[n].flatten(), 0) > 0.8 for n in large)


def test_two_processes_learn_what_one_does_with_their_batches_together(olmoe: Path, data: Path, tmp_path: Path) -> None:
    """As under accelerate launch. Up to the mean over the answers' tokens, which each process takes for itself."""
    flags = ("--dropout", "0", "--aux-loss", "0")
    one = load_file(trained(olmoe, data, tmp_path / "one", *flags, steps=4) / "adapter_model.safetensors")
    arguments = ["--base", str(olmoe), "--data", str(data), "--output", str(tmp_path / "two"), "--steps", "4", *FAST]
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "perft.command", "train", *arguments, *flags, "--batch-size", "4"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the card is") == 1 and done.stderr.count("before: ") == 1
    two = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert all(torch.nn.functional.cosine_similarity(one[n].flatten(), two[n].flatten(), 0) > 0.8 for n in one)


def test_a_held_out_file_and_early_best(olmoe: Path, data: Path, tmp_path: Path) -> None:
    """With a learning rate that ruins it, the best is an early one, and the training stops."""
    held_out = tiny_base.write_lines(tmp_path / "held-out.jsonl", tiny_base.additions(9))
    output = trained(
        olmoe, data, tmp_path / "a", "--validation", str(held_out), "--evaluate-every", "1", "--patience", "2",
        "--learning-rate", "3", steps=60,
    )  # fmt: skip
    looks = [line for line in (output / "README.md").read_text().splitlines() if line.count("|") == 4 and "%" in line][
        2:
    ]
    measured = [float(line.split("|")[2]) for line in looks]
    assert len(measured) < 60 and losses(output)[1] == pytest.approx(min(measured), abs=1e-3)
    assert "of 9" in (output / "README.md").read_text()


# --- what is refused


@pytest.fixture
def base_flags(olmoe: Path, data: Path, tmp_path: Path) -> dict[str, str]:
    return {"--base": str(olmoe), "--data": str(data), "--output": str(tmp_path / "out")}


def flat(flags: dict[str, str]) -> list[str]:
    return [part for pair in flags.items() for part in pair]


REFUSED: list[tuple[dict[str, str], str]] = [
    ({"--variant": "S", "--top-k": "2"}, "top_k: found 2, but it is for variant R"),
    ({"--variant": "R", "--num-experts": "2", "--top-k": "3"}, "top_k: found 3, expected at most num_experts"),
    ({"--variant": "E", "--num-experts": "3"}, "num_experts: found 3, expected 8"),
    ({"--layers": "7"}, "layers: found 7, the base has layers 0 to 3"),
    ({"--expert-type": "parallel", "--alpha": "2"}, "parallel experts have no scale"),
    ({"--bottleneck": "0"}, "--bottleneck: found"),
    ({"--learning-rate": "fast"}, "--learning-rate: found 'fast'"),
    ({"--max-length": "12"}, "found 2"),
    ({"--base": "/nowhere/at/all"}, "found no folder /nowhere/at/all"),
    ({"--data": "/nowhere.jsonl"}, "/nowhere.jsonl: No such file"),
    ({"--config": "/nowhere.yaml"}, "cannot read /nowhere.yaml"),
    ({"--config": "/dev/zero"}, "cannot read /dev/zero: found no plain file"),
    ({"--data": "/dev/zero"}, "/dev/zero: found no plain file, expected a file"),
    ({"--seed": "-1"}, "--seed: found '-1'"),
    ({"--seed": "1099511627776"}, "--seed: found '1099511627776'"),
    ({"--epochs": "inf"}, "--epochs: found 'inf': Input should be a finite number"),
    ({"--aux-loss": "inf"}, "--aux-loss: found 'inf'"),
    ({"--learning-rate": "nan"}, "--learning-rate: found 'nan': Input should be a finite number"),
    ({"--batch-size": "1000000000"}, "--batch-size: found"),
    ({"--threads": "1000000000"}, "--threads: found"),
    ({"--num-experts": "1000000"}, "--num-experts: found 1000000"),
    ({"--alpha": "1e30"}, "--alpha: found 1e+30"),
    ({"--steps": "3", "--epochs": "2"}, "steps: found beside epochs"),
    ({"--patience": "2", "--validation-size": "0"}, "patience: found without held-out examples"),
    ({"--method": "qvlora", "--variant": "E"}, "variant: --method qvlora has no such option"),
    ({"--method": "router-lora", "--layers": "1"}, "layers: --method router-lora has no such option"),
    ({"--variant": "S", "--gate-weight": "base_slot"}, "gate_weight: found base_slot, but it is for variant R"),
    ({"--init": "/nowhere"}, "--init: "),
    ({"--output": "/proc/adapter"}, "cannot write into /proc/adapter"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[" ".join(flat(each[0])) for each in REFUSED])
def test_what_cannot_be_trained(
    base_flags: dict[str, str], capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    assert message in refused(capsys, *flat(base_flags | changes))
    assert not (Path(base_flags["--output"]) / "adapter_config.json").exists()


def test_a_dense_base(base_flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path / "dense"
    )
    message = refused(capsys, *flat(base_flags | {"--base": str(tmp_path / "dense")}))
    assert "found no MoE block in LlamaForCausalLM" in message


def test_an_unknown_architecture(
    base_flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "of-tomorrow"}')
    assert "cannot be read" in refused(capsys, *flat(base_flags | {"--base": str(folder)}))
    (folder / "config.json").unlink()
    assert "found no config.json" in refused(capsys, *flat(base_flags | {"--base": str(folder)}))


def test_broken_data_names_the_line(
    base_flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_base.write_lines(tmp_path / "broken.jsonl", tiny_base.additions(9))
    file.write_text(file.read_text().replace('{"instruction": "0+6"', '{"instruction": "0+6', 1))
    assert f"{file} line 7: found broken JSON" in refused(capsys, *flat(base_flags | {"--data": str(file)}))


def test_a_full_disk(olmoe: Path, data: Path, tmp_path: Path) -> None:
    """Writing fails past 100 kB: an error of one line, and nothing that could be taken for an adapter."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); from perft.command import main; main()"
    )
    arguments = ["--base", str(olmoe), "--data", str(data), "--output", str(tmp_path / "out"), "--steps", "2", *FAST]
    done = subprocess.run(
        [sys.executable, "-c", program, "train", *arguments, "--bottleneck", "256"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("perft train: ")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_training_that_diverges_writes_nothing(
    base_flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *flat(base_flags),
        "--steps",
        "6",
        *FAST,
        "--weight-decay",
        "1e38",
        "--validation-size",
        "0",
    ]
    assert "not finite: lower --learning-rate" in refused(capsys, *arguments)
    assert not (Path(base_flags["--output"]) / "adapter_config.json").exists()


def test_wrong_usage() -> None:
    for arguments in (["--no-such-flag"], ["--activate"], ["--push", "no name!"]):
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        assert ended.value.code == 2


def test_required_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys)
    assert all(f"--{name}: missing" in message for name in ("base", "data", "output"))


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    from perft.training.options import TrainOptions

    with pytest.raises(SystemExit):
        run(["--help"])
    shown: Any = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in TrainOptions.model_fields)


def test_push_and_activate(
    olmoe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(AdapterApi()) as api:
        monkeypatch.setenv("PERFT_ADMIN_KEY", KEY)
        output = trained(olmoe, data, tmp_path / "a", "--push", "sums", "--activate", "--server", api.url)
        assert [(sent["name"], sent["activate"]) for sent in api.uploads] == [("sums", "true")]
        assert api.uploads[0]["weights"][1] == weights(output)
        assert "sums@1" in capsys.readouterr().out


def test_a_push_that_fails_leaves_the_adapter(
    olmoe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--base", str(olmoe), "--data", str(data), "--output", str(tmp_path / "a"), "--steps", "2", *FAST]
    message = refused(capsys, *arguments, "--push", "sums", "--server", "http://127.0.0.1:9")
    assert f"perft adapters push sums {tmp_path / 'a'}" in message
    assert (tmp_path / "a" / "adapter_config.json").is_file()


# --- what strangers found


def test_nothing_but_a_trainings_own_is_touched(
    olmoe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {
        "notes": "thesis.txt", "card": "README.md", "model": "config.json", "checkpoints": "checkpoints/mine.txt"
    }  # fmt: skip
    for folder, name in mine.items():
        file = tmp_path / folder / name
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        for flags in ([], ["--overwrite"]):
            message = refused(
                capsys, "--base", str(olmoe), "--data", str(data), "--output", str(tmp_path / folder), *flags
            )
            assert "which no training wrote: use another --output" in message
        assert file.read_text() == "mine" and len(list((tmp_path / folder).rglob("*"))) == len(Path(name).parts)
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for output in ("", ".", "link", "notes/thesis.txt"):
        assert "--output" in refused(capsys, "--base", str(olmoe), "--data", str(data), "--output", output) or output
        assert not (tmp_path / "adapter_config.json").exists()


def test_a_training_that_fails_leaves_no_folder(
    olmoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    refused(capsys, "--base", str(olmoe), "--data", str(tmp_path / "broken.jsonl"), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def changed_base(base: Path, folder: Path, config: dict[str, Any], without: str = "") -> Path:
    """A copy of a base with other settings, or without the tensors whose names contain `without`."""
    shutil.copytree(base, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))
    if without:
        tensors = {name: each for name, each in load_file(base / "model.safetensors").items() if without not in name}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


BROKEN_BASES: list[tuple[dict[str, Any], str, str]] = [
    ({"num_hidden_layers": 6}, "", "layers.4."),
    ({}, "layers.2.mlp.gate.weight", "model.layers.2.mlp.gate.weight: missing in the checkpoint"),
    ({}, "layers.1.self_attn", "missing in the checkpoint"),
    ({"num_experts_per_tok": 0}, "", "found top-k 0 of 8 experts"),
    ({"num_experts_per_tok": 99}, "", "found top-k 99 of 8 experts"),
    ({"hidden_size": "64"}, "", "cannot be read"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "", "cannot be loaded"),
]


@pytest.mark.parametrize(("config", "without", "message"), BROKEN_BASES)
def test_a_base_that_is_not_whole(
    olmoe: Path, base_flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    config: dict[str, Any], without: str, message: str,
) -> None:  # fmt: skip
    base = changed_base(olmoe, tmp_path / "base", config, without)
    assert message in refused(capsys, *flat(base_flags | {"--base": str(base)}), "--steps", "1")
    assert not (tmp_path / "out").exists()


def test_a_base_whose_files_are_damaged(
    olmoe: Path, base_flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = changed_base(olmoe, tmp_path / "base", {})
    flags = flat(base_flags | {"--base": str(base)})
    (base / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside a model" in refused(capsys, *flags)
    (base / "adapter_config.json").unlink()
    (base / "model.safetensors").write_bytes(b"garbage")
    assert "is damaged" in refused(capsys, *flags)
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    assert "cannot be loaded" in refused(capsys, *flags)
    for file in base.glob("token*"):
        file.unlink()
    assert "tokenizer" in refused(capsys, *flags)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "found an alias"),
        ("bottleneck: 4\nbottleneck: 8\n", "found the key 'bottleneck' twice"),
        ('{"steps": 1, "steps": 2}', "found the key 'steps' twice"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("bottleneck: true", "bottleneck: found true"),
        ("layers: [true, false]", "layers: found true"),
        ("description: " + "x" * 3000, "--description: found 'xxx"),
    ],
)  # fmt: skip
def test_a_file_of_options_that_is_refused(
    base_flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "options.yaml").write_text(text)
    said = refused(capsys, *flat(base_flags), "--config", str(tmp_path / "options.yaml"))
    assert message in said and len(said) < 500


def test_checkpoints_that_are_damaged_are_told(
    olmoe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--evaluate-every", "4", "--keep-checkpoints")
    output = trained(olmoe, data, tmp_path / "a", *flags)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (output / name).unlink()
    arguments = ["--base", str(olmoe), "--data", str(data), "--output", str(output), "--steps", "12", *FAST, *flags]
    last = output / "checkpoints" / "checkpoint-12"
    (last / "trainer_state.json").write_text("{")
    os.truncate(output / "checkpoints" / "checkpoint-8" / "optimizer.pt", 1000)
    message = refused(capsys, *arguments)
    assert f"{last} is not complete, and passed over" in message and "checkpoint-8 is damaged" in message
    (output / "checkpoints" / "options.json").write_text("{")
    assert "not valid JSON" in refused(capsys, *arguments)
    (output / "checkpoints" / "options.json").unlink()
    assert "holds checkpoints, which no training wrote" in refused(capsys, *arguments)


def test_the_card_holds_all_that_trains_it_again(olmoe: Path, data: Path, tmp_path: Path) -> None:
    first = trained(olmoe, data, tmp_path / "a", "--patience", "3", "--evaluate-every", "2", steps=7)
    card = (first / "README.md").read_text()
    options = card.split("```yaml\n")[1].split("```")[0]
    again = options.replace(str(first), str(tmp_path / "b"))
    (tmp_path / "again.yaml").write_text(again)
    assert run(["--config", str(tmp_path / "again.yaml")]) == 0
    assert weights(tmp_path / "b") == weights(first)
    assert "7; 8 examples each" in card and "had the lowest held-out loss" in card and "transformers " in card


def test_the_loss_is_drawn_from_the_first_step_to_the_last() -> None:
    from perft.training.card import _curve

    for count in (1, 5, 17, 50, 60):
        bars = _curve([(step, float(step)) for step in range(count)]).split("`")[1]
        assert len(bars) == min(50, count) and list(bars) == sorted(bars, key=ord)
        assert count == 1 or (bars[0], bars[-1]) == ("▁", "█")


def test_an_adapter_that_is_worse_is_said_to_be(
    olmoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns to answer with letters, and is asked for digits."""
    letters = [{"instruction": f"{number}", "output": "A" * 20} for number in range(40)]
    data = tiny_base.write_lines(tmp_path / "letters.jsonl", letters)
    held_out = tiny_base.write_lines(tmp_path / "digits.jsonl", tiny_base.additions(9))
    output = trained(olmoe, data, tmp_path / "a", "--validation", str(held_out), "--evaluate-every", "30", steps=30)
    assert "worse than the base" in capsys.readouterr().err
    assert "Its loss is higher than the base's" in (output / "README.md").read_text()


def test_it_begins_with_an_adapter(olmoe: Path, data: Path, tmp_path: Path) -> None:
    first = trained(olmoe, data, tmp_path / "a")
    second = trained(olmoe, data, tmp_path / "b", "--init", str(first), steps=1)
    assert losses(second)[0] == pytest.approx(losses(first)[1], abs=1e-3)


def test_weighed_by_the_base(olmoe: Path, data: Path, tmp_path: Path) -> None:
    output = trained(olmoe, data, tmp_path / "a", "--gate-weight", "base_slot", steps=2)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["gate_weight"], config["renormalize"]) == ("base_slot", False)


def test_a_server_that_is_none_is_told_before_the_training() -> None:
    for flags in (["--push", "a", "--server", "file:///etc/passwd"], ["--server", "http://127.0.0.1:1"]):
        with pytest.raises(SystemExit) as ended:
            run(flags)
        assert ended.value.code == 2
