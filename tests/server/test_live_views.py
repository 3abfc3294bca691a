"""`perft top`, `perft adapters list --watch` and the progress bars on a pseudo-terminal, against a real HTTP server."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from server.client.commands import run
from server.client.live.top import run as run_top
from server.client.table import ADAPTER_COLUMNS
from tests.server.adapter_api import KEY, serving
from tests.server.live_api import EVIL, EVIL_SHOWN, LiveApi
from tests.server.terminal import Terminal, on_terminal


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveApi]:
    with serving(LiveApi()) as running:
        monkeypatch.setenv("PERFT_SERVER", running.url)
        monkeypatch.setenv("PERFT_ADMIN_KEY", KEY)
        running.add("poet", "1" * 64, requests_running=1, last_used=None)
        running.add("maths", "2" * 64, requests_running=4, rows=16, resident="host")
        yield running
        running.may_answer.set()


def watching(*arguments: str, **how: Any) -> Any:
    return on_terminal("adapters", "list", "--watch", "--interval", "0.1", *arguments, **how)


def interrupted(terminal: Terminal) -> None:
    """Ctrl-C ends it with 130, says nothing, and leaves the terminal as it was."""
    terminal.send("\x03")
    assert terminal.wait() == 130
    terminal.assert_clean()
    assert "Traceback" not in terminal.raw and "interrupted" not in terminal.raw


def port_of(api: LiveApi) -> int:
    return int(api.url.rsplit(":", 1)[1])


# --- perft adapters list --watch


def test_the_watched_table_changes_in_place(api: LiveApi) -> None:
    with watching() as terminal:
        first = terminal.wait_for("poet")
        assert re.split(" {2,}", first[2]) == list(ADAPTER_COLUMNS)
        assert [line.split()[0] for line in first[3:5]] == ["maths", "poet"]
        api.add("law", "3" * 64)
        second = terminal.wait_for("law")
        assert [line.split()[0] for line in second[3:6]] == ["law", "maths", "poet"]
        interrupted(terminal)


def test_a_narrow_terminal_gets_fewer_columns(api: LiveApi) -> None:
    with watching() as terminal:
        terminal.wait_for("LAST USED")
        terminal.resize(60, 20)
        lines = terminal.wait_until(lambda lines: len(lines) <= 20 and "LAST USED" not in lines[2])
        assert max(map(len, lines)) <= 60 and "STATE" in lines[2] and "RUNNING" in lines[2]
        assert any(line.startswith("poet ") for line in lines)
        terminal.send("q")
        assert terminal.wait() == 0
        terminal.assert_clean()


def test_more_adapters_than_lines_are_counted(api: LiveApi) -> None:
    for number in range(40):
        api.add(f"a-{number:02}", "4" * 64)
    with watching(lines=12) as terminal:
        lines = terminal.wait_for("and 34 more")
        assert len(lines) <= 12 and lines[3].startswith("a-00")
        terminal.send("q")
        assert terminal.wait() == 0


def test_the_versions_of_one_adapter_are_watched(api: LiveApi) -> None:
    with watching("poet") as terminal:
        terminal.wait_for("poet@1")
        api.add("poet", "5" * 64)
        terminal.wait_for("poet@2")
        del api.adapters["poet"]
        assert terminal.wait() == 1
        assert "perft adapters: found no adapter 'poet'" in terminal.raw
        terminal.assert_clean()


@pytest.mark.parametrize("command", [["adapters", "list", "--watch", "--interval", "0.1"], ["top"]])
def test_a_server_that_goes_is_said_and_comes_back(command: list[str]) -> None:
    with ExitStack() as stack:
        with serving(LiveApi()) as api:
            api.add("poet", "1" * 64)
            view = stack.enter_context(on_terminal(*command, PERFT_SERVER=api.url))
            view.wait_for("poet")
        view.wait_for("since ")
        lines = view.wait_for("found no server")
        assert any(line.startswith("poet ") for line in lines), "the last table stays"
        with serving(LiveApi(), port_of(api)) as again:
            again.add("law", "1" * 64)
            view.wait_for("law")
            view.wait_until(lambda lines: not any("found no server" in line for line in lines))
            interrupted(view)


def test_a_key_that_is_refused_ends_the_watch(api: LiveApi) -> None:
    with watching() as terminal:
        terminal.wait_for("poet")
        api.list_refused = 401
        assert terminal.wait() == 1
        assert "set the admin key with PERFT_ADMIN_KEY" in terminal.raw
        terminal.assert_clean()


def test_a_server_without_room_for_it_is_asked_again(api: LiveApi) -> None:
    with watching() as terminal:
        terminal.wait_for("poet")
        api.list_refused = 503
        terminal.wait_for("trying again")
        api.list_refused = 0
        terminal.wait_for("the server is back")
        interrupted(terminal)


def test_a_live_view_needs_a_terminal(api: LiveApi, capsys: Any) -> None:
    assert run(["list", "--watch"]) == 2
    assert "--watch: found no terminal on standard output" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_top([])
    assert "found no terminal" in capsys.readouterr().err and not api.asked
    assert run(["list", "--interval", "3"]) == 2
    assert "--interval: it belongs to --watch" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["adapters", "list", "--watch"], ["top"]])
def test_no_server_at_the_start_is_an_error(command: list[str]) -> None:
    with on_terminal(*command, PERFT_SERVER="http://127.0.0.1:9") as terminal:
        assert terminal.wait() == 1
        assert "found no server at http://127.0.0.1:9" in terminal.raw
        terminal.assert_clean()


# --- perft top


def test_top_shows_the_server_and_its_adapters(api: LiveApi) -> None:
    api.adapters["maths"]["pinned"] = True
    api.add("poet", "6" * 64, rows=300)
    with on_terminal("top", columns=120) as terminal:
        lines = terminal.wait_until(lambda lines: "p95 95 ms" in "".join(lines))
        text = "\n".join(lines)
        assert re.match(rf"perft top  {api.url}  ready  \d\d:\d\d:\d\d", lines[0])
        assert "requests   12 running, 2 waiting, " in text and "/s ended" in text
        assert "TTFT       p50 50 ms, p95 95 ms (10 s)" in text and "per token  p50 -, p95 -" in text
        assert "KV cache   ████░░░░░░░░░░ 25%" in text
        assert "500 used, 0 pinned, 1,500 free" in text
        assert "loads      9, 1 failed; evicted: - device, - host" in text
        assert "errors     adapter_deleted 3, HTTP 4xx 4" in text
        (head,) = (line for line in lines if line.startswith("NAME"))
        assert head.split() == ["NAME", "STATE", "WHERE", "ROWS", "RUN▼", "WAIT", "REQ/S", "TOK/S", "TTFT", "USED"]
        rows = [line.split() for line in lines[lines.index(head) + 1 :] if line][:3]
        assert [row[:3] for row in rows] == [
            ["poet", "ready", "device"],
            ["tiny", "-", "base"],
            ["maths", "ready", "host*"],
        ]
        assert rows[0][3:6] == ["300", "7", "2"] and float(rows[0][6]) > 0
        interrupted(terminal)


def test_top_asks_for_one_page_in_the_order_of_its_keys(api: LiveApi) -> None:
    with on_terminal("top") as terminal:
        terminal.wait_for("RUN▼")
        terminal.send("S")
        lines = terminal.wait_for("NAME▲")
        terminal.send("r")
        terminal.wait_for("NAME▼")
        terminal.send("/poe")
        lines = terminal.wait_until(lambda lines: not any(line.startswith("maths") for line in lines))
        assert lines[-1].startswith("search: poe_") and any(line.startswith("poet ") for line in lines)
        terminal.send("q\r")
        terminal.wait_for("no adapters")
        terminal.send("\x1b")
        terminal.wait_for("maths")
        terminal.send("q")
        assert terminal.wait() == 0
        terminal.assert_clean()
    pages = api.paths("/v1/adapters")
    assert all(page["limit"] == "200" and page["versions"] == "active" for page in pages)
    asked = [(page["sort"], page.get("search")) for page in pages]
    for expected in (("-running", None), ("name", None), ("-name", None), ("-name", "poe"), ("-name", "poeq")):
        assert expected in asked
    assert asked[-1][1] is None


def test_top_scrapes_at_most_once_a_second_and_only_what_it_shows(api: LiveApi) -> None:
    began = time.monotonic()
    with on_terminal("top") as terminal:
        terminal.wait_until(lambda _: len(api.paths("/metrics")) >= 3)
        interrupted(terminal)
    assert len(api.paths("/metrics")) <= time.monotonic() - began + 1
    assert all(query.keys() == {"name[]"} for query in api.paths("/metrics"))


def test_what_the_key_may_not_read_is_left_out_with_the_reason(api: LiveApi) -> None:
    api.metrics_refused = {"/metrics": 403}
    with on_terminal("top") as terminal:
        lines = terminal.wait_for("metrics left out: found a key that may not read metrics")
        text = "\n".join(terminal.wait_for("maths"))
        assert "KV cache" not in text and "poet" in text and lines[0].split()[3] == "ready"
        interrupted(terminal)
    api.metrics_refused, api.list_refused = {}, 401
    with on_terminal("top") as terminal:
        terminal.wait_for("adapters left out: found no valid key")
        terminal.wait_until(lambda lines: any(line.startswith("poet ") and " 7 " in line for line in lines))
        interrupted(terminal)


def test_metrics_on_another_address_are_read_from_the_console(api: LiveApi) -> None:
    api.metrics_refused = {"/metrics": 404}
    with on_terminal("top") as terminal:
        terminal.wait_for("KV cache")
        api.metrics_refused["/console/metrics"] = 404
        terminal.wait_for("metrics not new: the server has them on an address of its own (--metrics-bind)")
        interrupted(terminal)
    assert len(api.paths("/metrics")) <= 2


def test_an_engine_with_a_problem_is_said(api: LiveApi) -> None:
    api.not_ready = "the engine does not answer"
    with on_terminal("top") as terminal:
        terminal.wait_for("NOT READY since ")
        terminal.wait_for("the engine does not answer")
        api.not_ready = ""
        terminal.wait_until(lambda lines: "  ready  " in lines[0])
        interrupted(terminal)


def test_a_server_that_knows_no_order_is_asked_without(api: LiveApi) -> None:
    api.knows_order = False
    with on_terminal("top") as terminal:
        terminal.wait_for("poet")
        terminal.send("/ath\r")
        terminal.wait_until(lambda lines: not any(line.startswith("poet") for line in lines))
        terminal.wait_for("maths")
        interrupted(terminal)


def test_top_fits_a_narrow_and_low_terminal(api: LiveApi) -> None:
    with on_terminal("top") as terminal:
        terminal.wait_for("KV cache")
        terminal.resize(60, 16)
        lines = terminal.wait_until(lambda lines: len(lines) <= 16 and max(map(len, lines)) <= 60)
        assert any("RUN▼" in line for line in lines) and lines[-1].startswith("q quit")
        terminal.resize(20, 3)
        terminal.wait_until(lambda lines: len(lines) <= 3)
        interrupted(terminal)


@pytest.mark.parametrize("command", [["adapters", "list", "--watch"], ["top"]])
def test_sigterm_leaves_the_terminal_clean(api: LiveApi, command: list[str]) -> None:
    with on_terminal(*command) as terminal:
        terminal.wait_for("poet")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait() == 128 + signal.SIGTERM
        terminal.assert_clean()


@pytest.mark.parametrize("command", [["adapters", "list", "--watch"], ["top"], ["adapters", "list"]])
def test_hostile_text_is_shown_as_text(api: LiveApi, command: list[str]) -> None:
    api.add(EVIL, "7" * 64, state="ready")
    api.not_ready = EVIL
    with on_terminal(*command, columns=200, lines=40) as terminal:
        terminal.wait_for(EVIL_SHOWN)
        if "top" in command:
            api.metrics_refused = {"/metrics": 500}
            terminal.wait_for("metrics not new")
        if command[-1] != "list":
            terminal.send("q")
        assert terminal.wait() == 0
        terminal.assert_clean()


# --- progress bars


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK" + bytes(30_000_000))
    return path


def test_push_and_verify_show_their_progress_on_a_terminal(api: LiveApi, archive: Path) -> None:
    with on_terminal("adapters", "push", "big", str(archive)) as terminal:
        whole = re.compile(r"big: checking .*30\.0/30\.0 MB ([\d.]+ .?B/s|\?)")  # a speed of any size: machines differ
        terminal.wait_until(lambda _: whole.search(terminal.text) is not None)
        api.may_answer.set()
        assert terminal.wait() == 0
        assert terminal.raw.rstrip("\r\n").endswith("(new, active)")
        terminal.assert_clean()
    api.files["poet", 1] = {"config": b"{}", "weights": bytes(1_500_000)}
    with on_terminal("adapters", "verify", "poet") as terminal:
        assert terminal.wait() == 1
        assert re.search(r"poet@1 .*/1\.5 MB", terminal.text), terminal.raw
        terminal.assert_clean()


def test_elsewhere_no_progress_is_written(api: LiveApi, archive: Path) -> None:
    api.may_answer.set()
    command = [sys.executable, "-c", "from server.cli import main; main()", "adapters", "push", "big", str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stderr == "" and re.fullmatch(r"big@1 [0-9a-f]{64} \(new, active\)\n", done.stdout)
