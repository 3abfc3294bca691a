"""What the adapters' view works out without a page: names, files to send, comparisons, shares, commands.

The modules are imported in a real browser, straight from the folder: no server.
"""

from collections.abc import Iterator
from contextlib import closing
from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

ORIGIN = "http://console.test/"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BOTH = [CONFIG, WEIGHTS]
VERSION = {
    **{"state": "ready", "reason": None, "peft_type": "PERFT", "variant": "R", "expert_type": "lora"},
    **{"num_experts": 8, "top_k": 2, "bottleneck": 32, "size_bytes": 1000, "rows": 10, "created": 1},
    **{"last_used": None, "resident": "device", "description": None},
}


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    scripts = files("server.console") / "page" / "js"

    def answer(route: Route) -> None:
        path = route.request.url.removeprefix(ORIGIN)
        is_script = path.endswith(".mjs")
        body = scripts.joinpath(path).read_bytes() if is_script else b""
        route.fulfill(body=body, content_type="text/javascript" if is_script else "text/html")

    with closing(browser.new_context()) as context:
        page = context.new_page()
        page.route(f"{ORIGIN}**", answer)
        page.goto(ORIGIN)
        yield page


def call(page: Page, module: str, function: str, *arguments: Any) -> Any:
    return page.evaluate(
        "async ([module, name, given]) => (await import(`/adapters/${module}.mjs`))[name](...given)",
        [module, function, list(arguments)],
    )


def picked(page: Page, *paths: str, limit: int = 1000, size: int = 10) -> dict[str, Any]:
    entries = [{"path": path, "file": {"size": size}} for path in paths]
    found: dict[str, Any] = call(page, "upload/picking", "pick", entries, limit)
    return found


def below(folder: str, names: list[str] = BOTH) -> list[str]:
    return [f"{folder}/{name}" for name in names]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("My Run (3).tar.gz", "my-run-3"),
        ("Äpfel", "apfel"),
        ("__x", "x"),
        ("out/poet/checkpoints/checkpoint-5", "poet"),
        ("final", "final"),
        ("中文", ""),
        ("a" * 80, "a" * 63),
    ],
)
def test_the_name_that_is_proposed(page: Page, path: str, name: str) -> None:
    assert call(page, "names", "nameOfPath", path) == name
    assert name == "" or call(page, "names", "nameProblem", name) is None


@pytest.mark.parametrize("name", ["", "base", "Poet", "-a", "a b", "a/b", "é", "a" * 64, "<script>"])
def test_a_name_that_cannot_be(page: Page, name: str) -> None:
    assert call(page, "names", "nameProblem", name, ["base"])


def test_of_a_trainers_folder_only_the_adapter_is_sent(page: Page) -> None:
    found = picked(page, *below("run"), *below("run/checkpoint-9"), "run/optimizer.pt", "run/.DS_Store")
    (proposal,) = found["proposals"]
    assert (proposal["source"], proposal["name"], proposal["problems"]) == ("run", "run", [])
    assert sorted(proposal["left"]) == [f"checkpoint-9/{CONFIG}", f"checkpoint-9/{WEIGHTS}", "optimizer.pt"]


def test_checkpoints_alone_give_the_last_one(page: Page) -> None:
    found = picked(page, *below("run/checkpoint-9"), *below("run/checkpoint-10"), f"run/{CONFIG}")
    (proposal,) = found["proposals"]
    assert (proposal["source"], proposal["name"]) == ("run/checkpoint-10", "run")
    assert "checkpoint-10" in proposal["notes"][0]


def test_files_of_two_folders_are_never_put_together(page: Page) -> None:
    (proposal,) = picked(page, f"run/a/{CONFIG}", f"run/b/{WEIGHTS}")["proposals"]
    assert proposal["weights"] is None
    assert WEIGHTS in proposal["problems"][0]


def test_several_adapters_are_several_uploads(page: Page) -> None:
    found = picked(page, "one.zip", "two.tgz", *below("all/three"), *below("all/four"))
    assert [each["name"] for each in found["proposals"]] == ["one", "two", "four", "three"]


@pytest.mark.parametrize(
    ("paths", "word"), [(["x.tar.xz"], ".zip"), (["a.bin"], CONFIG), (["a.pdf"], "a.pdf"), ([], "no files")]
)
def test_what_is_no_adapter(page: Page, paths: list[str], word: str) -> None:
    found = picked(page, *paths)
    assert found["proposals"] == []
    assert word in found["problem"]


def test_weights_over_the_limit_and_pickles_are_not_sent(page: Page) -> None:
    (large,) = picked(page, *BOTH, size=2000)["proposals"]
    (pickled,) = picked(page, CONFIG, "adapter_model.bin")["proposals"]
    assert "--max-adapter-bytes" in large["problems"][0]
    assert "adapter_model.bin" in pickled["problems"][0]


