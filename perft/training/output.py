"""Owns the folder of a training: whether it may be written into, what a killed training left there, where it goes on.

Invariants: nothing that is not a training's own is touched; a checkpoint counts only if it is complete (Trainer writes
`trainer_state.json` last).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from perft.errors import InputError
from perft.hf.files import CONFIG_FILE, WEIGHTS_FILE
from perft.reading import read_json
from perft.training.options import TrainOptions

CARD_FILE = "README.md"
FOLDER = "checkpoints"
_OPTIONS = "options.json"
_STATE = "trainer_state.json"


@contextmanager
def made(options: TrainOptions) -> Iterator[None]:
    """The folder, there and writable; gone again if the training ends before it wrote anything.

    Raises InputError if there is an adapter, or anything that no training wrote.
    """
    output = options.output
    _check_own(output)
    there = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (output / name).exists()]
    if there and not options.overwrite:
        raise InputError(f"{output} has an adapter already: use another --output, or --overwrite")
    is_new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".perft-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write into {output}: {error.strerror}") from None
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # there are checkpoints, from which the same command goes on
                output.rmdir()
        raise


def _check_own(output: Path) -> None:
    """Raises InputError for a folder with anything in it that is no training's."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"cannot write into {output}: found a file or a link, expected a folder or nothing")
    found = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    own = {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, FOLDER}
    foreign = [name for name in found if name not in own]
    checkpoints = output / FOLDER
    if checkpoints.exists() and not (checkpoints / _OPTIONS).is_file():
        foreign.append(FOLDER)
    if found == [CARD_FILE]:
        foreign.append(CARD_FILE)
    if foreign:
        raise InputError(
            f"{output} holds {foreign[0]}, which no training wrote: use another --output, of a new or empty folder"
        )


def claim(options: TrainOptions, say: Callable[[str], None]) -> Path | None:
    """Make OUTPUT/checkpoints this training's own; the checkpoint to go on from, or None.

    Raises InputError if another training left it.
    """
    folder, asked = options.output / FOLDER, options.learned_from()
    if options.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / _OPTIONS).is_file():
        before = read_json(folder / _OPTIONS)
        differing = _differing(before if isinstance(before, dict) else {}, asked)
        if differing:
            raise InputError(
                f"{folder} is of a training with other options: use another --output, or --overwrite to begin anew",
                differing,
            )
        return last_complete(folder, say)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _OPTIONS).write_text(json.dumps(asked, indent=1))
    return None


def last_complete(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint. One that was being written when the training ended is removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if _is_complete(checkpoint):
            return checkpoint
        say(f"{checkpoint} is not complete, and passed over")
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
