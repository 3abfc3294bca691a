"""`perft eval`: the paper's scoring, and asking a server (a small real one that answers from a table)."""

import json
import os
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from perft.errors import InputError
from server.commands.evaluate import run
from server.evaluation import connection, harness
from server.evaluation.connection import retry_after
from server.evaluation.tasks import QUESTION_BYTES, TASKS, interval, last_number, read_questions, task_of
from tests.server.fake_server import bearer
from tests.server.local_server import local_server

KEY = bearer("alice")["Authorization"].removeprefix("Bearer ")
NOWHERE = "http://127.0.0.1:9"
SCORED = [
    ("boolq", "the correct answer is true", "true", True),
    ("boolq", "It is False, not true", "true", False),
    ("piqa", "Solution2.", "solution2", True),
    ("social_i_qa", "answer3 because", "answer3", True),
    ("hellaswag", "ending4", "ending1", False),
    ("winogrande", "The correct answer is option1", "option1", True),
    ("arc-challenge", "answer5", "answer5", True),
    ("openbookqa", "I do not know", "answer1", False),
    ("gsm8k", "He has 3 apples, so 1,250.5 in all.", "1250.5", True),
    ("gsm8k", "The answer is 18.", "18", True),
    ("addsub", "-4.0004", "-4", True),
    ("addsub", "-4.002", "-4", False),
    ("svamp", "no number", "5", False),
    ("aqua", "The answer is B.", "B", True),
    ("aqua", "A few steps lead to (C)", "C", False),
]


@pytest.mark.parametrize(("task", "answer", "expected", "is_right"), SCORED)
def test_scoring(task: str, answer: str, expected: str, is_right: bool) -> None:
    assert TASKS[task].is_right(answer, expected) is is_right


def test_all_fourteen_tasks_of_the_paper() -> None:
    assert len(TASKS) == 14
    assert [task.kind for task in TASKS.values()].count("commonsense") == 8


@pytest.mark.parametrize(
    ("path", "named", "expected"),
    [("gsm8k.json", None, "gsm8k"), ("ARC-Challenge/test.json", None, "arc-challenge"),
     ("AQuA/test.json", None, "aqua"),
     ("boolq_test.json", None, "boolq"), ("x.json", "siqa", "social_i_qa")],
)  # fmt: skip
def test_which_task(path: str, named: str | None, expected: str) -> None:
    assert task_of(Path(path), named).name == expected


def test_no_task() -> None:
    with pytest.raises(InputError, match="give it with --task"):
        task_of(Path("mine.json"), None)


def test_numbers() -> None:
    assert [last_number(text) for text in ("1, 2 and 3", "$4.50", "12,345.", "none", "a -7b")] == [
        3,
        4.5,
        12345,
        None,
        -7,
    ]


def test_the_interval_is_wilsons() -> None:
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert interval(0, 10)[0] == 0 and interval(10, 10)[1] == 1 and interval(0, 0) == (0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ('[{"a": 1, "a": 2}]', "given twice"), ("[]", "found no list"),
     ('{"a": 1}', "found no list"),
     ('[{"instruction": "a"}]', "record 1: found no answer"), ("[3]", "record 1: found no object"),
     ('[{"instruction": " ", "answer": "1"}]', "record 1: found an empty instruction"),
     ('[{"instruction": 7, "answer": "1"}]', "record 1: found no instruction"),
     ('[{"instruction": "a", "input": [1], "answer": "1"}]', "record 1: found an input that is no text"),
     ('[{"instruction": "\\ud800", "answer": "1"}]', "record 1: found half of a surrogate pair")],
)  # fmt: skip
def test_broken_questions(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "gsm8k.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "gsm8k.json")


@pytest.mark.parametrize(
    ("task", "answer"),
    [("gsm8k", "NaN"), ("gsm8k", "Infinity"), ("gsm8k", '""'), ("gsm8k", '"  "'), ("gsm8k", '"none"'),
     ("aqua", '"F"'), ("aqua", '""'), ("boolq", '"yes"'), ("boolq", '""'), ("piqa", '"solution3"'), ("piqa", "NaN")],
)  # fmt: skip
def test_an_answer_that_cannot_be_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, answer: str
) -> None:
    file = tmp_path / f"{task}.json"
    right = {"gsm8k": "1", "aqua": "a", "boolq": "True", "piqa": "solution1"}[task]
    file.write_text(f'[{{"instruction": "a", "answer": "{right}"}}, {{"instruction": "a", "answer": {answer}}}]')
    assert run([str(file), "--model", "x", "--server", NOWHERE]) == 1
    message = capsys.readouterr().err
    assert "record 2: found the answer" in message and "record 1" not in message and "Traceback" not in message


