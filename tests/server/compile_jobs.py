"""Jobs for the compile process that do as the spec's text says: no vLLM, so that the process starts at once."""

import ctypes
import os
import time
from typing import Any


def make(argument: bytes) -> Any:
    return run


def broken(argument: bytes) -> Any:
    os._exit(3)


def run(fields: dict[str, Any], stop_tokens: list[int]) -> object:
    """The spec {"regex": "WORD NUMBER"} asks for one of these."""
    word, _, number = fields["regex"].partition(" ")
    if word == "crash":
        ctypes.string_at(0)
    if word == "refuse":
        raise ValueError(f"found {number}")
    if word == "spin":
        end = time.process_time() + float(number)
        while time.process_time() < end:
            pass
    if word == "sleep":
        time.sleep(float(number))
    if word == "take":
        return bytearray(int(number))
    if word == "recurse":
        return _recurse(int(number))
    if word == "leave":  # the whole compile process
        os.kill(os.getppid(), 9)
        time.sleep(60)
    return word


def _recurse(depth: int) -> object:
    import json
    import sys

    sys.setrecursionlimit(10**7)
    return json.loads("[" * depth + "]" * depth)
