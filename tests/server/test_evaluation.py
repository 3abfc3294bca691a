"""`perft eval`: the paper's scoring, and asking a server (a small real one that answers from a table)."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from perft.errors import InputError
from server.commands.evaluate import run
from server.evaluation.tasks import TASKS, interval, last_number, read_questions, task_of

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
    [("{", "found no JSON"), ("[]", "found no list"), ('{"a": 1}', "found no list"),
     ('[{"instruction": "a"}]', "record 1: found no answer"), ("[3]", "record 1: found no object")],
)  # fmt: skip
def test_broken_questions(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "gsm8k.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "gsm8k.json")


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
