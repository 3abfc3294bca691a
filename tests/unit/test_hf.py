"""One behavioural suite over every variant x expert type on every kind of model: what attaching does and undoes."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from adapters.format.folder import read_folder
from perft.base_model import base_fingerprint, base_of_config
from perft.checkpoint import checkpoint_fingerprint
from perft.hf import PerftAdapter, attach, moe_blocks, save, shape_of
from perft.reference import BaseRouting, reference_delta
from tests import tiny

Case = tuple[str, str, dict[str, Any]]
CASES = tiny.every_variant()
MOE_LAYERS = {"mixtral": (0, 1, 2, 3), "olmoe": (0, 1, 2, 3), "qwen3_moe": (0, 1, 2)}


def name_of(case: Case) -> str:
    return "-".join([case[0], case[1], *(f"{key}={value}" for key, value in case[2].items())])


@pytest.fixture(scope="session", params=tiny.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of each kind. Its name is the kind's."""
    built: Path = tiny.build(request.param, tmp_path_factory.mktemp("models") / request.param)
    return built


@pytest.fixture(scope="session")
def model(folder: Path) -> nn.Module:
    return tiny.load(folder)


@pytest.fixture(scope="session")
def base_logits(model: nn.Module) -> torch.Tensor:
    return logits(model)


@pytest.fixture(params=CASES, ids=name_of)
def fresh(request: pytest.FixtureRequest, model: nn.Module) -> Iterator[PerftAdapter]:
    """A fresh adapter of every case on every model; taken off afterwards."""
    variant, expert_type, changes = request.param
    adapter = attach(model, tiny.adapter_config(model, variant, expert_type, **changes))
    yield adapter
    adapter.detach_from_model()


@pytest.fixture
def adapter(fresh: PerftAdapter) -> PerftAdapter:
    """The same with weights whose delta is as large as the block's own output."""
    return tiny.randomize(fresh, seed=1)


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def test_a_fresh_adapter_is_the_base(model: nn.Module, fresh: PerftAdapter, base_logits: torch.Tensor) -> None:
    assert torch.equal(logits(model), base_logits)


def test_on_off_and_detached(model: nn.Module, adapter: PerftAdapter, base_logits: torch.Tensor) -> None:
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, base_logits, atol=1e-2)
    adapter.enabled = False
    assert torch.equal(logits(model), base_logits)
    adapter.enabled = True
    assert torch.equal(logits(model), with_adapter)
    adapter.detach_from_model()
    assert torch.equal(logits(model), base_logits)


def test_a_block_adds_the_reference_delta(model: nn.Module, adapter: PerftAdapter) -> None:
    """What the block says with the adapter, less what it says without, at every layer that carries it."""
    carrying = dict(adapter.by_layer())
    for layer, block in moe_blocks(model).items():
        x_BTD = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(layer))
        x_TD = x_BTD.flatten(0, 1)
        adapter.enabled = False
        with torch.no_grad():
            without = block.module(x_BTD)
            adapter.enabled = True
            delta_TD = (block.module(x_BTD) - without).flatten(0, 1)
            _, scores_TJ, chosen_TJ = block.router(x_TD)
            logits_TN = x_TD @ block.router_weight.T
            weights_TN = torch.zeros_like(logits_TN).scatter(1, chosen_TJ, scores_TJ)
            if layer not in carrying:
                assert torch.equal(delta_TD, torch.zeros_like(delta_TD))
                continue
            routing = BaseRouting(logits_TN, weights_TN)
            expected = reference_delta(adapter.config, carrying[layer].weights(), x_TD, routing)
            own = carrying[layer](x_TD, adapter.base_routers[layer])
        assert expected.norm() > 0
        assert (own - expected).norm() <= 1e-5 * expected.norm()
        assert (delta_TD - expected).norm() <= 1e-5 * (expected.norm() + without.norm())


