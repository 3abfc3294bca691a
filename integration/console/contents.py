"""What the console's demo has in its store: thousands of names over a few hundred contents, with all that can go wrong.

Descriptions hold scripts, control characters and text of both directions: the page must show them as text.
"""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, Limits
from adapters.format.folder import read_folder
from adapters.store import AdapterRecord, FolderStore, VersionRecord
from adapters.store.folder.durable import Disk
from server.uploads.validate import UploadValidator
from tests.server.fakes import BASE
from tests.synthetic import RANDOM_R, write_adapter

CONTENTS = 300
OWN = 100
"""The first names share their content with no other name's active version."""
DAY_S = 86_400
SHAPES: tuple[dict[str, Any], ...] = (
    RANDOM_R,
    RANDOM_R | {"bottleneck": 8, "top_k": 1},
    RANDOM_R | {"num_experts": 8, "top_k": 2, "bottleneck": 4, "renormalize": False},
    {"variant": "E", "expert_type": "lora", "bottleneck": 8, "alpha": 16.0, "num_experts": 4},
    {"variant": "D", "expert_type": "lora", "bottleneck": 4, "alpha": 16.0, "num_experts": 2},
    {"variant": "S", "expert_type": "parallel", "bottleneck": 16, "num_experts": 1},
    {"variant": "S", "expert_type": "lora", "bottleneck": 32, "alpha": 32.0, "num_experts": 1},
    {"variant": "R", "expert_type": "parallel", "bottleneck": 32, "num_experts": 4, "top_k": 2, "renormalize": True},
)
SCRIPT = "<script>document.title = 'owned'; fetch('/v1/adapters', {method: 'POST'})</script>"
IMAGE = '<img src=x onerror="document.title=\'owned\'"> <svg onload=alert(1)> "><b>bold</b> &lt;i&gt; ${1+1} {{7*7}}'
FEATURED: dict[str, tuple[int, str | None]] = {
    "pirate": (3, "Answers as a pirate would, in few words."),
    "arithmetic": (2, "Adds and multiplies numbers of up to four digits."),
    "json": (4, "Answers in JSON, following the schema in the prompt."),
    "poet": (12, "Rhymes, in the metre that is asked for."),
    "contract-law-de": (5, "German contract law; trained on 12 000 annotated clauses. Do not use for advice."),
    "support-triage": (7, "Sorts tickets: queue, urgency, language."),
    "sql-warehouse": (6, "SQL for the warehouse's schema of this quarter."),
    "radiology-notes": (2, None),
    "unused": (1, "Nobody has asked it yet."),
    "no-active-version": (2, "Uploaded, and not activated."),
    "nobody": (1, "No key may use it."),
    "alice-only": (2, "For the key alice."),
    "retired": (2, "Version 1 drains."),
    "other-base": (2, "Version 2 was accepted on another base, and cannot be served."),
    "many-versions": (150, "A nightly run uploads a version each day."),
    "x-script": (1, SCRIPT),
    "x-image": (2, IMAGE),
    "x-javascript-url": (1, "javascript:alert(document.domain) https://evil.example/?q=<svg/onload=alert(1)>"),
    "x-directions": (1, "right to left: \u202egnp.exe\u202c \u05e9\u05dc\u05d5\u05dd mixed \u0627\u0644\u0639\u0631"),
    "x-controls": (1, "two\nlines\ttab \u0000 \u001b[31mred\u001b[0m \u200b zero \ufeff width"),
    "x-long-word": (1, "w" * 1024),
    "x-emoji": (1, "\U0001f469\u200d\U0001f680 trains \U0001f3f4\u200d\u2620\ufe0f at sea"),
    "a" * 63: (2, "The longest name that there can be. " * 25),
}
"""Name -> its versions, and its description."""
PINNED = ("pirate", "json", "unused")
ALLOWED: dict[str, tuple[str, ...]] = {"nobody": (), "alice-only": ("alice",), "contract-law-de": ("alice", "bob")}
WITHOUT_ACTIVE = ("no-active-version",)
AREAS = ("billing", "claims", "legal", "sales", "search", "support", "tutor", "vision", "voice", "wiki")
TASKS = {
    "answer": "Answers questions",
    "classify": "Sorts messages",
    "extract": "Finds names and dates",
    "rewrite": "Rewrites",
    "route": "Chooses who answers",
    "summarise": "Summarises",
    "tag": "Tags documents",
    "translate": "Translates",
}
LANGUAGES = {
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "ja": "Japanese",
    "pl": "Polish",
    "pt": "Portuguese",
}
HOSTILE = ("x-", "aaa")
"""How names begin that are there to see what a page makes of them."""


