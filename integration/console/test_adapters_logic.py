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


def test_equal_contents_share_rows_and_only_the_bar_sums_small_ones_up(page: Page) -> None:
    adapters = [
        on_device("a", 100),
        on_device("b", 100, digest="a", pinned=True),
        on_device("c", 5),
        on_device("d", 4),
    ]
    pool = call(page, "pool/pool", "poolOf", adapters, True, 150, 1000)
    assert [(each["names"], each["rows"], each["pinned"]) for each in pool["pieces"]] == [(["a", "b"], 100, True)]
    assert pool["small"] == {"rows": 9, "adapters": 2}
    assert [each["name"] for each in pool["holders"]] == ["a", "c", "d"]
    assert pool["others"] == {"rows": 0, "adapters": 0}
    assert (pool["besides"], pool["free"], pool["pinned"], pool["count"]) == (41, 850, 100, 4)


def test_in_a_large_pool_each_adapter_is_named(page: Page) -> None:
    adapters = [on_device(f"a{number}", 1000 - number) for number in range(12)]
    pool = call(page, "pool/pool", "poolOf", adapters, True, 11_934, 548_528)
    assert [each["name"] for each in pool["holders"]] == [adapter["name"] for adapter in adapters]
    assert call(page, "pool/shares", "restOfList", pool) == []
    (small,) = call(page, "pool/shares", "restOfBar", pool)
    assert (small["title"], small["rows"]) == ("12 small ones", 11_934)


@pytest.mark.parametrize(
    ("rows", "share"),
    [(2992, "0.55 %"), (1000, "0.18 %"), (1, "<0.01 %"), (0, "0 %"), (297_851, "54.3 %"), (548_528, "100 %")],
)
def test_the_pools_head_and_its_list_write_a_share_alike(page: Page, rows: int, share: str) -> None:
    assert call(page, "pool/pool", "shareOf", rows, 548_528) == share
    pool = call(page, "pool/pool", "poolOf", [on_device("a", rows)], True, rows, 548_528)
    assert f"({share})" in call(page, "pool/shares", "summaryOf", pool)


def test_who_came_and_who_left(page: Page) -> None:
    first = {"adapters": [on_device("a", 10), on_device("b", 20)], "isAll": True}
    second = {"adapters": [on_device("b", 20), on_device("c", 30)], "isAll": True}
    changes = call(page, "pool/pool", "changesOf", first, second)
    assert ([each["id"] for each in changes["came"]], [each["id"] for each in changes["left"]]) == (["c@1"], ["a@1"])
    cut = second | {"isAll": False}
    assert call(page, "pool/pool", "changesOf", first, cut)["left"] == []


def held(page: Page, shown: list[str], found: list[str], is_all: bool) -> tuple[list[tuple[str, int, bool]], int]:
    """(name, rows, whether it is gone) of each row that stays while the table is pointed at; how many have none."""
    before, after = ([on_device(name, rows) for name in names] for rows, names in ((1, shown), (7, found)))
    answer = call(page, "listing", "inPlace", before, after, is_all)
    rows = [(each["name"], each["versions"][0]["rows"], each.get("isGone", False)) for each in answer["rows"]]
    return rows, answer["left"]


def test_while_a_row_is_pointed_at_the_rows_stay_and_new_ones_come_last(page: Page) -> None:
    rows, left = held(page, ["a", "b", "d"], ["c", "d", "b"], is_all=True)
    assert rows == [("a", 1, True), ("b", 7, False), ("d", 7, False), ("c", 7, False)]
    assert left == 0


def test_of_several_pages_new_rows_are_only_counted(page: Page) -> None:
    """What is not on this page any more may be on the next."""
    rows, left = held(page, ["a", "b", "d"], ["a", "b", "c"], is_all=False)
    assert rows == [("a", 7, False), ("b", 7, False), ("d", 1, False)]
    assert left == 1


@pytest.mark.parametrize(
    ("allowed", "who"),
    [
        (None, ""),
        ([], " Only the admin key may use it."),
        (["team-a"], " Only team-a may use it."),
        (["team-a", "team-b"], " Only team-a and team-b may use it."),
    ],
)
@pytest.mark.parametrize(
    ("created", "active", "says"),
    [
        (True, 3, "p@3 is new and active."),
        (True, 2, "p@3 is new and stored, not active."),
        (False, 3, "This content already was p@3: no new version was made. It is active."),
    ],
)
def test_an_upload_says_who_may_use_it(
    page: Page, created: bool, active: int, says: str, allowed: list[str] | None, who: str
) -> None:
    adapter = {"name": "p", "active": active, "allowed_keys": allowed}
    answer = {"created": created, "adapter": adapter, "location": "/v1/adapters/p/versions/3"}
    assert call(page, "upload/outcome", "outcomeOf", "p", answer) == {"title": says + who, "model": "p@3"}


@pytest.mark.parametrize("needs_key", [True, False])
def test_the_choice_of_keys_is_true_for_a_name_that_was_deleted(page: Page, needs_key: bool) -> None:
    text = page.evaluate(
        """async (needsKey) => {
          const { session } = await import("/session.mjs");
          const { KeyChoice } = await import("/adapters/key_choice.mjs");
          session.facts = { needs_key: needsKey, key_labels: [] };
          return [undefined, null].map((allowed) => new KeyChoice(allowed).element.textContent);
        }""",
        needs_key,
    )
    everybody = "every key" if needs_key else "everyone"
    assert f"As this name had it, or {everybody} if it never existed" in text[0]
    assert all(everybody.capitalize() in each for each in text)


def test_sizes_that_read_the_same_are_compared_in_bytes(page: Page) -> None:
    versions = [VERSION | {"version": number, "digest": "1", "size_bytes": 1_110_000 + number} for number in (1, 2)]
    row = next(row for row in call(page, "one/compare", "compare", *versions) if row["field"] == "size_bytes")
    assert (row["before"], row["after"]) == ("1,110,001 bytes", "1,110,002 bytes")


def test_a_kind_in_words(page: Page) -> None:
    version = VERSION | {"num_experts": 4, "top_k": 2, "bottleneck": 4}
    assert call(page, "names", "kindOf", version) == "R 2/4 \u00b7 4"
    assert call(page, "names", "kindInWords", version) == "variant R, 2 of 4 lora experts for each token, bottleneck 4"


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