def test_which_layers_carry_it(model: nn.Module, folder: Path, adapter: PerftAdapter) -> None:
    expected = MOE_LAYERS[folder.name] if adapter.config.layers is None else adapter.config.layers
    assert tuple(index for index, _ in adapter.by_layer()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saved_and_read(model: nn.Module, adapter: PerftAdapter, tmp_path: Path, dtype: torch.dtype) -> None:
    shape = shape_of(model)
    save(adapter, tmp_path / "deep" / "a", dtype)
    checked = read_folder(tmp_path / "deep" / "a", shape)
    assert checked.config == adapter.config
    read, trained = checked.layer_weights(shape), dict(adapter.by_layer())
    assert read.keys() == trained.keys()
    for layer, weights in read.items():
        for name in ("router", "down_proj", "up_proj"):
            tensor, parameter = getattr(weights, name), getattr(trained[layer], name)
            assert (tensor is None) == (parameter is None)
            assert tensor is None or torch.equal(tensor, parameter.detach().to(dtype).float())


def test_saving_twice_gives_the_same_identity(model: nn.Module, adapter: PerftAdapter, tmp_path: Path) -> None:
    digests = set()
    for name in "ab":
        save(adapter, tmp_path / name)
        digests.add(read_folder(tmp_path / name, shape_of(model)).digest)
    assert len(digests) == 1


def test_only_the_adapter_learns(model: nn.Module, adapter: PerftAdapter) -> None:
    """A `base_slot` router only chooses and orders, so it alone gets no gradient."""
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = torch.randint(tiny.VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for layer, module in adapter.by_layer():
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad
            if name == "router" and adapter.config.gate_weight == "base_slot":
                assert parameter.grad is None
            else:
                assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), (
                    f"{name} at layer {layer} gets no gradient"
                )


def test_a_fresh_adapter_begins_to_learn(model: nn.Module, fresh: PerftAdapter) -> None:
    """`up_proj` is zero at first, and it is the one that gets a gradient."""
    tokens = torch.randint(tiny.VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens).loss.backward()
    for _, module in fresh.by_layer():
        assert module.up_proj.grad is not None and module.up_proj.grad.any()


def test_dropout_is_only_for_training(model: nn.Module, adapter: PerftAdapter) -> None:
    x_TD = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    index, layer = next(adapter.by_layer())
    with torch.no_grad():
        moe_blocks(model)[index].module(x_TD.unsqueeze(0))
        given = (x_TD, adapter.base_routers[index])
        plain = layer(*given)
        layer.dropout = 0.5
        assert not torch.equal(layer.train()(*given), plain)
        assert torch.equal(layer.eval()(*given), plain)


MISFITS: list[tuple[str, dict[str, Any], str]] = [
    ("E", {"num_experts": 3}, "num_experts: found 3"),
    ("E", {"num_experts": 16}, "num_experts: found 16"),
    ("S", {"layers": (0, 4)}, "layers: found 4, the base has layers 0 to"),
    ("D", {"layers": (9, 65535)}, "layers: found 9.*layers: found 65535"),
    ("R", {"top_k": 4, "renormalize": False, "gate_weight": "base_slot"}, "top_k: found 4"),
]


@pytest.mark.parametrize(("variant", "changes", "message"), MISFITS)
def test_what_does_not_fit_the_model(model: nn.Module, variant: str, changes: dict[str, Any], message: str) -> None:
    """Refused as `read_folder` would refuse it, and nothing is left on the model."""
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=message):
        attach(model, tiny.adapter_config(model, variant, "lora", **changes))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dense_layer_of_the_model_is_no_moe_layer(tmp_path: Path) -> None:
    model = tiny.load(tiny.build("qwen3_moe", tmp_path / "qwen3_moe"))
    with pytest.raises(ValueError, match=r"layers: found 3, which is not an MoE layer"):
        attach(model, tiny.adapter_config(model, "S", "lora", layers=(2, 3)))


