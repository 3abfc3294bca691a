"""A captured graph without a GPU: the launches of a step are recorded and can be launched again, with nothing else.

As in a CUDA graph, a replay runs no Python of the back end: it takes the kernels, the grids and the addresses that the
recording has, and whatever lies at those addresses by then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from perft.operator.gpu import backend as triton_backend


@dataclass
class Recording:
    """Launches in their order: kernel, grid, arguments, constants."""

    launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def replay(self) -> None:
        for kernel, grid, arguments, constants in self.launches:
            kernel[grid](*arguments, **constants)

    def described(self) -> list[tuple[Any, ...]]:
        """What a graph would keep of each launch: addresses in place of tensors."""
        return [
            (kernel.fn.__name__, grid, *map(address, arguments), *sorted(constants.items()))
            for kernel, grid, arguments, constants in self.launches
        ]

    def variants(self) -> set[tuple[Any, ...]]:
        """What decides which code a launch needs compiled: the types of pointers, the constants."""
        return {
            (
                kernel.fn.__name__,
                *(argument.dtype for argument in arguments if isinstance(argument, torch.Tensor)),
                *sorted(constants.items()),
            )
            for kernel, _, arguments, constants in self.launches
        }


def address(argument: Any) -> Any:
    """A tensor's address and type; a number as it is."""
    return (argument.data_ptr(), argument.dtype) if isinstance(argument, torch.Tensor) else argument


@contextmanager
def recorded() -> Iterator[Recording]:
    """Records every launch in this context, and carries it out."""
    recording, launch = Recording(), triton_backend.launch

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        recording.launches.append((kernel, grid, arguments, constants))
        launch(kernel, grid, *arguments, **constants)

    with mock.patch.object(triton_backend, "launch", record):
        yield recording
