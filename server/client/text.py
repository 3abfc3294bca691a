"""Owns how what a model writes, in many lines, becomes text that a terminal shows and never obeys (one line:
`perft.reading.printable`).

Invariant: what is returned has no control character, escape sequence or mark of direction in it.
"""

from unicodedata import category

from perft.reading import printable

_JOINERS = "\u200c\u200d"
"""Persian and Indic scripts and emoji are written with them."""


def printable_lines(text: str) -> str:
    """The text with all escaped that a terminal would interpret; line ends, tabs and spaces of every script stay,
    carriage returns go."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == "\r":
        return ""
    if character in "\n\t" or character in _JOINERS or category(character) == "Zs":
        return character
    return printable(character)
