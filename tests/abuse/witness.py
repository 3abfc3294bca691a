"""Another tenant who streams while a server is attacked: a process of its own, so that the attack is not on its clock.

    python -m tests.abuse.witness URL KEY MODEL [SEED]

Streams one completion after the other until its standard input ends, then prints what it saw as JSON.
"""

import json
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import httpx

TOKENS = 100
ADDRESS = "127.0.0.2"
"""The witness's own: an address has only so many connections, and the attackers take all of theirs."""
LIMIT_S = 500.0


@dataclass
class Seen:
    """longest_gap_s: between two events of one stream. longest_first_s: from a request to its first event. streams:
    read to their end. failures: whatever was no whole stream."""

    longest_gap_s: float = 0.0
    longest_first_s: float = 0.0
    streams: int = 0
    failures: list[str] = field(default_factory=list)


class Witness(AbstractContextManager["Witness"]):
    """The process; `seen` is there once the block has ended."""

    seen: Seen

    def __init__(self, url: str, key: str, model: str) -> None:
        command = [sys.executable, "-m", "tests.abuse.witness", url, key, model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "streaming\n", "the witness could not stream before the attack"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            out, _ = self._process.communicate("", timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self.seen = Seen(**json.loads(out.splitlines()[-1]))


def watch(client: httpx.Client, body: dict[str, Any], seen: Seen) -> None:
    """Read one stream to its end."""
    began = last = time.monotonic()
    tokens = 0
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                seen.failures.append(f"{response.status_code} {response.text[:500]}")
                return
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                if tokens == 0:
                    seen.longest_first_s = max(seen.longest_first_s, now - began)
                else:
                    seen.longest_gap_s = max(seen.longest_gap_s, now - last)
                last = now
                if line == "data: [DONE]":
                    break
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    seen.failures.append(json.dumps(event)[:500])
                    return
                tokens += sum(len(choice["token_ids"] or ()) for choice in event["choices"])
    except httpx.HTTPError as error:
        seen.failures.append(repr(error))
        return
    if tokens != TOKENS:
        seen.failures.append(f"{tokens} tokens instead of {TOKENS}")
    else:
        seen.streams += 1


def main(url: str, key: str, model: str) -> None:
    has_ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), has_ended.set()), daemon=True).start()
    body = {"model": model, "prompt": [5, 9, 42], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "stream": True}
    seen = Seen()
    headers = {"Authorization": f"Bearer {key}"}
    own = httpx.HTTPTransport(local_address=ADDRESS)
    with httpx.Client(base_url=url, headers=headers, timeout=LIMIT_S, transport=own) as client:
        watch(client, body, seen)
        if seen.failures:
            raise SystemExit(f"no stream before the attack: {seen.failures}")
        print("streaming", flush=True)
        seen = Seen()
        while not has_ended.is_set():
            watch(client, body, seen)
            time.sleep(0.05 if seen.failures else 0)
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    main(*sys.argv[1:4])
