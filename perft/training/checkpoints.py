"""Owns OUTPUT/checkpoints: what a killed training left, whether it is this one, and from where it goes on.

Invariant: a checkpoint counts only if it is complete. Trainer writes `trainer_state.json` last.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from perft.errors import InputError
from perft.training.options import TrainOptions

FOLDER = "checkpoints"
_OPTIONS = "options.json"
_STATE = "trainer_state.json"


def claim(output: Path, options: TrainOptions) -> Path | None:
    """Make OUTPUT/checkpoints this training's own; the checkpoint to go on from, or None.

    Raises InputError if another training left it.
    """
    folder = output / FOLDER
    asked = options.learned_from()
    if options.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / _OPTIONS).is_file():
        differing = _differing(json.loads((folder / _OPTIONS).read_text()), asked)
        if differing:
            raise InputError(
                f"{folder} is of a training with other options: use another --output, or --overwrite to begin anew",
                differing,
            )
        return last_complete(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _OPTIONS).write_text(json.dumps(asked, indent=1))
    return None


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint. One that was being written when the training ended is removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if _is_complete(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_text())
        files = list(checkpoint.glob("*.safetensors"))
        for file in files:
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(files)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"--{key.replace('_', '-')}: found {before.get(key)!r} there, and {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
