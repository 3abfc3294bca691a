"""Owns the paper's defaults by architecture (docs/method.md, "Loss and training")."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperDefaults:
    """Learning rate and coefficient of the auxiliary loss (docs/method.md, "Loss and training")."""

    learning_rate: float
    aux_loss: float


DEFAULTS = {"olmoe": PaperDefaults(1e-5, 0.01), "mixtral": PaperDefaults(2e-5, 0.02)}
OTHERWISE = PaperDefaults(2e-5, 0.01)


def defaults_of(config: Any) -> PaperDefaults:
    """Of a base with this configuration."""
    return DEFAULTS.get(config.model_type, OTHERWISE)
