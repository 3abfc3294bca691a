"""NaNs in logits are counted as vLLM counts them, and at a cost only where there can be one."""

import pytest
import torch
from vllm.v1.worker import gpu_model_runner

from perft.engine.nan_counts import counting_seldom, install_nan_counts

INF, NAN = float("inf"), float("nan")


def plain(logits_TV: torch.Tensor) -> torch.Tensor:
    """What vLLM computes."""
    return logits_TV.isnan().sum(dim=-1, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [(), (NAN,), (NAN, NAN, 1.0), (INF,), (INF, -INF), (-INF, NAN), (3e38, 3e38)])
def test_counts_are_vllms(values: tuple[float, ...], dtype: torch.dtype) -> None:
    logits_TV = torch.randn(4, 1000).to(dtype)
    logits_TV[2, : len(values)] = torch.tensor(values, dtype=dtype)
    found = counting_seldom(plain)(logits_TV)
    assert found.dtype == torch.int32 and torch.equal(found, plain(logits_TV))


def test_finite_logits_are_not_counted() -> None:
    def never(logits_TV: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    assert counting_seldom(never)(torch.randn(3, 100)).tolist() == [0, 0, 0]
    assert counting_seldom(never)(torch.randn(0, 100)).tolist() == []


def test_it_is_installed_once() -> None:
    install_nan_counts()
    count = gpu_model_runner.count_nans_per_row
    install_nan_counts()
    assert gpu_model_runner.count_nans_per_row is count and hasattr(count, "counts_seldom")
