"""The page's modules without a view: what they compute, in the browser that runs them. No server is needed."""

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

import server.console
from integration.browser import opened_page

PAGE = Path(server.console.__file__).parent / "page"
ORIGIN = "http://console.test"
HOSTILE = (
    "it's $HOME `id` $(id) \\ \" ! %s",
    "line\nbreak\ttab\r\x00\x07\x1b[31m",
    "\u202eright to left\u202c \u2066isolated\u2069 \u200b\u2028\ufeff \U0001f469\u200d\U0001f4bb",
    "'''\"\"\" {x} </script> # -d @/etc/passwd",
)
CURL = """#!/bin/sh
while [ $# -gt 0 ]; do
  [ "$1" = -d ] && printf %s "$2"
  [ "$1" = -H ] && echo "$2" >&2
  shift
done
"""
OPENAI = """
import json, sys
class OpenAI:
    def __init__(self, base_url, api_key):
        self.chat = self.completions = self
        self.made = [base_url, api_key]
    def create(self, **given):
        print(json.dumps([*self.made, given]))
        return []
"""
Call = Callable[..., Any]
"""(module, function, *arguments) -> its result."""


@pytest.fixture(scope="module")
def call(browser: Browser) -> Iterator[Call]:
    def serve(route: Route) -> None:
        path = route.request.url.removeprefix(ORIGIN)
        if path == "/":
            route.fulfill(body="<!doctype html><title>modules</title>", content_type="text/html")
        else:
            file = PAGE / path.removeprefix("/console/")
            route.fulfill(body=file.read_bytes(), content_type="text/javascript")

    with opened_page(browser) as page:
        page.route(f"{ORIGIN}/**", serve)
        page.goto(f"{ORIGIN}/")

        def called(module: str, function: str, *arguments: Any) -> Any:
            code = "async ([url, name, given]) => (await import(url))[name](...given)"
            return page.evaluate(code, [f"{ORIGIN}/console/js/{module}", function, list(arguments)])

        called.page = page  # type: ignore[attr-defined]
        yield called


def marked(found: dict[str, Any]) -> str:
    signs = {"same": "{}", "own": "[{}]", "gap": "|"}
    return "".join(signs[part["kind"]].format(part["text"]) for part in found["parts"])


@pytest.mark.parametrize(
    ("reference", "text", "wanted", "at"),
    [
        ("the same words", "the  same\nwords ", "the  same\nwords ", None),
        ("a very big ship sails on", "a big ship sails on", "a |big ship sails on", 1),
        ("we all sail on the sea", "we all sail on the sea today", "we all sail on the sea [today]", 6),
        ("one two three", "one two", "one two|", 2),
        ("the quick brown fox runs", "the slow brown fox runs", "the [slow ]brown fox runs", 1),
        ("x the a the b the c", "x q the r the s the", "x [q the r the s the]", 1),
        ("x a b c d", "x 1 2 3 4 5 6 7 8 a b c 9", "x [1 2 3 4 5 6 7 8 a b c 9]", 1),
        ("", "new", "[new]", 0),
        ("\u4f60\u597d\u5417", "\u4f60\u597d\u554a", "\u4f60\u597d[\u554a]", 2),
    ],
)
def test_the_words_that_differ_are_marked(call: Call, reference: str, text: str, wanted: str, at: int | None) -> None:
    found = call("playground/words.mjs", "compare", reference, text)
    assert marked(found) == wanted
    assert found["at"] == at


def test_the_parts_are_the_text(call: Call) -> None:
    chance = random.Random(7)
    for _ in range(60):
        reference, text = ("".join(chance.choices("ab,. \n\u00e9\u4f60", k=chance.randrange(40))) for _ in range(2))
        for function in ("compare", "compareGrowing"):
            found = call("playground/words.mjs", function, reference, text)
            assert "".join(part["text"] for part in found["parts"]) == text, (function, reference, text)


def test_a_growing_text_parts_only_by_whole_words(call: Call) -> None:
    def grown(text: str) -> Any:
        return call("playground/words.mjs", "compareGrowing", "one two three", text)["at"]

    assert [grown(text) for text in ("one t", "one two th", "one zwei dr")] == [None, None, 1]


NO_SETTINGS = {"system": "", "temperature": "", "top_p": "", "max_tokens": "", "seed": "", "stop": ""}