def test_an_answer_that_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.json"
    file.write_text(json.dumps([{"instruction": "a", "answer": each} for each in (8.0, 12, 0.00001, 1e16, True)]))
    assert [each.answer for each in read_questions(file)] == ["8.0", "12", "0.00001", "10000000000000000", "True"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "large", "latin"])
def test_a_file_that_is_no_file_of_questions(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "gsm8k.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(b"[\xff]")
    if kind == "large":
        os.truncate(file, QUESTION_BYTES + 1)
    message = {"pipe": "no plain file", "folder": "a folder", "large": "at most 268,435,456", "latin": "not UTF-8"}
    with pytest.raises(InputError, match=message[kind]):
        read_questions(file)


class Answering(BaseHTTPRequestHandler):
    """Answers sums; the model "wrong" adds one; "busy" is 429 the first time; "gone" is 404."""

    seen: list[dict[str, Any]] = []
    keys: list[str | None] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = not any(each["model"] == body["model"] for each in self.seen)
        self.seen.append(body | {"path": self.path})
        self.keys.append(self.headers.get("Authorization"))
        if body["model"] == "gone":
            return self.answer(404, {"error": {"message": "no model gone"}})
        if body["model"] == "busy" and first:
            return self.answer(429, {"error": {"message": "slow down"}})
        asked = body["messages"][0]["content"] if "messages" in body else body["prompt"].split("### Instruction:\n")[1]
        numbers = [int(part) for part in asked.split("\n")[0].split("+")]
        text = f"It is {sum(numbers) + (body['model'] == 'wrong')}."
        choice = {"message": {"content": text}} if "messages" in body else {"text": text}
        self.answer(200, {"model": f"{body['model']}@3", "choices": [choice]})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Answering.seen, Answering.keys = [], []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "addsub.json"
    file.write_text(
        json.dumps([{"instruction": f"{n}+{n}", "input": "", "output": "", "answer": str(2 * n)} for n in range(20)])
    )
    return file


def test_models_side_by_side(server: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    assert (
        run([str(questions), "--model", "right", "--model", "wrong", "--server", server, "--output", str(output)]) == 0
    )
    table = capsys.readouterr().out.splitlines()
    assert "right@3" in table[1] and "20/20" in table[1] and "100.0%" in table[1]
    assert "wrong@3" in table[2] and "0/20" in table[2]
    found = json.loads(output.read_text())
    assert [score["right"] for score in found["scores"]] == [20, 0]
    assert found["answers"]["addsub, wrong"][1] == {
        "instruction": "1+1",
        "expected": "2",
        "answer": "It is 3.",
        "right": False,
    }
    assert all(body["temperature"] == 0 and body["path"] == "/v1/chat/completions" for body in Answering.seen)


def test_the_alpaca_prompt_and_a_key(server: str, questions: Path) -> None:
    flags = ["--template", "alpaca", "--key", "secret", "--limit", "3", "--max-tokens", "9", "--server", f"{server}/v1"]
    assert run([str(questions), "--model", "right", *flags]) == 0
    assert len(Answering.seen) == 3 and set(Answering.keys) == {"Bearer secret"}
    assert all(body["max_tokens"] == 9 and body["path"] == "/v1/completions" for body in Answering.seen)


def test_a_busy_server_is_asked_again(server: str, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(questions), "--model", "busy", "--server", server, "--at-once", "1"]) == 0
    assert "20/20" in capsys.readouterr().out and len(Answering.seen) == 21


@pytest.mark.parametrize(("model", "message"), [("gone", "answered 404 for gone: no model gone")])
def test_what_the_server_refuses(
    server: str, questions: Path, capsys: pytest.CaptureFixture[str], model: str, message: str
) -> None:
    assert run([str(questions), "--model", model, "--server", server]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_no_server(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(questions), "--model", "x", "--server", "http://127.0.0.1:9"]) == 1
    assert "did not answer" in capsys.readouterr().err


def test_wrong_usage(questions: Path) -> None:
    for arguments in ([], ["--model", "x"], [str(questions)]):
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        assert ended.value.code == 2


def test_the_harness_needs_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--model", "x", "--harness", "arc_easy"]) == 1
    assert "needs --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--at-once", "--limit", "--max-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "", "1" * 5000])
def test_a_number_out_of_bounds(questions: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run([str(questions), "--model", "x", "--server", NOWHERE, f"{flag}={value}"])
    assert ended.value.code == 2 and "expected a number from 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "x", "--model", "y", "--model", "x"], "found 'x' more than once"),
     (["--model", ""], "expected a model's name"),
     (["--model", "x", "--task", "zz"], "found 'zz', expected one of boolq, piqa, social_i_qa"),
     (["--model", "x", "--harness", "arc_easy"], "expected one of the two"),
     (["--model", "x", "--chat"], "--chat: it belongs to --harness"),
     (["--model", "x", "--overwrite"], "--overwrite: it belongs to --output"),
     (["--model", "x", "--key", "\u043a"], "expected printable ASCII")],
)  # fmt: skip
def test_options_that_do_not_go_together(
    questions: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run([str(questions), "--server", NOWHERE, *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--task=boolq", "--max-tokens=3", "--template=alpaca"])
def test_options_that_the_harness_does_not_have(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["--model", "x", "--server", NOWHERE, flag, *HARNESS])
    assert ended.value.code == 2 and "it belongs to files of questions" in capsys.readouterr().err


def test_two_files_of_a_task(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "addsub_test.json"
    other.write_text(questions.read_text())
    assert run([str(questions), str(other), "--model", "x", "--server", NOWHERE]) == 1
    assert "found a second file of addsub" in capsys.readouterr().err


def evaluate(server: str, questions: Path, *arguments: object) -> int:
    return run([str(questions), "--model", "right", "--server", server, *map(str, arguments)])


def test_an_output_that_exists_is_kept(
    server: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    output.write_text("mine")
    assert evaluate(server, questions, "--output", output) == 1
    assert "exists, expected a new file; --overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine" and Answering.seen == []
    assert evaluate(server, questions, "--output", output, "--overwrite") == 0
    assert json.loads(output.read_text())["scores"][0]["right"] == 20
    assert sorted(each.name for each in tmp_path.iterdir()) == ["addsub.json", "out.json"]
    (tmp_path / "plain").touch()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["itself", "link", "hard link"])
def test_an_output_never_replaces_an_input(
    server: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    before, output = questions.read_bytes(), questions if kind == "itself" else tmp_path / "out.json"
    if kind == "link":
        output.symlink_to(questions)
    elif kind == "hard link":
        output.hardlink_to(questions)
    assert evaluate(server, questions, "--output", output, "--overwrite") == 1
    assert "belongs to what is read" in capsys.readouterr().err
    assert questions.read_bytes() == output.read_bytes() == before and Answering.seen == []


@pytest.mark.parametrize(
    ("output", "message"),
    [("", "found a folder"), ("missing/out.json", "No such file"), ("addsub.json/out.json", "Not a directory"),
     ("pipe", "found no plain file"), ("x" * 300, "File name too long"), ("/proc/out.json", "cannot write")],
)  # fmt: skip
def test_an_output_that_cannot_be_written(
    server: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert evaluate(server, questions, "--output", tmp_path / output, "--overwrite") == 1
    captured = capsys.readouterr().err
    assert "--output: " in captured and message in captured and Answering.seen == []


def test_a_full_disk_leaves_the_old_output_and_shows_the_scores(
    server: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    output = tmp_path / "out.json"
    output.write_text("mine")
    monkeypatch.setattr(os, "fsync", full)
    assert evaluate(server, questions, "--output", output, "--overwrite") == 1
    captured = capsys.readouterr()
    assert "No space left" in captured.err and "20/20" in captured.out and output.read_text() == "mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["addsub.json", "out.json"]


Answer = Callable[[str, int], tuple[int, dict[str, str], bytes] | None]
"""The status, headers and body for a path and how many POSTs came before; None closes the connection."""
GOOD = json.dumps({"model": "m", "choices": [{"message": {"content": "0"}, "text": "0"}]}).encode()
LISTED = json.dumps({"data": [{"id": "right"}, {"id": "other"}]}).encode()


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Start a server of raw replies."""
    running: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        posts = Counter[str]()

        class Raw(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.command == "POST":
                    self.rfile.read(int(self.headers["Content-Length"]))
                reply = answer(f"{self.command} {self.path}", posts["POST"])
                posts[self.command] += 1
                self.close_connection = True
                if reply is not None:
                    status, headers, body = reply
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(body))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *arguments: Any) -> None:
                """A client that left is no error here."""

        running.append(Quiet(("127.0.0.1", 0), Raw))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for each in running:
        each.shutdown()


def fails_fast(
    capsys: pytest.CaptureFixture[str], server: str, questions: Path, *messages: str, template: str = "chat"
) -> None:
    """It ends within seconds with one sentence that names the server."""
    start = time.monotonic()
    assert evaluate(server, questions, "--template", template) == 1
    captured = capsys.readouterr()
    assert time.monotonic() - start < 8 and captured.out == ""
    assert captured.err.startswith("perft eval: the server at") and server in captured.err
    assert all(message in captured.err for message in messages), captured.err
    assert "Traceback" not in captured.err and "ExceptionGroup" not in captured.err


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize(
    "body",
    [b"<html>hello</html>", b"", b"[]", b"null", b"{}", b'{"choices": []}', b'{"model": "m", "choices": []}',
     b'{"model": "m", "choices": {}}', b'{"choices": [{"message": {"content": "0"}, "text": "0"}]}',
     b'{"model": "m", "choices": [{"message": {"content": 7}, "text": 7}]}',
     b'{"model": "m", "choices": [{"message": null, "text": null}]}', b'{"model": "m", "choices": ["0"]}',
     b'{"model": 3, "choices": [{"message": {"content": "0"}, "text": "0"}]}', b"\xff\xfe\xfd", b"\x1b[31m",
     b'{"model": "m", "model": "n", "choices": [{"message": {"content": "0"}, "text": "0"}]}', b"[" * 100_000],
)  # fmt: skip
def test_a_strange_answer(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str], body: bytes, template: str
) -> None:
    server = serve(lambda path, before: (200, {}, body))
    fails_fast(capsys, server, questions, "with ", "completion, {", "OpenAI's API?", template=template)


@pytest.mark.parametrize(
    ("status", "headers", "body", "messages"),
    [(302, {"Location": "http://other/"}, b"", ["answered 302", "sends on to http://other/"]),
     (302, {"Location": "http://[x"}, b"", ["sends on to http://[x"]),
     (204, {}, b"", ["answered 204"]), (500, {}, b"<p>no</p>", ["answered 500 for right: <p>no</p>"]),
     (401, {}, b'{"error": {"message": "no key"}}', ["answered 401", "no key; set an inference key with"]),
     (404, {}, b'{"error": {"message": "no model x"}}', ["answered 404 for right: no model x"]),
     (429, {"x-should-retry": "false"}, b'{"error": {"message": "quota"}}', ["answered 429", "quota"]),
     (503, {"Retry-After": "9999"}, b"", ["answered 503", "asks to wait 9999 s"]),
     (200, {"Content-Encoding": "gzip"}, b"no gzip", ["did not answer"])],
)  # fmt: skip
def test_a_refusal(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str],
    status: int, headers: dict[str, str], body: bytes, messages: list[str],
) -> None:  # fmt: skip
    def answer(path: str, before: int) -> tuple[int, dict[str, str], bytes]:
        return (status, headers, body) if path.startswith("POST") else (200, {}, LISTED)

    fails_fast(capsys, serve(answer), questions, *messages)


def test_an_answer_without_an_end(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MOST_BYTES", 1000)
    fails_fast(capsys, serve(lambda path, before: (200, {}, b" " * 1001)), questions, "more than")


@pytest.mark.parametrize("which", ["GET", "POST"])
def test_a_server_that_closes_every_connection(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    server = serve(lambda path, before: None if path.startswith(which) else (200, {}, LISTED))
    fails_fast(capsys, server, questions, f"did not answer {which}", "start one with `perft serve`")


def test_a_server_that_never_answers(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.3)
    ended = threading.Event()

    def answer(path: str, before: int) -> None:
        ended.wait(20)

    server = serve(answer)
    fails_fast(capsys, server, questions, "did not answer GET /v1/models within 0.3 s")
    ended.set()


def test_no_server_is_said_at_once(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails_fast(capsys, NOWHERE, questions, "did not answer GET /v1/models: ")


def test_a_model_that_the_server_does_not_have(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(path: str, before: int) -> tuple[int, dict[str, str], bytes]:
        asked.append(path)
        return (404, {}, b"{}") if path.endswith("/typo") else (200, {}, GOOD if "chat" in path else LISTED)

    asked: list[str] = []
    server = serve(answer)
    assert evaluate(server, questions, "--model", "typo", "--model", "right@2") == 1
    assert "has no model typo for this key; it has:\n  - other\n  - right\n" in capsys.readouterr().err
    assert asked == ["GET /v1/models", "GET /v1/models/typo", "GET /v1/models/right%402"]
    assert evaluate(server, questions, "--model", "right@2") == 0


def test_a_key_that_is_refused_is_said_before_the_first_question(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda path, before: (401, {}, b"{}") if path.startswith("GET") else (200, {}, GOOD))
    fails_fast(capsys, server, questions, "answered 401 for GET /v1/models", "PERFT_API_KEY or --key")


@pytest.mark.parametrize(("status", "wait"), [(429, "0.6"), (503, "nan"), (429, "soon"), (503, None)])
def test_a_server_without_room_is_asked_again(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str], status: int, wait: str | None
) -> None:
    def answer(path: str, before: int) -> tuple[int, dict[str, str], bytes]:
        full = path.startswith("POST") and before < 2
        return (status, {} if wait is None else {"Retry-After": wait}, b"full") if full else (200, {}, GOOD)

    assert evaluate(serve(answer), questions, "--limit", "1") == 0
    captured = capsys.readouterr()
    assert captured.err.count(f"the server answered {status} (full): waiting") == 1 and "1/1" in captured.out


def test_waiting_for_room_has_a_bound(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(path: str, before: int) -> tuple[int, dict[str, str], bytes]:
        asked.append(path)
        return (429, {"Retry-After": "0"}, b"full") if path.startswith("POST") else (200, {}, LISTED)

    asked: list[str] = []
    monkeypatch.setattr(connection, "PATIENCE_SECONDS", 1.0)
    assert evaluate(serve(answer), questions, "--limit", "1") == 1
    assert "answered 429 for right: full; ask less with --at-once" in capsys.readouterr().err
    assert len(asked) == 1 + 3  # after 0.25 and 0.5 s another second is too much


def test_retry_after() -> None:
    assert [retry_after(each) for each in (None, "3", "0.5", "-1", "nan", "inf", "x", "")] == [0, 3, 0.5, 0, 0, 0, 0, 0]
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 < retry_after("Wed, 21 Oct 2065 07:28:00 GMT")


def test_a_connection_that_breaks_half_way_is_tried_again(
    serve: Callable[[Answer], str], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda path, before: None if 3 <= before < 6 else (200, {}, GOOD))
    assert evaluate(server, questions, "--at-once", 1) == 0
    assert "1/20" in capsys.readouterr().out  # the right one is 0+0


@pytest.mark.parametrize("how", ["refused", "interrupted"])
def test_what_was_answered_is_kept_and_not_scored(
    serve: Callable[[Answer], str], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    def answer(path: str, before: int) -> tuple[int, dict[str, str], bytes]:
        if before < 25 or not path.startswith("POST"):
            return 200, {}, GOOD
        if how == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return 500, {}, b"broken"

    arguments = ["--model", "second", "--model", "third", "--at-once", 1, "--output", tmp_path / "out.json"]
    assert evaluate(serve(answer), questions, *arguments) == (1 if how == "refused" else 130)
    found, captured = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr()
    assert [(each["model"], each["asked"]) for each in found["scores"]] == [("right", 20)]
    assert found["unfinished"] == [
        {"model": "second", "task": "addsub", "answered": 5, "of": 20},
        {"model": "third", "task": "addsub", "answered": 0, "of": 20},
    ]
    assert [len(each) for each in found["answers"].values()] == [20, 5]
    assert "1/20" in captured.out and len(captured.out.splitlines()) == 2
    assert "addsub, second: no score, 5 of 20 questions answered" in captured.err
    assert ("answered 500 for second: broken" if how == "refused" else "interrupted") in captured.err


@pytest.mark.parametrize(
    ("model", "key", "message"),
    [("typo", KEY, "has no model typo for this key; it has:\n  - base"), ("base", "wrong", "answered 401 for GET"),
     ("base@1", KEY, "has no model base@1")],
)  # fmt: skip
def test_our_own_server_says_what_is_wrong(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str], model: str, key: str, message: str
) -> None:
    with local_server(tmp_path) as running:
        asked = [str(questions), "--server", running.url, "--template", "alpaca"]
        assert run([*asked, "--model", model, "--key", key]) == 1
        assert run([*asked, "--model", "base", "--key", KEY]) == 0
    assert message in capsys.readouterr().err


HARNESS = ["--harness", "arc_easy", "--tokenizer", "t"]


def test_the_harness_keeps_the_models_before_a_failure(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_harness(server: object, model: str, *arguments: object) -> dict[str, Any]:
        if model == "second":
            raise InputError("stopped")
        return {"arc_easy": {"acc,none": 0.5}}

    monkeypatch.setattr(harness, "run_harness", run_harness)
    output = tmp_path / "out.json"
    models = ["--model", "first", "--model", "second"]
    assert run([*models, *HARNESS, "--server", server, "--output", str(output)]) == 1
    assert json.loads(output.read_text()) == {"first": {"arc_easy": {"acc,none": 0.5}}}
    assert "0.5000" in capsys.readouterr().out


def test_an_error_inside_the_harness_is_a_sentence_and_sends_no_other_key(
    server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            raise RuntimeError(f"key: {os.environ['OPENAI_API_KEY']!r}")

    tasks = types.ModuleType("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", TaskManager, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setenv("OPENAI_API_KEY", "for OpenAI alone")
    assert run(["--model", "x", *HARNESS, "--server", server]) == 1
    assert f"stopped for x at {server}: RuntimeError: key: ''" in capsys.readouterr().err


def test_the_harness_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--model", "x", *HARNESS, "--server", NOWHERE]) == 1
    assert "did not answer GET /v1/models" in capsys.readouterr().err
