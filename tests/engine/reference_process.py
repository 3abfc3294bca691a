"""What transformers answers, from a process without vLLM, whose Transformers back end changes their classes."""

from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import tiny

Case = tuple[str, str, dict[str, Any]]


@cache
def _model(folder: str) -> Any:
    return tiny.load(Path(folder))


def _save(folder: str, case: Case, seed: int, output: str) -> None:
    from perft.hf import save

    adapter = tiny.attach_random(_model(folder), case, seed)
    adapter.detach_from_model()
    save(adapter, Path(output))


@torch.inference_mode()
def _logprobs(folder: str, case: Case | None, seed: int, sequence: list[int]) -> Any:
    adapter = None if case is None else tiny.attach_random(_model(folder), case, seed)
    found = _model(folder)(torch.tensor([sequence])).logits[0].log_softmax(-1).numpy()
    if adapter is not None:
        adapter.detach_from_model()
    return found


class ReferenceProcess:
    """A process with transformers alone. `close` ends it."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def save_adapter(self, folder: Path, case: Case, seed: int, output: Path) -> None:
        """Write the random adapter of a case."""
        self._pool.submit(_save, str(folder), case, seed, str(output)).result()

    def logprobs(self, folder: Path, case: Case | None, seed: int, sequence: list[int]) -> torch.Tensor:
        """Log-probabilities [len(sequence), V] after each token, with the adapter of a case or None."""
        found: np.ndarray = self._pool.submit(_logprobs, str(folder), case, seed, sequence).result()
        return torch.from_numpy(found)

    def close(self) -> None:
        self._pool.shutdown()
