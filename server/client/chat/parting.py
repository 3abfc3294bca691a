"""Owns where two answers part: the first word in which they differ."""


def parting(first: str, other: str, are_whole: bool) -> int | None:
    """Where in `other` the word begins in which it leaves `first`, or its end; None: it does not, or not yet.

    are_whole: both have ended; until then what one has more than the other is no difference.
    """
    shorter = min(len(first), len(other))
    length = next((at for at in range(shorter) if first[at] != other[at]), shorter)
    is_end = length == shorter
    if first == other or (is_end and not are_whole):
        return None
    if is_end and max(first, other, key=len)[length].isspace():
        return length  # the same words, and then one goes on
    while length > 0 and not other[length - 1].isspace():
        length -= 1
    return length
