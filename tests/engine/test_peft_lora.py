"""PEFT LoRA adapters are checked before they are accepted, as strictly as vLLM loads them. No engine is started."""

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from adapters.format import values
from adapters.format.files import WEIGHTS_FILE
from adapters.identity import lora_digest
from perft.engine.peft_lora import LoRATarget, check_peft_lora, peft_lora_violations
from tests import tiny
from tests.engine.engines import PERFT_SETTINGS, settings

RANK, ALPHA = 4, 8
CONFIG = {
    "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": "tiny", "bias": "none", "corda_config": None,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": ALPHA, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "qalora_group_size": 16, "r": RANK, "rank_pattern": {},
    "alpha_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False, "peft_version": "0.18.0", "arrow_config": None, "ensure_weight_tying": False,
}  # fmt: skip
"""As PEFT writes it."""

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def engine_config(folder: Path, kind: str, **options: Any) -> VllmConfig:
    """The VllmConfig that the API process has, for a tiny model that is built in `folder`."""
    tiny.build(kind, folder / kind)
    common = {"lora_target_modules": ["qkv_proj"], "max_loras": 4, "max_lora_rank": 8}
    return EngineArgs(**settings(folder / kind) | PERFT_SETTINGS | common | options).create_engine_config()


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VllmConfig]:
    """The VllmConfig for a kind of model and options, made once each."""
    made: dict[str, VllmConfig] = {}

    def get(kind: str = "mixtral", **options: Any) -> VllmConfig:
        key = f"{kind} {options}"
        if key not in made:
            made[key] = engine_config(tmp_path_factory.mktemp(kind), kind, **options)
        return made[key]

    return get


def write(
    folder: Path,
    vllm_config: VllmConfig,
    changes: dict[str, Any] | None = None,
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    ranks: dict[str, int] | None = None,
) -> Path:
    """A sound adapter on `modules` of every layer (ranks: other than RANK), its configuration changed by `changes`."""
    tensors: dict[str, torch.Tensor] = {}
    for module, (features_in, features_out) in LoRATarget.of(vllm_config).features.items():
        name = module.rpartition(".")[2]
        rank = (ranks or {}).get(name, RANK)
        if name in modules:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, features_in)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(features_out, rank)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (changes or {})))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def alter(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Rewrite the weights of an adapter, changed."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(
    ("changes", "modules", "ranks"),
    [
        ({}, ("q_proj", "v_proj"), {}),
        ({"target_modules": ["k_proj"], "use_rslora": True, "r": 8}, ("k_proj",), {"k_proj": 8}),
        ({"target_modules": "all-linear", "init_lora_weights": "gaussian"}, ("q_proj", "k_proj", "v_proj"), {}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.self_attn.v_proj": 9}}, ("q_proj",), {"q_proj": 2}),
    ],
)  # fmt: skip
def test_a_sound_adapter_is_taken_and_vllm_loads_it(
    tmp_path: Path, configs: Any, kind: str, changes: dict[str, Any], modules: tuple[str, ...], ranks: dict[str, int]
) -> None:
    vllm_config = configs(kind)
    folder = write(tmp_path / "lora", vllm_config, changes, modules, ranks)
    (folder / "README.md").write_text("for people")
    assert peft_lora_violations(folder, vllm_config) == []
    helper = PEFTHelper.from_local_dir(str(folder), 512)
    helper.validate_legal(vllm_config.lora_config)
    expected = {"q_proj", "k_proj", "v_proj"}
    model = LoRAModel.from_local_checkpoint(str(folder), expected, helper, lora_model_id=1, device="cpu")
    assert len(model.loras) == len(modules) * tiny.LAYERS
    for weights in model.loras.values():
        assert weights.lora_a.shape[0] == weights.lora_b.shape[1] == weights.rank


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_sizes_are_those_of_the_model(configs: Any, kind: str) -> None:
    vllm_config = configs(kind, lora_target_modules=["qkv_proj", "o_proj"])
    features = LoRATarget.of(vllm_config).features
    model = tiny.load(Path(vllm_config.model_config.model))
    assert len(features) == 4 * tiny.LAYERS
    for name, (features_in, features_out) in features.items():
        assert tuple(model.get_submodule(name).weight.shape) == (features_out, features_in)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, ["peft_type"]),
        ({"r": 16}, ["r: found rank 16"]),
        ({"r": True}, ["r: found True"]),
        ({"r": 0}, ["r: found 0"]),
        ({"r": 10**400}, ["r: found 1000"]),
        ({"lora_alpha": "8"}, ["lora_alpha: found '8'"]),
        ({"lora_alpha": 10**400}, ["lora_alpha: found 1000"]),
        ({"lora_alpha": -1}, ["lora_alpha: found -1"]),
        ({"target_modules": None}, ["target_modules: found None"]),
        ({"target_modules": ["q_proj", "w1", "o_proj"]}, ["target_modules: found 'w1'", "target_modules: found 'o_pr"]),
        ({"bias": "all"}, ["bias: found 'all'"]),
        ({"use_dora": True}, ["use_dora: found True"]),
        ({"lora_bias": True}, ["lora_bias: found True"]),
        ({"use_rslora": "yes"}, ["use_rslora: found 'yes'"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights: found 'pissa'"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"use_bdlora": {"x": 1}}, ["use_bdlora"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"modules_to_save": ["score"]}, ["modules_to_save: found ['score']"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out: found True"]),
        ({"target_parameters": ["experts.gate_up_proj"]}, ["target_parameters"]),
        ({"trainable_token_indices": [5]}, ["trainable_token_indices"]),
        ({"a_key_of_tomorrow": {"on": True}}, ["a_key_of_tomorrow"]),
        ({"rank_pattern": {"(a+)+b": 4}}, ["rank_pattern: found {'(a+)+b': 4}"]),
        ({"rank_pattern": {f"m{i}": 4 for i in range(201)}}, ["rank_pattern"]),
        ({"rank_pattern": {"k_proj": 16}}, ["rank_pattern k_proj: found rank 16"]),
        ({"alpha_pattern": {"k_proj": None}}, ["alpha_pattern"]),
    ],
)
def test_a_configuration_that_breaks_a_rule(
    tmp_path: Path, configs: Any, changes: dict[str, Any], expected: list[str]
) -> None:
    folder = write(tmp_path / "lora", configs(), changes)
    if changes.get("r") == 16:
        alter(folder, lambda t: t.update({k: v.repeat((4, 1) if "_A" in k else (1, 4)) for k, v in t.items()}))
    found = peft_lora_violations(folder, configs())
    assert len(found) == len(expected), found
    for violation, start in zip(found, expected, strict=True):
        assert violation.startswith(start) and "expected" in violation


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_required_key_that_is_missing(tmp_path: Path, configs: Any, key: str) -> None:
    folder = write(tmp_path / "lora", configs())
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != key}))
    (violation,) = peft_lora_violations(folder, configs())
    assert violation.startswith(f"{key}: missing, expected")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(CONFIG)[:-1] + ', "r": 4}', "duplicate key 'r'"),
        ("[]", "found an array, expected an object"),
        ("[" * 50_000, "nested too deeply"),
        ("{", "not JSON"),
        (json.dumps(CONFIG | {"revision": "x" * 70_000}), "expected at most 65536"),
        (json.dumps(CONFIG | {"lora_dropout": float("nan")}), "found NaN, which is not a JSON number"),
    ],
)
def test_a_configuration_that_is_no_strict_json(tmp_path: Path, configs: Any, text: str, expected: str) -> None:
    folder = write(tmp_path / "lora", configs())
    (folder / "adapter_config.json").write_text(text)
    (violation,) = peft_lora_violations(folder, configs())
    assert expected in violation


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