@pytest.mark.parametrize("prompt", HOSTILE)
def test_code_asks_what_was_asked_whatever_the_prompt_has(call: Call, prompt: str, tmp_path: Path) -> None:
    settings = NO_SETTINGS | {"system": prompt, "temperature": "0.5", "max_tokens": "9", "stop": "a\\nb\n\\\\n"}
    before = [{"prompt": "first", "text": prompt}]
    body = call("playground/request.mjs", "bodyOf", "chat", "poet@2", before, prompt, settings)
    assert body["messages"] == [
        {"role": "system", "content": prompt},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": prompt},
        {"role": "user", "content": prompt},
    ]
    assert (body["temperature"], body["max_tokens"], body["stop"]) == (0.5, 9, ["a\nb", "\\n"])
    assert "top_p" not in body and "seed" not in body
    curl = tmp_path / "curl"
    curl.write_text(CURL)
    curl.chmod(0o755)
    (tmp_path / "openai.py").write_text(OPENAI)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PERFT_API_KEY": "secret", "PYTHONPATH": str(tmp_path)}

    command = call("playground/snippets.mjs", "curlOf", "http://h/v1/chat/completions", body, True)
    assert "secret" not in command and command.isprintable() is False and "\u202e" not in command
    said = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == body
    assert "Authorization: Bearer secret" in said.stderr

    program = call("playground/snippets.mjs", "openaiOf", "http://h/v1", body, True, True)
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    base, key, asked = json.loads(said.stdout)
    assert (base, key) == ("http://h/v1", "secret")
    assert asked == {name: value for name, value in body.items() if name != "stream_options"}


def test_plain_text_goes_on_where_the_answer_ended(call: Call) -> None:
    before = [{"prompt": "Once", "text": " there was"}]
    body = call("playground/request.mjs", "bodyOf", "text", "base", before, " a ship", NO_SETTINGS)
    assert body["prompt"] == "Once there was a ship"
    assert "messages" not in body and "stop" not in body


def test_what_does_not_print_is_shown_by_its_number(call: Call) -> None:
    shown = call("text.mjs", "visible", "a\x00\x1b[31m\u202a\u202eb\u2069\r\nc\td<b>")
    assert (
        shown
        == "a\u27e8U+0000\u27e9\u27e8U+001B\u27e9[31m\u27e8U+202A\u27e9\u27e8U+202E\u27e9b\u27e8U+2069\u27e9\nc\td<b>"
    )


def test_axes_begin_at_0_and_have_three_or_four_marks(call: Call) -> None:
    for largest, is_whole in itertools.product((0, 1, 2, 3, 7, 31, 97, 1744, 1e7), (True, False)):
        found = call("watch/ticks.mjs", "valueTicks", largest, is_whole)
        assert found["ticks"][0] == 0 and len(found["ticks"]) in (3, 4), (largest, found)
        assert found["top"] >= largest and found["top"] == pytest.approx(found["ticks"][-1])
        assert not is_whole or all(float(tick).is_integer() for tick in found["ticks"]), found
    assert call("watch/ticks.mjs", "valueTicks", 0.0003)["top"] == pytest.approx(0.0003)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (750, "750"), (1000, "1k"), (7500, "7.5k"), (600_000, "600k"), (1_500_000, "1.5M")],
)
def test_marks_of_an_axis_are_short(call: Call, value: float, text: str) -> None:
    assert call("format.mjs", "short", value) == text


@pytest.mark.parametrize(
    ("first", "begin"),
    [(None, 940), (990, 940), (850, 850), (600, 700)],
    ids=["none", "just now", "since then", "full"],
)
def test_a_time_axis_begins_with_the_first_point(call: Call, first: float | None, begin: float) -> None:
    assert call("watch/ticks.mjs", "axisBegin", float("nan") if first is None else first, 1000, 300) == begin


def test_whoever_asks_for_the_same_metrics_shares_the_answer(call: Call) -> None:
    """Of one adapter too, in turns with those of all; who gave way asks for nothing."""
    code = """async () => {
      const { reads, scrape } = await import("/console/js/scrape.mjs");
      const told = [];
      const queryOf = (path) => new URL(path, location).search;
      reads.addEventListener("read", ({ detail }) => told.push([queryOf(detail.path), detail.scrape.at]));
      const queries = ["", "", "?adapter=a", "?adapter=b", "?adapter=b"];
      const asked = queries.map((query) => scrape(`/console/metrics${query}`));
      const found = await Promise.allSettled(asked);
      const again = [];
      for (const query of ["?adapter=b", ""]) again.push(await scrape(`/console/metrics${query}`, 60));
      const up = (scrape) => scrape.sum("up");
      return [told, found.map(({ value, reason }) => (value ? up(value) : reason.name)), again.map(up)];
    }"""
    page: Page = call.page  # type: ignore[attr-defined]
    page.route(f"{ORIGIN}/console/metrics**", lambda route: route.fulfill(body="up 7\n", content_type="text/plain"))
    told, found, again = page.evaluate(code)
    assert [query for query, _ in told] == ["", "?adapter=b"]
    assert told[1][1] - told[0][1] > 0.9
    assert found == [7, 7, "AbortError", 7, 7] and again == [7, 7]


