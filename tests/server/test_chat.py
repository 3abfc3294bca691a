"""`perft chat` against a real HTTP server that streams: piped, on a pseudo-terminal, and what can go wrong."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from server.client.chat.command import run
from tests.server.adapter_api import serving
from tests.server.live_api import EVIL, EVIL_SHOWN, LiveApi
from tests.server.terminal import assert_harmless, on_terminal

API_KEY = "an-api-key"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveApi]:
    """A server whose base is `tiny`."""
    answers = {
        "tiny": ["The", " sea", " is", " wide."], "poet": ["The", " sea", " is", " deep."],
        "evil": ["a", EVIL, "b"], "half": ["As", " far"], "long": ["It", " begins"],
    }  # fmt: skip
    errors = {"gone": "adapter_unavailable", "half": "adapter_deleted"}
    with serving(LiveApi(answers=answers, errors=errors, midway={"half"}, endless={"long"})) as running:
        monkeypatch.setenv("PERFT_SERVER", running.url)
        monkeypatch.setenv("PERFT_API_KEY", API_KEY)
        yield running


def piped(arguments: Sequence[str], stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from server.cli import main; main()", "chat", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def without_numbers(text: str) -> str:
    return re.sub(r"first token [\d.]+ m?s, [\d.,]+ tokens/s", "TIMES", text)


def test_one_answer_is_its_text_and_the_numbers_are_beside_it(api: LiveApi) -> None:
    done = piped(
        ["--model", "poet", "How is the sea?", "--max-tokens", "9", "--temperature", "0", "--system", "Be brief"]
    )
    assert (done.returncode, done.stdout) == (0, "The sea is deep.\n")
    assert without_numbers(done.stderr) == "-- poet@1: TIMES, 4 tokens\n"
    (asked,) = api.chats
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("poet", 9, 0)
    system, user = {"role": "system", "content": "Be brief"}, {"role": "user", "content": "How is the sea?"}
    assert asked["messages"] == [system, user]
    assert api.keys == [f"Bearer {API_KEY}"]


def test_without_a_model_the_base_answers_and_the_prompt_may_be_piped(api: LiveApi) -> None:
    done = piped([], b"Wie ist das Meer?\n")
    assert (done.returncode, done.stdout) == (0, "The sea is wide.\n")
    assert api.chats[0]["model"] == "tiny" and "temperature" not in api.chats[0]
    assert api.chats[0]["messages"] == [{"role": "user", "content": "Wie ist das Meer?"}]


def test_several_answers_stand_one_after_the_other_and_errors_stop_no_other(api: LiveApi) -> None:
    done = piped(["--base", "--model", "gone", "--model", "poet", "--model", "half", "--model", "nothing", "Hm?"])
    assert done.returncode == 1 and done.stderr == ""
    base, gone, poet, half, unknown = without_numbers(done.stdout).split("\n\n")
    assert base == "== tiny ==\nThe sea is wide.\n-- TIMES, 4 tokens"
    assert gone == f"== gone ==\nerror: adapter_unavailable: it cannot be served {EVIL_SHOWN} \\r\\x08\\x7f"
    assert poet == "== poet@1 ==\nThe sea is deep.\n-- TIMES, 4 tokens, parts from tiny at word 4: deep."
    assert half.startswith("== half@1 ==\nAs far\nerror: adapter_deleted: it was deleted\n-- first token ")
    assert unknown == "== nothing@1 ==\n-- 0 tokens\n"


def test_on_a_terminal_they_stand_side_by_side_with_the_word_marked_where_they_part(api: LiveApi) -> None:
    with on_terminal("chat", "--base", "--model", "poet", "--model", "gone", "Hm?", columns=120) as terminal:
        assert terminal.wait() == 1
        terminal.assert_clean()
        final = terminal.raw.rpartition("\x1b[?1049l")[2]
        plain = [line.split("│") for line in re.sub(r"\x1b\[[0-9;]*m", "", final).splitlines()]
        rows = [[cell.strip() for cell in row] for row in plain if len(row) == 3]
        assert rows[0] == ["tiny", "poet@1", "gone"]
        assert rows[1][:2] == ["The sea is wide.", "The sea is deep."] and rows[1][2].startswith("error: adapter_unav")
        assert "The sea is \x1b[7mdeep.\x1b[0m" in final
        assert "parts from tiny at word 4" in final


def test_too_many_columns_for_the_terminal_stand_one_below_the_other(api: LiveApi) -> None:
    with on_terminal("chat", "--base", "--model", "poet", "--model", "half", "Hm?", columns=60) as terminal:
        assert terminal.wait() == 1
        terminal.assert_clean()
        assert "== tiny ==\r\nThe sea is wide.\r\n" in terminal.raw


@pytest.mark.parametrize("others", [[], ["--base", "--model", "gone"]])
def test_what_a_model_writes_is_text(api: LiveApi, others: list[str]) -> None:
    shown = EVIL_SHOWN.replace("\\r", "")
    with on_terminal("chat", "--model", "evil", *others, "Hm?", columns=400) as terminal:
        terminal.wait()
        assert f"a{shown} \\x08\\x7fb" in terminal.text
        terminal.assert_clean()
    done = piped(["--model", "evil", *others, "Hm?"])
    assert f"a{shown} \\x08\\x7fb" in done.stdout
    assert_harmless(done.stdout + done.stderr)


def test_unicode_s_line_ends_end_no_event(api: LiveApi) -> None:
    api.answers["poet"] = ["one\u2028", "two\x85three\n", "four"]
    assert piped(["--model", "poet", "Hm?"]).stdout == "one\\u2028two\\x85three\nfour\n"


@pytest.mark.parametrize("others", [[], ["--model", "poet"]])
def test_ctrl_c_shows_what_there_is_and_leaves_the_terminal_clean(api: LiveApi, others: list[str]) -> None:
    with on_terminal("chat", "--model", "long", *others, "Hm?", columns=120) as terminal:
        terminal.wait_for("begins")
        if others:
            terminal.wait_for("deep.")
        terminal.send("\x03")
        assert terminal.wait() == 130
        terminal.assert_clean()
        final = re.sub(r"\x1b\[[0-9;]*m", "", terminal.raw.rpartition("\x1b[?1049l")[2])
        assert "It begins" in final and "interrupted" in final and "Traceback" not in final
        assert not others or "The sea is deep." in final


def test_the_columns_follow_the_terminal_s_size(api: LiveApi) -> None:
    with on_terminal("chat", "--model", "long", "--model", "poet", "Hm?", columns=120) as terminal:
        terminal.wait_until(lambda lines: any(line.startswith(" It begins") and "deep." in line for line in lines))
        terminal.resize(60, 12)
        lines = terminal.wait_until(lambda lines: len(lines) <= 12 and max(map(len, lines)) <= 60)
        assert any("It begins" in line and "The sea is deep." in line for line in lines)
        terminal.send("\x03")
        assert terminal.wait() == 130


def test_a_session_keeps_each_model_s_history_of_its_own(api: LiveApi) -> None:
    with on_terminal("chat", "--base", "--model", "poet", "--model", "gone", columns=120) as terminal:
        terminal.wait_for("/reset forgets")
        for prompt, chats in (("One", 3), ("Two", 6), ("/reset", 6), ("Three", 9)):
            terminal.wait_until(lambda _: terminal.raw.endswith("> "))
            terminal.send(f"{prompt}\r")
            terminal.wait_until(lambda _, chats=chats: len(api.chats) == chats)
        terminal.wait_until(lambda _: terminal.raw.endswith("> "))
        terminal.send("/exit\r")
        assert terminal.wait() == 0
    asked: dict[str, list[list[str]]] = {}
    for chat in api.chats:
        asked.setdefault(chat["model"], []).append([message["content"] for message in chat["messages"]])
    assert asked["tiny"] == [["One"], ["One", "The sea is wide.", "Two"], ["Three"]]
    assert asked["poet"] == [["One"], ["One", "The sea is deep.", "Two"], ["Three"]]
    assert asked["gone"] == [["One"], ["Two"], ["Three"]]


def test_ctrl_c_in_a_session_ends_the_answer_alone(api: LiveApi) -> None:
    with on_terminal("chat", "--model", "long") as terminal:
        terminal.wait_for("/reset forgets")
        terminal.send("Go\r")
        terminal.wait_for("begins")
        terminal.send("\x03")
        terminal.wait_for("interrupted")
        terminal.send("\x04")
        assert terminal.wait() == 0


def test_a_key_that_is_refused_is_named_by_its_variable_and_not_shown(api: LiveApi, capsys: Any) -> None:
    api.errors["poet"] = "invalid_api_key"
    api.refused = 401
    assert run(["--model", "poet", "Hm?", "--key", "a-wrong-key"]) == 1
    shown = capsys.readouterr()
    assert "invalid_api_key: " in shown.err and "set an API key with PERFT_API_KEY or --key" in shown.err
    assert "a-wrong-key" not in shown.out + shown.err


def test_no_server_is_one_sentence(capsys: Any) -> None:
    for arguments in (["Hm?"], ["--model", "poet", "Hm?"]):
        assert run([*arguments, "--server", "http://127.0.0.1:9"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "found no server at http://127.0.0.1:9" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "a", "--model", "a", "Hm?"], "found 'a' more than once"),
        ([*(part for name in "abcde" for part in ("--model", name)), "Hm?"], "found 5 models, expected at most 4"),
        (["--model", "a\x1b[2J", "Hm?"], "expected a model's name"),
        (["--max-tokens", "0", "Hm?"], "expected a number from 1"),
        (["--temperature", "nan", "Hm?"], "expected a number from 0"),
        (["--key", "with space", "Hm?"], "found a key with a space"),
        (["  "], "found an empty prompt"),
        (["\udcff"], "found text that is not UTF-8"),
    ],
)
def test_wrong_usage_is_said(api: LiveApi, capsys: Any, arguments: list[str], expected: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(arguments)
    shown = capsys.readouterr().err
    assert expected in " ".join(shown.split()) and "with space" not in shown
    assert_harmless(shown)
    assert not api.chats
