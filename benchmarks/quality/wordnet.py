"""Owns WordNet as text: its synsets, from the files that Debian's package wordnet-base ships.

Nothing is installed: the package is downloaded with apt-get and unpacked under build/quality. QUALITY_WORDNET names
another folder with WordNet's `data.noun`, `data.verb`, `data.adj`, `data.adv` (nltk's copy will do).
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.places import BUILD

PACKAGE = "wordnet-base"
PARTS = ("noun", "verb", "adj", "adv")
_EXAMPLE = re.compile(r'"([^"]+)"')


class Synset(NamedTuple):
    """lexfile: the lexicographer's file that it is in (5: noun.animal). words: its lemmas, the most common one first.
    gloss: its definition, without examples. above: the word for what it is a kind of; empty where there is none."""

    part: str
    lexfile: int
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    above: str = ""


def folder() -> Path:
    """Where WordNet's files are; fetched if they are not there."""
    if named := os.environ.get("QUALITY_WORDNET"):
        return Path(named)
    unpacked = BUILD / "wordnet"
    if not unpacked.is_dir():
        _fetch(unpacked)
    return unpacked / "usr" / "share" / "wordnet"


def synsets(where: Path, parts: tuple[str, ...] = PARTS) -> list[Synset]:
    """All synsets, in the order of the files."""
    return [found for part in parts for found in _read(where / f"data.{part}", part)]


def _read(file: Path, part: str) -> Iterator[Synset]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]  # the licence
    first_word = {line.split(" ", 1)[0]: _plain(line.split(" ", 5)[4]) for line in lines}
    for line in lines:
        fields, _, told = line.partition(" | ")
        _, lexfile, _, count, *rest = fields.split()
        last = 2 * int(count, 16)
        words = tuple(_plain(word) for word in rest[:last:2])
        pointers = rest[last + 1 :]
        above = first_word.get(pointers[pointers.index("@") + 1], "") if "@" in pointers else ""
        gloss = _EXAMPLE.sub("", told).split(";")[0].strip(" ;:,")
        if gloss and gloss.isascii():
            yield Synset(part, int(lexfile), words, gloss, tuple(_EXAMPLE.findall(told)), above)


def _plain(word: str) -> str:
    return word.partition("(")[0].replace("_", " ")


def _fetch(unpacked: Path) -> None:
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as made:
        part = Path(made)
        subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=part, check=True)
        (deb,) = part.glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", deb.name, "files"], cwd=part, check=True)
        (part / "files").rename(unpacked)
