"""`perft train` on tiny bases: what it writes, that it learns, that it goes on after a kill, what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
