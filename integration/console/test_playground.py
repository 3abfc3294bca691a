"""The playground in a real browser, before a real server: streams side by side, where they part, and their code."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from integration.console.conftest import Open
from integration.console.real_server import KEYS, MARKUP_EVERY, RealServer, adapter
from tests.server.tiny_server import BASE_NAME, TinyClient

PROMPT = "t7 t8 t9 t11"
LONG = 120


POET, CLERK = "poet", "clerk"


@dataclass
class Made:
    """The numbers of the versions of POET, of which the first is active, and of CLERK."""

    first: int
    second: int
    clerk: int


@pytest.fixture
def made(admin: TinyClient, tmp_path: Path) -> Made:
    numbers = []
    for name, seed, is_active in ((POET, 1, True), (POET, 2, False), (CLERK, 3, True)):
        response = admin.upload(name, adapter(tmp_path / f"{name}-{seed}", seed), is_active)
        assert response.status_code == 201, response.text
        numbers.append(int(response.headers["location"].rpartition("/")[2]))
    return Made(*numbers)


def column(page: Page, model: str) -> Locator:
    return page.get_by_role("region", name=model, exact=True)


def answer(page: Page, model: str) -> Locator:
    return column(page, model).locator(".turn-text").last


def fact(page: Page, model: str, name: str) -> Locator:
    exact = re.compile(f"^{name}$")
    return column(page, model).locator("dt", has_text=exact).locator("xpath=following-sibling::dd")


def ask(page: Page, prompt: str = PROMPT, **settings: Any) -> None:
    page.get_by_text("Settings", exact=False).first.click()
    for label, value in {"Temperature": 0, "Max tokens": 24, **settings}.items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Ask", exact=True).click()


@dataclass
class Greedy:
    """What the API answers to the same prompt."""

    text: str
    reason: str
    tokens: int


def greedy(client: TinyClient, model: str, tokens: int = 24) -> Greedy:
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, "temperature": 0}
    response = client.http.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    values = response.json()
    (choice,) = values["choices"]
    return Greedy(choice["message"]["content"], choice["finish_reason"], values["usage"]["completion_tokens"])


def is_over(page: Page, *models: str) -> None:
    for model in models:
        expect(fact(page, model, "Ended with")).to_have_text(re.compile("^(length|stop)$"))


def test_side_by_side_answers_are_the_servers_and_their_parting_is_marked(
    admin: TinyClient, made: Made, open_console: Open
) -> None:
    second = f"poet@{made.second}"
    models = {BASE_NAME: BASE_NAME, "poet": f"poet@{made.first}", second: second, "clerk": f"clerk@{made.clerk}"}
    columns = "&".join(f"model={model}" for model in models)
    page = open_console("alice", f"#/playground?{columns}")
    ask(page)
    for model, answered in models.items():
        expect(fact(page, model, "Answered by")).to_have_text(answered)
        wanted = greedy(admin, model)
        expect(fact(page, model, "Ended with")).to_have_text(wanted.reason)
        expect(fact(page, model, "Tokens").first).to_have_text(str(wanted.tokens))
        expect(fact(page, model, "First token")).to_have_text(re.compile(r"\d"))
        expect(answer(page, model)).to_have_text(wanted.text)
    base = greedy(admin, BASE_NAME).text.split()
    for model in list(models)[1:]:
        theirs = greedy(admin, model).text.split()
        assert theirs != base
        same = next(n for n, words in enumerate(zip(base, theirs, strict=False)) if words[0] != words[1])
        marked = answer(page, model).locator("mark")
        expect(column(page, model).locator(".turn-note")).to_contain_text(f"from {BASE_NAME}")
        expect(answer(page, model).locator("span").first).to_have_text(" ".join(base[:same])) if same else None
        expect(marked.first).to_have_text(starts_with(theirs[same]))
    expect(answer(page, BASE_NAME).locator("mark")).to_have_count(0)


def starts_with(text: str) -> Any:
    return re.compile(r"^\s*" + re.escape(text))


def test_another_reference_is_compared_with(admin: TinyClient, made: Made, open_console: Open) -> None:
    page = open_console("alice", f"#/playground?model={BASE_NAME}&model=poet")
    ask(page)
    is_over(page, "poet")
    page.get_by_role("button", name="Compare the others with poet").click()
    expect(column(page, BASE_NAME).locator(".turn-note")).to_contain_text("poet")
    expect(answer(page, "poet").locator("mark")).to_have_count(0)


def test_models_are_added_removed_and_other_versions_chosen(admin: TinyClient, made: Made, open_console: Open) -> None:
    page = open_console("alice", "#/playground")
    expect(column(page, BASE_NAME)).to_be_visible()
    page.get_by_role("button", name="Add a model").click()
    dialog = page.get_by_role("dialog", name="Add a model")
    dialog.get_by_label("Adapter").fill("poe")
    expect(dialog.get_by_role("listitem")).to_have_count(1)
    dialog.get_by_role("button", name="poet").click()
    expect(dialog).to_have_count(0)
    expect(page.get_by_label("Version of poet").locator("option")).to_have_count(3)
    page.get_by_label("Version of poet").select_option(str(made.second))
    expect(column(page, f"poet@{made.second}")).to_be_visible()
    assert page.url.endswith(f"#/playground?model={BASE_NAME}&model=poet@{made.second}")
    page.get_by_role("button", name=f"Remove {BASE_NAME}").click()
    expect(column(page, BASE_NAME)).to_have_count(0)


def test_the_snippets_ask_the_same(
    admin: TinyClient, made: Made, open_console: Open, real: RealServer, tmp_path: Path
) -> None:
    page = open_console("alice", "#/playground?model=poet")
    ask(page)
    is_over(page, "poet")
    page.get_by_role("button", name="Code of the request to poet").click()
    dialog = page.get_by_role("dialog")
    codes = dialog.locator("pre").all_inner_texts()
    assert len(codes) == 2 and all(KEYS["alice"] not in code for code in codes)
    environment = {"PERFT_API_KEY": KEYS["alice"], "PATH": "/usr/bin:/bin"}
    curl, program = codes
    assert curl.startswith("curl ") and real.url in curl
    said = subprocess.run(["sh", "-c", curl], env=environment, capture_output=True, text=True, check=True).stdout
    assert f'"model":"poet@{made.first}"' in said and said.rstrip().endswith("data: [DONE]")
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == greedy(admin, "poet").text.strip()


def test_markup_in_an_answer_is_text(admin: TinyClient, made: Made, open_console: Open) -> None:
    page = open_console("alice", f"#/playground?model={BASE_NAME}&model=poet&model=clerk")
    ask(page, f"<script>owned()</script> {PROMPT}", **{"Max tokens": LONG, "Temperature": 2, "Seed": 5})
    is_over(page, BASE_NAME, "poet", "clerk")
    texts = [answer(page, model).inner_text() for model in (BASE_NAME, "poet", "clerk")]
    assert any("<script>owned(" in text for text in texts) and any("<img/src=x" in text for text in texts), texts
    assert MARKUP_EVERY > 1
    assert page.locator("main script, main img").count() == 0


def test_an_unknown_model_says_so_beside_the_others(admin: TinyClient, made: Made, open_console: Open) -> None:
    page = open_console("alice", "#/playground?model=poet&model=nobody")
    ask(page)
    expect(column(page, "nobody").get_by_text("model_not_found").first).to_be_visible()
    is_over(page, "poet")


def test_stop_ends_the_streams_on_the_server_too(
    admin: TinyClient, made: Made, open_console: Open, real: RealServer
) -> None:
    page = open_console("alice", "#/playground?model=poet&model=clerk")
    with real.engine_still():
        ask(page, **{"Max tokens": 300})
        page.get_by_role("button", name="Stop", exact=True).click()
        for model in ("poet", "clerk"):
            expect(fact(page, model, "Ended with")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