class Hasty(Disk):
    """A disk whose files may be lost in a crash."""

    def sync_file(self, path: Path) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


def names_of(count: int, has_hostile: bool = True) -> Iterator[str]:
    """`count` different names, the featured ones first."""
    featured = [name for name in FEATURED if has_hostile or not name.startswith(HOSTILE)]
    yield from featured[:count]
    for number in range(count - len(featured)):
        area, task, language = AREAS[number % 10], list(TASKS)[number // 10 % 8], list(LANGUAGES)[number // 80 % 7]
        yield f"{area}-{task}-{language}-{number // 560 + 1:02}"


def about(name: str) -> str:
    """The description of a name that is not featured."""
    area, task, language, number = name.split("-")
    return f"{TASKS[task]} for {area}, in {LANGUAGES[language]}; run {int(number)}."


def fill(folder: Path, count: int, has_hostile: bool = True, seed: int = 0) -> list[str]:
    """Make a store of `count` names in `folder`; returns them, the most used first."""
    store, chance = FolderStore.open(folder, Hasty()), random.Random(seed)
    served = UploadValidator(BASE, Limits(), 1000).base_record
    other = served.model_copy(update={"fingerprint": "f" * 64})
    names = list(names_of(count, has_hostile))
    contents = [_store(store, number) for number in range(min(CONTENTS, count))]
    now = int(time.time())
    for index, name in enumerate(names):
        versions, description = FEATURED.get(name) or (chance.choice((1, 1, 1, 2, 3, 5)), about(name))
        content = contents[index if index < OWN else OWN + index % max(1, len(contents) - OWN)]
        created = now - chance.randrange(400 * DAY_S)
        records = []
        for number in range(1, versions + 1):
            config, digest, weights = contents[(index + 37 * (versions - number)) % len(contents)]
            if number == versions:
                config, digest, weights = content
            values = {"version": number, "digest": digest, "kind": "PERFT", "config": _described(config, description)}
            values["size_bytes"] = weights + len(values["config"].encode())
            created += chance.randrange(1, max(2, (now - created) // 3 + 2))
            is_other = name == "other-base" and number == versions
            base = other if is_other else served
            records.append(VersionRecord(**values, created=min(created, now), base=base))
        allowed = ALLOWED.get(name) if name in FEATURED else chance.choice([None] * 9 + [("bob",)])
        active = None if name in WITHOUT_ACTIVE else 1 if name == "other-base" else versions
        store._names.commit(
            AdapterRecord(
                name=name, active=active, allowed_keys=allowed, pinned=name in PINNED, highest=versions,
                versions=tuple(records),
            )
        )  # fmt: skip
    for number in range(len(contents)):
        if store.get(_first_name(number)) is not None:
            store.start_delete(_first_name(number), None)
            store.finish_delete(_first_name(number), 1)
    store.close()
    return names


def _first_name(number: int) -> str:
    return f"content-{number}"


def _store(store: FolderStore, number: int) -> tuple[str, str, int]:
    """Put a content into the store; its configuration, digest and bytes of weights."""
    values = {"base_model_name_or_path": "demo"} | SHAPES[number % len(SHAPES)]
    with TemporaryDirectory() as temporary:
        made = write_adapter(Path(temporary) / "made", BASE, number, values)
        digest, config = read_folder(made, BASE).digest, (made / CONFIG_FILE).read_text()
        staged = store.stage()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            (staged / file).write_bytes((made / file).read_bytes())
        _, version, _ = store.add(_first_name(number), staged, digest, "PERFT", activate=True)
    return config, digest, version.weights_bytes


def _described(config: str, description: str | None) -> str:
    return config if description is None else json.dumps(json.loads(config) | {"description": description})