def test_what_was_read_just_before_is_shown_at_once(call: Call) -> None:
    """Of the view that is left, by the one that is opened: without a question of its own."""
    code = """async () => {
      const { scrape } = await import("/console/js/scrape.mjs");
      const { sourceOf } = await import("/console/js/watch/source.mjs");
      await scrape("/console/metrics?adapter=just-read");
      const source = sourceOf("just-read");
      const point = new Promise((resolve) => source.addEventListener("point", () => resolve(source.last.sum("up"))));
      const stop = source.read(60);
      const found = await point;
      stop();
      return found;
    }"""
    page: Page = call.page  # type: ignore[attr-defined]
    asked: list[str] = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(body="up 7\n", content_type="text/plain")

    page.route(f"{ORIGIN}/console/metrics?adapter=just-read", answer)
    assert page.evaluate(code) == 7 and len(asked) == 1


def test_pages_that_began_together_do_not_go_on_together(call: Call) -> None:
    """A pause between two polls is 15 % shorter to 15 % longer than what was asked for."""
    code = """async () => {
      const { every } = await import("/console/js/poll.mjs");
      const pauses = [];
      window.setTimeout = (_, milliseconds) => pauses.push(milliseconds);
      for (let page = 0; page < 100; page += 1) every(4, async () => {});
      await new Promise((resolve) => requestAnimationFrame(resolve));
      return pauses;
    }"""
    page: Page = call.page  # type: ignore[attr-defined]
    try:
        pauses = page.evaluate(code)
    finally:
        page.reload()
    assert len(pauses) == 100 and 3400 <= min(pauses) < 3700 and 4300 < max(pauses) <= 4600


def test_code_needs_no_key_where_the_server_needs_none(call: Call, tmp_path: Path) -> None:
    body = call("playground/request.mjs", "bodyOf", "chat", "poet", [], "Hi", NO_SETTINGS)
    assert "Authorization" not in call("playground/snippets.mjs", "curlOf", "http://h/v1/chat/completions", body, False)
    (tmp_path / "openai.py").write_text(OPENAI)
    program = call("playground/snippets.mjs", "openaiOf", "http://h/v1", body, False, True)
    environment = {"PYTHONPATH": str(tmp_path)}
    said = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert json.loads(said)[1] == "unused"


def test_the_ring_forgets_the_oldest_and_has_gaps_where_nothing_came(call: Call) -> None:
    code = """async () => {
      const { Ring } = await import("/console/js/watch/ring.mjs");
      const ring = new Ring(5);
      const points = {1: {a: 1}, 2: {a: 2}, 3: {a: 3}, 4: {}, 5: {a: 5, b: 1}, 6: {a: 6, b: 2}, 20: {a: 7}};
      for (const [text, values] of Object.entries(points)) {
        const time = Number(text);
        ring.push(time, values);
        if (time === 2 || time === 5) ring.markRestart(time);
      }
      return [ring.length, ring.timeAt(0), ring.pieces("a", 0), ring.pieces("b", 0), ring.nearest(12), ring.nearest(99),
        ring.largest(["a", "b"], 0), ring.restartsSince(0), ring.firstAt(5.5)];
    }"""
    length, oldest, pieces, later, near, last, largest, restarts, first = call.page.evaluate(code)  # type: ignore[attr-defined]
    assert (length, oldest) == (5, 3)
    assert pieces == [[0], [2, 3], [4]]
    assert later == [[2, 3]]
    assert (near, last, largest, first) == (3, 4, 7, 3)
    assert 5 in restarts