FAR = "base_model.model.model.layers.9.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{Q0}B.weight"), [f"{Q0}B.weight: missing"]),
        (put(f"{Q0}A.weight", torch.ones(RANK, 63)), [f"{Q0}A.weight: found shape [4, 63], expected [4, 64]"]),
        (put(f"{Q0}A.weight", torch.ones(8, 64)), [f"{Q0}A.weight: found shape [8, 64], expected [4, 64]"]),
        (put(f"{Q0}B.weight", torch.ones(32, RANK)), [f"{Q0}B.weight: found shape [32, 4], expected [64, 4]"]),
        (put(f"{Q0}B.weight", torch.ones(1, 64, RANK)), [f"{Q0}B.weight: found shape [1, 64, 4]"]),
        (put(f"{Q0}B.weight", torch.ones(64, RANK, dtype=torch.int32)), [f"{Q0}B.weight: found dtype I32"]),
        (put(f"{Q0}B.weight", torch.full((64, RANK), float("nan"))), [f"{Q0}B.weight: 256 of 256 values are not fin"]),
        (put(f"{Q0}A.weight", torch.full((RANK, 64), float("inf"))), [f"{Q0}A.weight: 256 of 256 values are not fin"]),
        (put(f"{Q0}B.weight", torch.full((64, RANK), 3e38)), [f"{Q0}B.weight: found values that overflow"]),
        (put("extra", torch.ones(1)), ["extra: this tensor has no place here"]),
        (put(f"{Q0}A.bias", torch.ones(1)), [f"{Q0}A.bias: this tensor has no place here"]),
        (put("base_model.model.lm_head.base_layer.weight", torch.ones(1)), ["base_model.model.lm_head.base_layer"]),
        (put(f"{Q0}A.default.weight", torch.ones(1)), [f"{Q0}A.default.weight: this tensor has no place"]),
        (put(f"{Q0.replace('q_proj', 'o_proj')}A.weight", torch.ones(4, 64)), [f"{Q0.replace('q_', 'o_')}A.weight"]),
        (put(f"{Q0.replace('.0.', '.00.')}A.weight", torch.ones(4, 64)), [f"{Q0.replace('.0.', '.00.')}A.weight"]),
        (put(f"{FAR}A.weight", torch.ones(4, 64)), [f"{FAR}A.weight: this tensor has no place"]),
        (rename(f"{Q0}A.weight", f"{Q0}A.weight"[len("base_model.model.") :]), ["model.layers.0", f"{Q0}A.weight"]),
        (lambda t: t.clear(), ["adapter_model.safetensors: found no tensor"]),
        (lambda t: t.update({f"x{i}": torch.ones(1) for i in range(150)}), ["x"] * 100 + ["50 more tensors"]),
    ],
)  # fmt: skip
def test_weights_that_break_a_rule(
    tmp_path: Path, configs: Any, change: Callable[[dict[str, torch.Tensor]], object], expected: list[str]
) -> None:
    folder = alter(write(tmp_path / "lora", configs()), change)
    found = peft_lora_violations(folder, configs())
    assert len(found) == len(expected), found
    for violation, start in zip(found, expected, strict=True):
        assert violation.startswith(start)


