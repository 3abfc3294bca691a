"""Owns the decompression of an archive, a block at a time.

Invariant: a stream ends exactly where the archive says, or is an error; at most two blocks of it are in memory.
"""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

BLOCK_BYTES = 256 * 1024
RAW_DEFLATE = -zlib.MAX_WBITS
GZIP = 16 + zlib.MAX_WBITS


class DamagedArchiveError(ValueError):
    """The archive is not what it says it is; the message is the violation."""


def stored(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    """The `length` bytes at `start`, unchanged."""
    file.seek(start)
    while length:
        block = file.read(min(BLOCK_BYTES, length))
        if not block:
            raise DamagedArchiveError("the archive ends too early: it was cut off")
        length -= len(block)
        yield block


def inflated(file: BinaryIO, start: int, length: int, window: int) -> Iterator[bytes]:
    """Unpack the compressed bytes file[start : start + length]. window: GZIP or RAW_DEFLATE."""
    engine = zlib.decompressobj(window)
    left = length
    try:
        for packed in stored(file, start, length):
            left -= len(packed)
            rest = packed
            while rest and not engine.eof:
                block = engine.decompress(rest, BLOCK_BYTES)
                rest = engine.unconsumed_tail
                if block:
                    yield block
            if engine.eof and (left or engine.unused_data):
                raise DamagedArchiveError("bytes follow the end of the compressed data: remove them")
        while not engine.eof and (block := engine.decompress(b"", BLOCK_BYTES)):
            yield block
    except zlib.error as error:
        raise DamagedArchiveError(f"the compressed data is damaged ({error})") from error
    if not engine.eof:
        raise DamagedArchiveError("the compressed data ends too early: it was cut off")