@pytest.mark.parametrize(
    ("violation", "parts"),
    [
        (
            "num_experts: found 9, expected 4: variant 'E' has one per base expert",
            ("num_experts", "found 9", "expected 4", "variant 'E' has one per base expert"),
        ),
        (
            "layers.0.down_proj: missing, expected shape [4]",
            ("layers.0.down_proj", "missing", "expected shape [4]", ""),
        ),
        ("alpha: found True: input should be a number", ("alpha", "found True", "expected a number", "")),
        ("found a name that does not print: rename it", ("", "found a name that does not print", "", "rename it")),
        ("<b>: whatever: it, says", ("<b>", "whatever: it, says", "", "")),
    ],
)
def test_the_parts_of_a_violation(page: Page, violation: str, parts: tuple[str, ...]) -> None:
    found = call(page, "advice", "partsOf", violation)
    assert tuple(found[key] for key in ("where", "found", "expected", "todo")) == parts


def test_a_comparison_begins_with_what_differs(page: Page) -> None:
    before = VERSION | {"version": 1, "id": "p@1", "digest": "1" * 64}
    after = VERSION | {"version": 2, "id": "p@2", "digest": "2" * 64, "bottleneck": 16}
    configs = [{"alpha": 32, "layers": [0, 1, 2, 5]}, {"alpha": 16, "layers": [0, 1, 2, 5]}]
    rows = call(page, "one/compare", "compare", before, after, configs)
    differing = {row["title"]: (row["before"], row["after"]) for row in rows if row["differs"]}
    assert set(differing) == {"Bottleneck", "Content (digest)", "Alpha"}
    assert (differing["Bottleneck"], differing["Alpha"]) == (("32", "16"), ("32", "16"))
    assert [row["differs"] for row in rows] == sorted((row["differs"] for row in rows), reverse=True)
    assert {row["title"]: row["after"] for row in rows}["Layers"] == "0\u20132, 5"


def on_device(name: str, rows: int, digest: str | None = None, pinned: bool = False) -> dict[str, Any]:
    version = VERSION | {"version": 1, "id": f"{name}@1", "digest": digest or name, "rows": rows}
    return {"name": name, "active": 1, "pinned": pinned, "allowed_keys": None, "versions": [version]}


def test_equal_contents_share_rows_and_small_ones_are_summed_up(page: Page) -> None:
    adapters = [
        on_device("a", 100),
        on_device("b", 100, digest="a", pinned=True),
        on_device("c", 5),
        on_device("d", 4),
    ]
    pool = call(page, "pool/pool", "poolOf", adapters, True, 150, 1000)
    assert [(each["names"], each["rows"], each["pinned"]) for each in pool["holders"]] == [(["a", "b"], 100, True)]
    assert (pool["others"]["rows"], pool["others"]["adapters"]) == (9, 2)
    assert (pool["besides"], pool["free"], pool["pinned"], pool["count"]) == (41, 850, 100, 4)


def test_who_came_and_who_left(page: Page) -> None:
    first = {"adapters": [on_device("a", 10), on_device("b", 20)], "isAll": True}
    second = {"adapters": [on_device("b", 20), on_device("c", 30)], "isAll": True}
    changes = call(page, "pool/pool", "changesOf", first, second)
    assert ([each["id"] for each in changes["came"]], [each["id"] for each in changes["left"]]) == (["c@1"], ["a@1"])
    cut = second | {"isAll": False}
    assert call(page, "pool/pool", "changesOf", first, cut)["left"] == []


def test_while_a_row_is_pointed_at_the_rows_stay(page: Page) -> None:
    shown = [on_device("a", 1), on_device("b", 1)]
    found = [on_device("c", 1), on_device("b", 7)]
    held = call(page, "listing", "inPlace", shown, found)
    assert [(each["name"], each["versions"][0]["rows"]) for each in held] == [("a", 1), ("b", 7)]


def test_a_command_quotes_what_the_shell_would_read(page: Page) -> None:
    command = call(
        page, "curl", "curlOf", {"method": "PATCH", "url": "http://h/x", "body": {"allowed_keys": ["it's; $(id)"]}}
    )
    assert """-d '{"allowed_keys":["it'\\''s; $(id)"]}'""" in command
    assert '"Authorization: Bearer $PERFT_ADMIN_KEY"' in command


def test_the_address_of_a_part_of_the_table(page: Page) -> None:
    part = {"search": "a b&c", "sort": "-rows", "page": 3}
    assert call(page, "listing", "addressOf", part) == "#/adapters?search=a+b%26c&sort=-rows&page=3"
    assert call(page, "listing", "listRoute", part).endswith("limit=50&offset=100&sort=-rows&search=a+b%26c")