DENSE = {
    "llama": LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}  # fmt: skip


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_model_is_refused(kind: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(DENSE[kind])
    for refusing in (moe_blocks, shape_of):
        with pytest.raises(ValueError, match=type(model).__name__):
            refusing(model)
    model.save_pretrained(tmp_path)
    assert checkpoint_fingerprint(tmp_path) is None


def test_shape(folder: Path, model: nn.Module) -> None:
    shape, config = shape_of(model), tiny.config_of(folder.name)
    experts, top_k = {"mixtral": (4, 2), "olmoe": (8, 3), "qwen3_moe": (6, 2)}[folder.name]
    found = (shape.hidden_size, shape.num_layers, shape.moe_layers, shape.num_experts, shape.top_k, shape.dtype)
    assert found == (config.hidden_size, tiny.LAYERS, MOE_LAYERS[folder.name], experts, top_k, torch.float32)


def test_the_shape_is_known_from_the_config_alone(folder: Path, model: nn.Module) -> None:
    from_config = base_of_config(tiny.config_of(folder.name), torch.float32)
    assert from_config is not None and replace(shape_of(model), fingerprint=None) == from_config


@pytest.mark.parametrize(
    ("step", "dense", "expected"),
    [(1, [], (0, 1, 2, 3)), (1, [3], (0, 1, 2)), (2, [], (1, 3)), (2, [1], (3,)), (3, [0], (2,)), (5, [], ())],
)
def test_sparse_layers_of_a_config(step: int, dense: list[int], expected: tuple[int, ...]) -> None:
    config = tiny.config_of("qwen3_moe")
    config.decoder_sparse_step, config.mlp_only_layers = step, dense
    shape = base_of_config(config, torch.float32)
    assert shape is not None and shape.moe_layers == expected


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_config_is_no_base(kind: str) -> None:
    assert base_of_config(DENSE[kind], torch.float32) is None


def test_the_fingerprint_is_of_little_endian_float32() -> None:
    """docs/format.md: the router weights, layer after layer, whatever type they are held in."""
    first, second = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]], dtype=torch.bfloat16)
    expected = sha256(struct.pack("<4f", 1.0, -2.0, 0.5, 3.0)).hexdigest()
    assert base_fingerprint([first, second]) == expected != base_fingerprint([second, first])


def test_the_fingerprint_of_the_files_is_that_of_the_model(folder: Path, model: nn.Module) -> None:
    assert checkpoint_fingerprint(folder) == shape_of(model).fingerprint


def test_the_fingerprint_of_a_sharded_bfloat16_checkpoint(folder: Path, tmp_path: Path) -> None:
    model: Any = tiny.load(folder).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert checkpoint_fingerprint(tmp_path) == shape_of(model).fingerprint != checkpoint_fingerprint(folder)


def test_the_fingerprint_is_of_the_routers_alone(folder: Path) -> None:
    model = tiny.load(folder)
    before = shape_of(model).fingerprint
    model.get_submodule("lm_head").get_parameter("weight").data += 1
    assert shape_of(model).fingerprint == before
    block = moe_blocks(model)[1]
    block.router_weight.data[0, 0] += 1
    assert shape_of(model).fingerprint != before


def test_the_routers_logits_are_recorded_once(model: Any) -> None:
    """transformers takes its auxiliary loss from them."""
    tokens = torch.arange(3, 13).unsqueeze(0)
    plain = len(model(tokens, output_router_logits=True).router_logits)
    adapter = attach(model, tiny.adapter_config(model, "E", "lora"))
    assert len(model(tokens, output_router_logits=True).router_logits) == plain
    adapter.detach_from_model()


def test_one_adapter_at_a_time_and_training_follows_the_model(model: Any) -> None:
    config = tiny.adapter_config(model, "S", "lora")
    first = attach(model, config, dropout=0.5)
    with pytest.raises(ValueError, match="already carries an adapter"):
        attach(model, config)
    tiny.randomize(first, seed=0)
    tokens = torch.arange(3, 13).unsqueeze(0)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits), "no dropout once the model is in eval mode"
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    first.detach_from_model()
    attach(model, config).detach_from_model()