def test_files_that_do_not_belong_and_files_that_are_missing(tmp_path: Path, configs: Any) -> None:
    folder = write(tmp_path / "lora", configs())
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    (folder / "adapter_model.safetensors").unlink()
    found = peft_lora_violations(folder, configs())
    assert [violation.partition(":")[0] for violation in found] == ["adapter_model.safetensors", "adapter_model.bin"]


def test_every_violation_is_named_at_once(tmp_path: Path, configs: Any) -> None:
    changes = {"r": 16, "use_dora": True, "bias": "all", "target_modules": ["w1"], "modules_to_save": ["lm_head"]}
    folder = alter(write(tmp_path / "lora", configs(), changes), put("extra", torch.ones(1)))
    (folder / "optimizer.pt").touch()
    found = "\n".join(peft_lora_violations(folder, configs()))
    for start in ("optimizer.pt", "r: ", "use_dora", "bias", "target_modules", "modules_to_save", "extra", Q0):
        assert f"\n{start}" in f"\n{found}", start


def test_a_cut_off_weights_file(tmp_path: Path, configs: Any) -> None:
    folder = write(tmp_path / "lora", configs())
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    (violation,) = peft_lora_violations(folder, configs())
    assert violation.startswith("adapter_model.safetensors: not a readable safetensors file")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_overflow_in_the_dtype_that_serves_them(tmp_path: Path, configs: Any, dtype: str) -> None:
    folder = alter(write(tmp_path / "lora", configs()), put(f"{Q0}B.weight", torch.full((64, RANK), 60_000.0)))
    found = peft_lora_violations(folder, configs(dtype=dtype))
    assert bool(found) is (dtype == "float16")
    assert not peft_lora_violations(folder, configs())


def test_only_what_the_operator_opened_is_taken(tmp_path: Path, configs: Any) -> None:
    both = configs(lora_target_modules=["q_proj", "o_proj"])
    folder = write(tmp_path / "lora", both, {"target_modules": ["v_proj", "o_proj"]}, ("v_proj", "o_proj"))
    assert peft_lora_violations(folder, both) == []  # vLLM wraps q, k and v as one
    found = peft_lora_violations(folder, configs())
    assert len(found) == 1 + 2 * tiny.LAYERS and all("o_proj" in violation for violation in found)


def test_a_server_without_lora_takes_none(tmp_path: Path, configs: Any) -> None:
    folder = write(tmp_path / "lora", configs())
    for options in ({"lora_target_modules": None}, {"lora_target_modules": ["lm_head"]}):
        (violation,) = peft_lora_violations(folder, configs(**options))
        assert violation.startswith('peft_type: found "LORA"') and "qkv_proj" in violation


def test_a_model_whose_sizes_are_not_known_takes_none(tmp_path: Path, configs: Any, monkeypatch: Any) -> None:
    folder = write(tmp_path / "lora", configs())
    monkeypatch.setattr(configs().model_config.hf_text_config, "model_type", "deepseek_v3")
    (violation,) = peft_lora_violations(folder, configs())
    assert "not served on the model type deepseek_v3 yet" in violation


def test_the_digest_is_that_of_the_two_files(tmp_path: Path, configs: Any) -> None:
    folder = write(tmp_path / "lora", configs())
    inner = [
        sha256((folder / name).read_bytes()).digest() for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    digest = lora_digest(folder)
    assert digest == sha256(inner[0] + inner[1]).hexdigest()
    (folder / "README.md").touch()
    assert lora_digest(folder) == digest
    alter(folder, put(f"{Q0}A.weight", torch.zeros(RANK, 64)))
    assert lora_digest(folder) != digest


def test_an_adapter_is_read_once_and_its_digest_is_that_of_the_format(
    tmp_path: Path, configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "lora", configs())
    read: list[int] = []
    blocks = values._blocks

    def counted(file: Any, size: int, buffer: memoryview) -> Iterator[memoryview]:
        for block in blocks(file, size, buffer):
            read.append(len(block))
            yield block

    monkeypatch.setattr(values, "_blocks", counted)
    assert check_peft_lora(folder, configs()) == ([], lora_digest(folder))
    weights = (folder / WEIGHTS_FILE).read_bytes()
    data_bytes = len(weights) - 8 - int.from_bytes(weights[:8], "little")
    assert sum(read) == data_bytes
    assert check_peft_lora(folder, configs(), values=False) == ([], None) and sum(read) == data_bytes
