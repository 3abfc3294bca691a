"""Owns how text from elsewhere (names, errors, what a model writes) becomes text that a terminal shows and never obeys.

Invariant: what is returned has no control character, escape sequence or mark of direction in it.
"""

from unicodedata import category

from perft.logs import one_line

_JOINERS = "\u200c\u200d"
"""Persian and Indic scripts and emoji are written with them."""


def printable(text: str) -> str:
    """The text as one line, with everything escaped that a terminal would interpret."""
    return one_line(text)


def printable_lines(text: str) -> str:
    """The same for text of many lines: line ends, tabs and spaces of every script stay, carriage returns go."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == "\r":
        return ""
    if character in "\n\t" or character in _JOINERS or category(character) == "Zs":
        return character
    return one_line(character)