def derived(call: Call, before: str, after: str, adapter: str = "") -> dict[str, Any]:
    code = """async ([before, after, adapter]) => {
      const { Scrape, Span } = await import("/console/js/metrics.mjs");
      const { ofAll, ofAdapter, byAdapter, wasRestarted } = await import("/console/js/watch/derive.mjs");
      const [a, b] = [new Scrape(before, 100), new Scrape(after, 110)];
      const span = new Span(a, b);
      const point = adapter ? ofAdapter(adapter, b, span, span) : ofAll(b, span, span);
      return { point, rows: byAdapter(span), restarted: wasRestarted(a, b) };
    }"""
    found: dict[str, Any] = call.page.evaluate(code, [before, after, adapter])  # type: ignore[attr-defined]
    return found


def metrics(generated: int, stopped: int, left: int, failed: int, first: tuple[int, int], expert: int = 0) -> str:
    return f"""
vllm:generation_tokens_total{{model_name="base"}} {generated}
vllm:num_requests_running{{model_name="base"}} 3
perft_adapter_requests_total{{adapter="poet",finish_reason="stop"}} {stopped}
perft_adapter_requests_total{{adapter="poet",finish_reason="abort"}} {left}
perft_adapter_requests_total{{adapter="poet",finish_reason="engine_unavailable"}} {failed}
perft_adapter_requests_waiting{{adapter="poet"}} 2
perft_adapter_time_to_first_token_seconds_sum{{adapter="poet"}} {stopped * 0.5}
perft_adapter_time_to_first_token_seconds_count{{adapter="poet"}} {stopped}
vllm:time_to_first_token_seconds_bucket{{le="0.1"}} {first[0]}
vllm:time_to_first_token_seconds_bucket{{le="0.5"}} {first[1]}
vllm:time_to_first_token_seconds_bucket{{le="+Inf"}} {first[1]}
http_requests_total{{handler="/v1/models",status="4xx"}} 5
http_requests_total{{handler="/v1/models",status="2xx"}} 50
perft_expert_tokens_total{{adapter="poet",expert="0"}} {expert}
"""


def test_points_are_rates_quantiles_and_errors_by_code(call: Call) -> None:
    found = derived(call, metrics(100, 10, 1, 0, (4, 4)), metrics(600, 40, 1, 2, (4, 14), expert=9))
    point = found["point"]
    assert point["generation"] == 50
    assert point["requests"] == pytest.approx(3.2)
    assert (point["running"], point["waiting"]) == (3, 2)
    assert point["first50"] == pytest.approx(0.3)
    assert point["error:engine_unavailable"] == pytest.approx(12)
    assert (point["error:abort"], point["errors"]) == (0, pytest.approx(12))
    assert point["http:4xx"] == 0 and "http:2xx" not in point and "error:stop" not in point
    assert not found["restarted"]
    (row,) = found["rows"]
    assert (row["name"], row["waiting"], row["first"]) == ("poet", 2, pytest.approx(0.5))
    one = derived(call, metrics(100, 10, 1, 0, (4, 4)), metrics(600, 40, 1, 2, (4, 14), expert=9), "poet")["point"]
    assert (one["waiting"], one["expert:0"]) == (2, 9) and one["requests"] == pytest.approx(3.2)


def test_counters_that_begin_anew_are_a_restart_and_a_deleted_adapter_is_none(call: Call) -> None:
    before = metrics(100, 10, 1, 0, (4, 4))
    assert derived(call, before, metrics(7, 1, 0, 0, (0, 0)))["restarted"]
    deleted = "\n".join(line for line in before.splitlines() if "poet" not in line)
    assert not derived(call, before, deleted)["restarted"]


@pytest.mark.parametrize(
    ("tokens", "options", "kind"),
    [
        ([970, 10, 10, 10], {}, "collapsed"),
        ([500, 500, 4, 4], {"perToken": 2}, "collapsed"),
        ([250, 260, 240, 250], {}, "even"),
        ([600, 250, 100, 50], {}, "uneven"),
        ([400, 400, 400, 2], {"perToken": 2}, "uneven"),
        ([50, 50], {}, "few"),
        ([0, 0], {}, "none"),
    ],
)
def test_the_use_of_experts_is_judged(call: Call, tokens: list[int], options: dict[str, Any], kind: str) -> None:
    found = call("watch/evenness.mjs", "judge", tokens, options)
    assert found["kind"] == kind, found
    if kind == "collapsed":
        assert "collapsed" in found["text"]
        own = call("watch/evenness.mjs", "judge", tokens, options | {"isOwn": False})
        assert "Train again" in found["text"] and "base's router" in own["text"]
    if kind not in ("none", "few"):
        assert found["share"] == pytest.approx(max(tokens) / sum(tokens))
        assert 0 <= found["evenness"] <= 1
