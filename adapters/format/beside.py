"""Owns what may lie beside an adapter's files where people hand it in: a trainer's files, a system's, more weights.

What a trainer and an operating system leave in a folder is not stored, not opened, and (a system's apart) named in a
note; so is a pickle beside the weights. Another file of weights is a violation: only its owner knows which of them are
the adapter's.

Invariant: names are judged, never content; a note has no character that does not print.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from adapters.format.files import CONFIG_FILE, README_FILE, WEIGHTS_FILE
from adapters.format.recognize import PICKLE
from perft.reading import printable

MAX_NOTES = 20
SHOWN_CHARACTERS = 120
MAX_ENTRIES = 100_000
"""How many entries of a folder are looked at."""

_SYSTEM = frozenset(
    {"__macosx", ".ds_store", "thumbs.db", "desktop.ini", ".appledouble", ".spotlight-v100", ".trashes"}
)
_PLAIN_WEIGHTS = (".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TRAINERS = re.compile(
    r"(optim|scheduler|lr_scheduler|(grad_)?scaler|rng_state|random_state|training_|train_|trainer|eval|sampler"
    r"|dataloader|custom_checkpoint|(bf16_|fp16_)?zero_pp_rank|events\.out)|.*optim_states"
)
_TRAINERS_FOLDER = re.compile(r"global_step\d+|(optimizer|pytorch_model_fsdp)_\d+|runs|wandb|logs?|\.git|\.cache")


def folded(name: str) -> str:
    """One spelling of all names that some file system takes for equal."""
    return unicodedata.normalize("NFKC", name).casefold().rstrip(". ")


def is_systems(path: str) -> bool:
    """Whether a path (with "/") is what an operating system leaves in an archive or folder."""
    return any(part.startswith("._") or part.casefold() in _SYSTEM for part in path.split("/"))


def weights_problem(path: str, are_weights_there: bool) -> str | None:
    """Why a path (with "/"), which is not the weights file, must not be ignored; None if it may be.

    are_weights_there: whether there is a weights file too. Then a pickle is what a trainer wrote of the same weights.
    """
    *folders, name = path.casefold().split("/")
    if not _looks_like_weights(name) or any(_TRAINERS_FOLDER.fullmatch(folder) for folder in folders):
        return None
    if are_weights_there:
        more = f"not part of an adapter, but looks like more weights than {WEIGHTS_FILE}"
        keep = f"keep the adapter's as {WEIGHTS_FILE}, and remove or rename the other file"
        return None if name.endswith(_PICKLES) else f"{more}: {keep}"
    if name.endswith(".safetensors"):
        return f"the weights must be one file called {WEIGHTS_FILE}: rename this one if it holds them"
    what = PICKLE if name.endswith(_PICKLES) else "not safetensors: convert it"
    return f"the weights must be in {WEIGHTS_FILE}; this is {what}"


def _looks_like_weights(name: str) -> bool:
    return name.endswith((*_PLAIN_WEIGHTS, *_PICKLES)) and not _TRAINERS.match(name)


def ignored_notes(paths: Iterable[str], within: str = "") -> list[str]:
    """A note for each path (with "/") that was ignored, those in one folder together; at most MAX_NOTES and one more.

    within: the folder of the adapter's files, with a "/" at its end.
    """
    counts = Counter(_group(path, within) for path in paths if not is_systems(path))
    shown = [f"{_short(group)}: {_ignored(group, number)}" for group, number in sorted(counts.items())[:MAX_NOTES]]
    left = sum(counts.values()) - sum(number for _, number in sorted(counts.items())[:MAX_NOTES])
    return [*shown, f"{left} more files were ignored"] if left else shown


def _group(path: str, within: str) -> str:
    """What a note names: the file, or the folder that holds it and not the adapter's files."""
    if path.startswith(within):
        first, slash, _ = path[len(within) :].partition("/")
        return first + slash
    parts, ours = path.split("/"), within.split("/")
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, ours, strict=False)))
    return "/".join(parts[: common + 1]) + "/" * (common + 1 < len(parts))


def _ignored(group: str, number: int) -> str:
    if group == README_FILE:
        return "not kept: an adapter is stored as its two files"
    if _looks_like_weights(group.casefold()):
        return f"ignored and never opened: the adapter's weights are {WEIGHTS_FILE}"
    return "ignored, not part of an adapter" + (f" ({number} files)" if number > 1 else "")


def _short(text: str) -> str:
    return printable(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "...")


@dataclass(frozen=True)
class HandedIn:
    """An adapter in somebody's folder. notes: what lies beside its files. violations: why it is not clear which it is.

    folder: where its files are, or should be.
    """

    folder: Path
    notes: tuple[str, ...] = ()
    violations: tuple[str, ...] = ()


def adapter_in(path: Path) -> HandedIn:
    """The adapter in the folder `path`: its own files, else those of the one subfolder that has an adapter.

    Only names are looked at; neither files nor links are opened. Raises OSError.
    """
    is_given = True
    while not _holds_adapter(path):
        subfolders = _subfolders(path)
        held = [folder for folder in subfolders if _holds_both(folder)]
        if len(held) > 1:
            shown = ", ".join(_short(f"{folder.name}/") for folder in held[:MAX_NOTES])
            return HandedIn(path, (), (f"found adapters in several subfolders ({shown}): name one of them",))
        if not held and len(subfolders) != 1:
            return HandedIn(path)
        path, is_given = (held or subfolders)[0], False
    return _beside(path, () if is_given else (f"{_short(path.name)}/: the adapter was found in this subfolder",))


def _beside(folder: Path, notes: tuple[str, ...]) -> HandedIn:
    names = [f"{e.name}/" if e.is_dir(follow_symlinks=False) else e.name for e in _entries(folder)]
    others = [name for name in names if name not in (CONFIG_FILE, WEIGHTS_FILE)]
    files = [name for name in others if not name.endswith("/") and not is_systems(name)]
    problems = [(name, weights_problem(name, WEIGHTS_FILE in names)) for name in files]
    violations = tuple(_short(name) + f": {problem}" for name, problem in problems if problem)
    left_out = [_short(name) for name in sorted(others) if not is_systems(name)]
    if left_out:
        more = f" and {len(left_out) - MAX_NOTES} more" if len(left_out) > MAX_NOTES else ""
        notes = (*notes, f"only the two files of an adapter are taken, without {', '.join(left_out[:MAX_NOTES])}{more}")
    return HandedIn(folder, notes, violations)


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).exists() or (folder / name).is_symlink() for name in (CONFIG_FILE, WEIGHTS_FILE))


def _holds_both(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


def _subfolders(folder: Path) -> list[Path]:
    found = [entry for entry in _entries(folder) if entry.is_dir(follow_symlinks=False)]
    return sorted(Path(entry.path) for entry in found if not is_systems(entry.name))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry, _ in zip(entries, range(MAX_ENTRIES), strict=False)]
