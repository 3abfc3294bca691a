"""Owns how large a regex or a grammar is before anything compiles it: its nesting, and its size with every counted
repetition written out.

An estimate for a cheap first answer, not a parser: what it misjudges is compiled where it can be killed. Invariant: one
pass over the text, no recursion, no native code.
"""

import re
from dataclasses import dataclass

SIZE_CAP = 10**12
"""Sizes are not counted above this: products of repetitions have no bound."""
_ESCAPE = r"\\[pPuUx]\{[^}]*+\}?|\\."
_CLASS = r"\[\^?\]?(?:\\.|[^\]\\])*+\]?"
_REPETITION = r"\{[0-9]*+(?:,[0-9]*+)?\}"
_REGEX = re.compile(rf"{_ESCAPE}|{_CLASS}|{_REPETITION}|[^\\\[(){{|*+?]+|.", re.DOTALL)
_GRAMMAR = re.compile(
    rf""""(?:\\.|[^"\\\n])*+"?|{_ESCAPE}|{_CLASS}|{_REPETITION}|~[ ]*+[0-9]++(?:\.\.[0-9]*+)?|[\w-]+|\S""", re.DOTALL
)
"""Whatever opens and is not closed reaches to the end: nothing is read twice."""
_SYNTAX = "\\[(){|*+?~"
_NUMBERS = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class PatternSize:
    """depth: of parentheses. size: atoms, once the repetitions are written out."""

    depth: int
    size: int


@dataclass
class _Group:
    """An open group. done: the size of what came before `last`, the atom that a repetition would repeat."""

    done: int = 0
    last: int = 0

    def add(self, size: int) -> None:
        self.done = min(self.done + self.last, SIZE_CAP)
        self.last = size

    @property
    def size(self) -> int:
        return min(self.done + self.last, SIZE_CAP)


def syntax_characters(text: str) -> int:
    """How many characters may mean something, which is what `pattern_size` takes time for."""
    return sum(text.count(character) for character in _SYNTAX)


def pattern_size(text: str, is_grammar: bool = False) -> PatternSize:
    """The size of a regex, or of an EBNF or Lark grammar (quotes, names and `~` mean something there)."""
    groups = [_Group()]
    deepest = 0
    for match in (_GRAMMAR if is_grammar else _REGEX).finditer(text):
        token = match[0]
        if token == "(":
            groups.append(_Group())
            deepest = max(deepest, len(groups) - 1)
        elif token == ")":
            if len(groups) > 1:
                size = groups.pop().size
                groups[-1].add(max(size, 1))
        elif token == "|":
            groups[-1].add(0)
        elif token[0] in "{~" and len(token) > 1:
            groups[-1].last = min(groups[-1].last * _repetitions(token), SIZE_CAP)
        elif token not in ("*", "+", "?"):
            _add_atom(groups[-1], token, is_grammar)
    while len(groups) > 1:
        size = groups.pop().size
        groups[-1].add(size)
    return PatternSize(deepest, groups[0].size)


def _add_atom(group: _Group, token: str, is_grammar: bool) -> None:
    """A name, class or escape is one atom; a grammar repeats a literal as a whole, a regex its last character."""
    if is_grammar:
        group.add(len(token) if token[0] == '"' else 1)
        return
    if token[0] not in "\\[" and len(token) > 1:
        group.add(len(token) - 1)
    group.add(1)


def _repetitions(token: str) -> int:
    """The largest number in a counted repetition; at least 1."""
    numbers = [int(digits) if len(digits) <= 12 else SIZE_CAP for digits in _NUMBERS.findall(token)]
    return max([1, *numbers])
