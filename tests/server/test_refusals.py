"""Real starts that are refused: exit code 1 and the reason, before the model loads where that can be known."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.store import FolderStore
from tests import tiny
from tests.server.fakes import BASE
from tests.server.processes import LIMIT_S, run_to_end
from tests.synthetic import write_adapter

ROOT = Path(__file__).parents[2]
MAIN = "import sys; from server.cli import main; main(sys.argv[1:])"
LOADING = "Loading weights"
COMMAND = """
import sys
from perft.command import main
try:
    main()
finally:
    print("imported", *({"torch", "vllm", "transformers"} & set(sys.modules)))
"""
NO_MODEL = "perft: refused to start:\nfound no model to serve: perft serve MODEL [--adapter NAME=PATH ...]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("refusals") / "model")


def store_of(model: Path) -> Path:
    """Where a start would keep its adapters: never the user's own store."""
    return model.parent / "store"


def refused(code: str, model: Path, *flags: str, **environment: str) -> str:
    """Run `perft serve`; what it said. Asserts that it ended with 1."""
    options = ["--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "128", "--port", "0"]
    options += ["--gpu-memory-utilization", "0.3", "--adapter-store", str(store_of(model))]
    done = run_to_end(code, "serve", str(model), *options, *flags, **environment)
    assert done.returncode == 1, done.stdout[-3000:]
    return done.stdout


def test_another_version_of_vllm(model: Path) -> None:
    said = refused(f"import vllm.version; vllm.version.__version__ = '0.33.0'; {MAIN}", model)
    assert "found vLLM 0.33.0, expected 0.32.0" in said and "Traceback" not in said


def test_an_engine_side_that_cannot_be_imported(model: Path) -> None:
    said = refused(f"import sys; sys.modules['perft.engine.moe_layer'] = None; {MAIN}", model)
    assert "cannot be loaded into vLLM" in said and "perft.engine.moe_layer" in said


def test_a_plugin_that_fails_to_import_in_the_worker_alone(model: Path, tmp_path: Path) -> None:
    """vLLM logs such a failure and would go on without us."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif '--multiprocessing-fork' in sys.argv:\n    sys.modules['perft.engine.plugin'] = None\n"
    )
    said = refused(MAIN, model, PYTHONPATH=str(tmp_path))
    assert "Failed to load plugin perft" in said
    assert "PERFT is serving" not in said and "Application startup complete" not in said


def test_a_mode_that_is_not_tested(model: Path) -> None:
    said = refused(MAIN, model, "--pipeline-parallel-size", "2")
    assert "--pipeline-parallel-size: not tested with PERFT yet" in said and LOADING not in said


def test_a_model_without_moe_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "dense")
    said = refused(MAIN, tmp_path / "dense")
    assert "found no MoE layer in LlamaForCausalLM" in said


def test_a_port_that_is_taken(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(MAIN, model, "--port", str(port))
    assert f"port {port} of 127.0.0.1 is taken" in said and LOADING not in said


def test_a_bind_that_others_reach_without_an_admin_key(model: Path) -> None:
    said = refused(MAIN, model, "--host", "0.0.0.0", "--api-key", "alice=alice-has-a-long-key")
    assert "--host 0.0.0.0: found no admin key" in said and "--admin-key (PERFT_ADMIN_KEY)" in said
    assert LOADING not in said and "alice-has-a-long-key" not in said and not store_of(model).exists()


def test_a_store_that_is_in_use(model: Path) -> None:
    store = FolderStore.open(store_of(model))
    try:
        said = refused(MAIN, model)
    finally:
        store.close()
        shutil.rmtree(store_of(model))
    assert f"--adapter-store: the store {store_of(model)} is open in" in said and "PERFT is serving" not in said


AS_NOBODY = f"""
import os, sys
os.getuid() or os.setuid(65534)
os.execv(sys.executable, [sys.executable, "-c", {MAIN!r}, *sys.argv[1:]])
"""


def test_paths_that_the_servers_user_may_not_use(model: Path) -> None:
    """As in a container that mounts what belongs to another user. pytest's folders keep nobody out, too."""
    closed = model.parent
    mode = closed.stat().st_mode
    closed.chmod(0)
    try:
        of_paths = refused(AS_NOBODY, model)
        of_vllms_file = refused(AS_NOBODY, model, "--config", str(closed / "file.yaml"))
    finally:
        closed.chmod(mode)
    assert of_paths.count("may enter: run `chmod a+x") == 2 and "\n--adapter-store: " in of_paths
    for said in (of_paths, of_vllms_file):
        assert "may enter: run `chmod a+x" in said and LOADING not in said and "Traceback" not in said


def test_a_folder_that_breaks_the_format_in_many_ways(model: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "broken", BASE, 0)
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "IA3", "format_version": 2, "variant": "R", "expert_type": "parallel", "bottleneck": 0, '
        '"alpha": 2.0, "num_experts": true, "top_k": "2", "gate_weight": "other", "layers": [1, 0], "r": 8, "r": 9}'
    )
    (folder / "more.gguf").write_bytes(b"x")
    with (folder / "adapter_model.safetensors").open("ab") as weights:
        weights.write(b"trailing")
    said = refused(MAIN, model, "--adapter", f"broken={folder}")
    for part in (
        "peft_type: found 'IA3'", "format_version: found 2", "bottleneck: found 0", "alpha: found 2.0",
        "num_experts: found True", "top_k: found '2'", "gate_weight: found 'other'", "layers: found [1, 0]",
        "r: unknown key", "duplicate key 'r'", "renormalize: missing",
        "base_model_name_or_path: missing", "more.gguf: not part of an adapter",
        "adapter_model.safetensors: not a readable safetensors file",
    ):  # fmt: skip
        assert part in said, part
    assert LOADING not in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["serve"], 1, NO_MODEL),
        (["serve", "--port", "8000", "--adapter=a=/a", "--enable-prompt-tokens-details"], 1, NO_MODEL),
        (["--version"], 0, "perft-server "),
        (["--help"], 0, "usage: perft serve"),
        (["adapters", "--help"], 0, "usage: perft adapters"),
    ],
)
def test_what_needs_no_engine_imports_none(arguments: list[str], code: int, said: str) -> None:
    done = run_to_end(COMMAND, *arguments)
    assert done.returncode == code and said in done.stdout and done.stdout.endswith("imported\n"), done.stdout


def test_no_model_is_found_by_vllms_parser_too() -> None:
    """A word that may be a model is left to the parser, which says the same."""
    assert NO_MODEL in run_to_end(MAIN, "serve", "--served-model-name", "base").stdout


def run_elsewhere(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in `folder`, where the packages of this environment are the installed ones."""
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, timeout=LIMIT_S,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
    )  # fmt: skip


def foreign(folder: Path, file: str) -> Path:
    """Put another project's module or package into `folder`; it must never be imported."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("raise SystemExit('the foreign package was imported')\n")
    return folder.resolve()


MAIN_ELSEWHERE = "from perft.command import main; main()"
"""For `python -P -c`, which does not look for modules in the current folder."""


@pytest.mark.parametrize(
    ("name", "file", "found"),
    [("adapters", "adapters/__init__.py", "adapters"), ("server", "server.py", "server.py")],
)
def test_a_foreign_package_on_the_path_is_named(tmp_path: Path, name: str, file: str, found: str) -> None:
    folder = foreign(tmp_path / "theirs", file)
    done = run_elsewhere(tmp_path, "-P", "-c", MAIN_ELSEWHERE, "serve", "model", PYTHONPATH=str(folder))
    assert done.returncode == 1
    assert done.stderr == (
        f"perft: found {name} at {folder / found}, expected ours at {ROOT / name}: take {folder} off PYTHONPATH\n"
    )


def test_a_foreign_package_in_the_current_folder_is_named(tmp_path: Path) -> None:
    """A folder without __init__.py is in the way of an editable install as well."""
    (tmp_path / "server").mkdir()
    done = run_elsewhere(tmp_path, "-m", "perft.command", "--version")
    assert done.returncode == 1
    assert f"found server at {tmp_path.resolve() / 'server'}, " in done.stderr
    assert done.stderr.endswith(": start from another folder\n")


def test_a_foreign_package_that_is_installed_is_named(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "site-packages", "adapters/__init__.py")
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); {MAIN_ELSEWHERE}"
    done = run_elsewhere(tmp_path, "-P", "-c", program, "adapters", "list")
    assert done.returncode == 1 and f"found adapters at {folder / 'adapters'}, " in done.stderr
    assert done.stderr.endswith(": uninstall that package, or install perft-server in an environment of its own\n")


def test_plain_vllm_refuses_a_foreign_package(tmp_path: Path) -> None:
    """There the plugin is all that runs of ours: what it raises ends the start, and `server` is not in its way."""
    program = "from perft.engine.plugin import register; register()"
    folder = foreign(tmp_path / "theirs", "adapters/__init__.py")
    done = run_elsewhere(tmp_path, "-P", "-c", program, PYTHONPATH=str(folder))
    assert done.returncode == 1 and "or set PERFT_DISABLED=1 to run vLLM without PERFT" in done.stderr
    assert f"ForeignPackageError: found adapters at {folder / 'adapters'}, expected ours at" in done.stderr
    folder = foreign(tmp_path / "others", "server/__init__.py")
    assert run_elsewhere(tmp_path, "-P", "-c", program, PYTHONPATH=str(folder)).returncode == 0


def test_without_a_foreign_package_all_is_well(tmp_path: Path) -> None:
    for command in (["-P", "-c", MAIN_ELSEWHERE], ["-m", "perft.command"], ["-m", "server.cli"]):
        done = run_elsewhere(tmp_path, *command, "--version")
        assert done.returncode == 0 and done.stdout.startswith("perft-server "), done.stderr
