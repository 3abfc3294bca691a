"""What happens to an inference request before vLLM sees it, and which errors its client gets, over a real registry."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from server.api.dependencies import Services
from server.api.error_responses import as_api_error
from server.api.route_table import ROUTES, Route, match
from server.auth.keys import Caller
from server.bodies.check import HEAVY_VALUES, RequestBodies
from server.engine.health import EngineHealth
from server.errors import (
    AdapterDeletedError,
    ContextLengthError,
    EngineUnavailableError,
    InvalidRequestError,
    ServerError,
)
from server.following.following import Alone, Following
from server.inference.request_context import CURRENT, RequestContext, RequestFacts
from server.metrics.counters import EventCounters
from server.middleware.adapter_routing import AdapterRouting
from tests.server.desk import ADMIN, ALICE, BOB, ROWS, Desk, Quotas, on_a_loop, opened
from tests.server.fakes import FakeEngine, ready_status
from tests.server.partial_services import partial_services

COMPLETIONS = "/v1/completions"
FAILURE = AdapterDeletedError("poet@1 was deleted", retry_after_s=3)
ERROR = as_api_error(FAILURE)
Script = Callable[["Vllm", Scope, Receive, Send], Awaitable[None]]


async def say_yes(vllm: "Vllm", scope: Scope, receive: Receive, send: Send) -> None:
    await plain(200)(vllm, scope, receive, send)


@dataclass
class Vllm:
    """The app behind AdapterRouting: keeps the bodies it got, then answers as its script says."""

    script: Script = say_yes
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    contexts: list[RequestContext] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert not message["more_body"]
        with suppress(RecursionError):
            self.bodies.append(json.loads(message["body"]))
        self.headers.append({**dict(scope["headers"]), b"length": str(len(message["body"])).encode()})
        context = CURRENT.get()
        assert context is not None
        self.contexts.append(context)
        await self.script(self, scope, receive, send)


def plain(status: int, failure: ServerError | None = None) -> Script:
    """An answer in one piece; the failure, if there is one, is found just before."""

    async def answer(vllm: Vllm, scope: Scope, receive: Receive, send: Send) -> None:
        vllm.contexts[-1].failure = failure
        body = b'{"error": {"message": "Internal server error"}}' if status >= 400 else b'{"fine": true}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:7], "more_body": True})
        await send({"type": "http.response.body", "body": body[7:], "more_body": False})

    return answer


def streamed(chunks: Sequence[bytes], failure_before: int | None = None, ends: bool = True) -> Script:
    """Server-sent events; the failure is found before chunk number `failure_before`."""

    async def answer(vllm: Vllm, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, chunk in enumerate(chunks):
            if number == failure_before:
                vllm.contexts[-1].failure = FAILURE
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if not ends:
            vllm.contexts[-1].failure = vllm.contexts[-1].failure or FAILURE
            raise RuntimeError("the generator of the stream ended with this")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return answer


@dataclass
class Answered:
    """What the client got."""

    messages: list[Message] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        assert [m["type"] for m in self.messages].count("http.response.start") == 1
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        parts = self.messages[1:]
        assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]
        return b"".join(part.get("body", b"") for part in parts)

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["error"]["code"]
        return code


@dataclass
class Door:
    """AdapterRouting in front of a Vllm."""

    desk: Desk
    vllm: Vllm
    registry: CollectorRegistry
    metrics: EventCounters
    load_timeout_s: float = 10.0
    secret: bytes = b"secret"
    bodies: RequestBodies = field(default_factory=RequestBodies)
    facts: RequestFacts = field(default_factory=RequestFacts)
    following: Following = field(default_factory=Alone)

    async def ask(
        self, body: Any, path: str = COMPLETIONS, caller: Caller = ALICE, receive: Receive | None = None
    ) -> Answered:
        answered, self.facts = Answered(), RequestFacts()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        scope: Scope = {
            "type": "http", "method": "POST", "path": path,
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())],
            "state": {"route": match("POST", path), "caller": caller, "facts": self.facts},
            "app": SimpleNamespace(state=SimpleNamespace(services=self.services())),
        }  # fmt: skip
        await AdapterRouting(self.vllm)(scope, receive or sending(raw), answered.send)
        return answered

    def services(self) -> Services:
        return partial_services(
            registry=self.desk.registry,
            following=self.following,
            scheduler=self.desk.scheduler,
            metrics=self.metrics,
            engine_health=EngineHealth(60.0),
            bodies=self.bodies,
            settings=SimpleNamespace(load_timeout_s=self.load_timeout_s),
            cache_salt_secret=self.secret,
        )

    def check_nothing_is_held(self) -> None:
        assert all(v.leases == 0 for name in self.desk.registry.names() for v in self.desk.registry.versions(name))
        assert CURRENT.get() is None
        self.desk.scheduler.check_integrity()
        assert not self.desk.scheduler._leases.running and not self.desk.scheduler._waiters


def sending(*chunks: bytes, leaves: asyncio.Event | None = None) -> Receive:
    """A client's body, then silence until it leaves."""
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = False

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    return receive


@asynccontextmanager
async def doors(
    folder: Path, script: Script = say_yes, engine: FakeEngine | None = None, load_timeout_s: float = 10.0
) -> AsyncIterator[Door]:
    async with opened(folder, engine, Quotas(drain_timeout_s=0.05)) as desk:
        for seed, name in enumerate(("poet", "clerk")):
            await desk.upload(name, seed)
        registry = CollectorRegistry()
        door = Door(desk, Vllm(script), registry, EventCounters(registry), load_timeout_s)
        yield door
        door.check_nothing_is_held()


# The name


@on_a_loop
async def test_the_name_becomes_the_version(folder: Path) -> None:
    async with doors(folder) as door:
        for model in ("poet", "poet@1"):
            answered = await door.ask({"model": model, "prompt": "\u00e9\U0001f600"})
            assert answered.status == 200 and json.loads(answered.body) == {"fine": True}
            assert door.vllm.bodies[-1]["model"] == "poet@1" and door.vllm.bodies[-1]["prompt"] == "\u00e9\U0001f600"
            assert door.vllm.headers[-1][b"content-length"] == door.vllm.headers[-1][b"length"]
            assert (door.facts.adapter, door.facts.version) == ("poet", 1)
            assert door.vllm.contexts[-1].version is door.desk.found("poet@1")


@on_a_loop
async def test_what_was_resolved_once_stays_whatever_becomes_active_meanwhile(folder: Path) -> None:
    async with doors(folder) as door:
        door.desk.engine.delays["place"] = 0.1
        asked = asyncio.create_task(door.ask({"model": "poet"}))
        await door.desk.until(lambda: ("place", "poet@1") in door.desk.engine.calls)
        await door.desk.upload("poet", 7)
        assert door.desk.found("poet").id == "poet@2" and not door.vllm.bodies
        await asked
        assert door.vllm.bodies[0]["model"] == "poet@1"


class Hanging(Alone):
    """A store that does not answer."""

    async def admit(self, name: str | None = None) -> None:
        await asyncio.Event().wait()


@on_a_loop
async def test_a_store_that_hangs_holds_up_no_large_body_of_the_base(folder: Path) -> None:
    """Large bodies take turns on the event loop; who waits for the store has none."""
    async with doors(folder) as door:
        door.following = Hanging()
        body = {"prompt": list(range(2 * HEAVY_VALUES))}
        waiting = [asyncio.create_task(door.ask(body | {"model": "poet"})) for _ in range(3)]
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        answered = await door.ask(body | {"model": "base"})
        assert answered.status == 200 and asyncio.get_running_loop().time() - began < 0.5
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@on_a_loop
async def test_the_base_passes_as_it_is(folder: Path) -> None:
    async with doors(folder) as door:
        calls = list(door.desk.engine.calls)
        for values in ({"model": "base", "x": 1}, {"model": "org/alias"}):
            await door.ask(values, "/tokenize")
            assert door.vllm.bodies[-1] == values and door.facts.adapter is None
            await door.ask(values)
            assert {k: v for k, v in door.vllm.bodies[-1].items() if k != "cache_salt"} == values
        assert door.desk.engine.calls == calls


@pytest.mark.parametrize("route", [route for route in ROUTES if route.selects_model], ids=lambda route: route.path)
@pytest.mark.parametrize(
    ("body", "found"),
    [({"prompt": "x"}, "no model"), ({"model": None}, "null"), ({"model": ""}, "an empty string"),
     ({"model": 5}, "a number"), ({"model": ["poet"]}, "an array"), ({"model": True}, "a boolean")],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_what_names_no_model_is_never_answered_by_the_base(
    tmp_path: Path, route: Route, body: dict[str, Any], found: str
) -> None:
    @on_a_loop
    async def test(folder: Path) -> None:
        async with doors(folder) as door:
            answered = await door.ask(body, route.path)
            error = json.loads(answered.body)["error"]
            assert (answered.status, error["code"], error["param"]) == (400, "invalid_request", "model")
            assert error["message"].startswith(f"found {found}, expected") and not door.vllm.bodies

    test(tmp_path)


@on_a_loop
async def test_an_unknown_name_reaches_nothing_and_leaves_nothing(folder: Path) -> None:
    async with doors(folder) as door:
        series = len(list(door.registry.collect()))
        await door.desk.patch("clerk", allowed_keys=["bob"])
        for model in ("nobody", "poet@2", "@", "base@1", "../etc", "x" * 100_000, "clerk", "clerk@1"):
            answered = await door.ask({"model": model})
            assert (answered.status, answered.code) == (404, "model_not_found") and len(answered.body) < 500
            assert door.facts.adapter is None
        for number in range(1000):
            assert (await door.ask({"model": f"made-up-{number}"})).status == 404
        assert not door.vllm.bodies and door.desk.registry.names() == ["clerk", "poet"]
        assert len(list(door.registry.collect())) == series


# The salt


@on_a_loop
async def test_every_tenant_has_a_salt_of_its_own(folder: Path) -> None:
    async with doors(folder) as door:
        salts: dict[Any, str] = {}
        callers = (ALICE, BOB, ADMIN, Caller(None, False), Caller("None", False), Caller("alice2", False))
        for caller in callers:
            for given in (None, "", "a", "alice", '["alice", null]', "\u00e9"):
                if given == "":
                    continue
                for _ in range(2):
                    await door.ask({"model": "base", "cache_salt": given}, caller=caller)
                    salt = door.vllm.bodies[-1]["cache_salt"]
                    assert salts.setdefault((caller.label, given), salt) == salt != given
                    assert len(salt) == 64 and set(salt) <= set("0123456789abcdef")
        assert len(set(salts.values())) == len(salts) == 5 * len(callers)
        door.secret = b"another secret"
        await door.ask({"model": "base"})
        assert door.vllm.bodies[-1]["cache_salt"] not in salts.values()


@on_a_loop
async def test_a_client_cannot_give_anothers_salt(folder: Path) -> None:
    async with doors(folder) as door:
        await door.ask({"model": "base"}, caller=BOB)
        bobs = door.vllm.bodies[-1]["cache_salt"]
        await door.ask({"model": "base", "cache_salt": bobs}, caller=ALICE)
        assert door.vllm.bodies[-1]["cache_salt"] != bobs


@on_a_loop
async def test_a_salt_that_is_none_is_left_for_vllm_to_refuse(folder: Path) -> None:
    async with doors(folder) as door:
        for given in ("", 5, ["a"], {"a": 1}, True, 0):
            await door.ask({"model": "base", "cache_salt": given})
            assert door.vllm.bodies[-1]["cache_salt"] == given


# The body


@on_a_loop
async def test_a_body_in_pieces(folder: Path) -> None:
    async with doors(folder) as door:
        raw = json.dumps({"model": "poet"}).encode()
        answered = await door.ask(raw, receive=sending(*(raw[i : i + 1] for i in range(len(raw)))))
        assert answered.status == 200 and door.vllm.bodies[0]["model"] == "poet@1"


@on_a_loop
async def test_a_body_that_is_no_object_is_refused(folder: Path) -> None:
    async with doors(folder) as door:
        for raw in (b"", b"{", b"\xff\xfe\xff", b"[1]", b'"x"', b"null", b"1", b"{}x", b'{"a": ' + b"9" * 5000 + b"}"):
            answered = await door.ask(raw)
            assert (answered.status, answered.code) == (400, "invalid_request"), raw
        assert not door.vllm.bodies


@on_a_loop
async def test_no_depth_of_nesting_breaks_the_gate(folder: Path) -> None:
    async with doors(folder) as door:
        door.vllm.script = quietly
        for depth in [*range(60, 70), *range(850, 1050), 100_000]:
            for opened, closed in ((b"[", b"]"), (b'{"x":', b"}")):
                raw = b'{"model": "poet", "x": ' + opened * depth + b"1" + closed * depth + b"}"
                answered = await door.ask(raw)
                assert answered.status == (200 if depth <= 64 else 400)
                assert answered.status == 200 or answered.code == "invalid_request"


async def quietly(vllm: Vllm, scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@on_a_loop
async def test_a_body_beyond_the_limit_is_refused_while_it_comes(folder: Path) -> None:
    async with doors(folder) as door:
        chunk, asked_for = b" " * 1024**2, 0

        async def endless() -> Message:
            nonlocal asked_for
            asked_for += 1
            return {"type": "http.request", "body": chunk, "more_body": True}

        answered = await door.ask(b"", receive=endless)
        assert (answered.status, answered.code) == (413, "request_too_large")
        assert asked_for == door.bodies.limits.body_bytes // len(chunk) + 1


@on_a_loop
async def test_a_client_that_leaves_within_its_body(folder: Path) -> None:
    async with doors(folder) as door:

        async def gone() -> Message:
            return {"type": "http.disconnect"}

        assert (await door.ask(b"", receive=gone)).status == 400
        assert not door.vllm.bodies


# The place


@on_a_loop
async def test_the_lease_lasts_until_the_last_byte_and_the_place_until_the_engine_has_one(folder: Path) -> None:
    async with doors(folder) as door:
        version = door.desk.found("poet")
        scheduler = door.desk.scheduler
        held: list[tuple[int, int]] = []

        async def look(vllm: Vllm, scope: Scope, receive: Receive, send: Send) -> None:
            def see() -> None:
                held.append((version.leases, scheduler._leases.running.get(version.ref.engine_id, 0)))

            context = vllm.contexts[-1]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            see()
            async with context.lease(scheduler, 1.0):
                see()
                await context.first_lease.aclose()
                see()
            see()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            see()

        door.vllm.script = look
        await door.ask({"model": "poet"})
        assert held == [(1, 1), (1, 2), (1, 1), (1, 0), (1, 0)]
        held.clear()
        door.vllm.script = quietly
        await door.ask({"model": "poet"})
        assert version.leases == 0


@on_a_loop
async def test_a_request_never_waits_for_a_place_it_has(folder: Path) -> None:
    """Somebody waits for the rows of its adapter: that ends only once this request has ended."""
    engine = FakeEngine(ready_status(rows_total=ROWS))
    async with doors(folder, engine=engine) as door:
        scheduler = door.desk.scheduler
        closed = asyncio.Event()

        async def generate(vllm: Vllm, scope: Scope, receive: Receive, send: Send) -> None:
            context = vllm.contexts[-1]
            if context.version is door.desk.found("poet"):
                await asyncio.sleep(1.0)  # longer than the other one's patience
                closed.set()
            async with context.lease(scheduler, 10.0):
                await context.first_lease.aclose()
                await quietly(vllm, scope, receive, send)

        door.vllm.script = generate
        async with asyncio.timeout(8.0):
            first = asyncio.create_task(door.ask({"model": "poet"}))
            await door.desk.until(lambda: bool(door.vllm.bodies))
            second = asyncio.create_task(door.ask({"model": "clerk"}))
            assert (await first).status == 200 and closed.is_set()
            assert (await second).status == 200


@on_a_loop
async def test_what_only_reads_the_name_needs_no_place(folder: Path) -> None:
    async with doors(folder) as door:
        calls = list(door.desk.engine.calls)
        for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
            await door.ask({"model": "poet"}, path)
            assert door.vllm.bodies[-1] == {"model": "poet@1"}
        assert door.desk.engine.calls == calls


@on_a_loop
async def test_an_exception_or_a_cancellation_leaves_nothing_held(folder: Path) -> None:
    async with doors(folder) as door:

        async def fail(vllm: Vllm, scope: Scope, receive: Receive, send: Send) -> None:
            raise RuntimeError("vLLM's own")

        door.vllm.script = fail
        with pytest.raises(RuntimeError, match="vLLM's own"):
            await door.ask({"model": "poet"})
        door.check_nothing_is_held()
        inside = asyncio.Event()

        async def stay(vllm: Vllm, scope: Scope, receive: Receive, send: Send) -> None:
            inside.set()
            await asyncio.Event().wait()

        door.vllm.script = stay
        asked = asyncio.create_task(door.ask({"model": "poet"}))
        await inside.wait()
        assert door.desk.found("poet").leases == 1
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


@on_a_loop
async def test_a_client_that_leaves_while_it_waits_for_the_device(folder: Path) -> None:
    async with doors(folder) as door:
        door.desk.engine.delays["place"] = 0.2
        asked = asyncio.create_task(door.ask({"model": "poet"}))
        await door.desk.until(lambda: ("place", "poet@1") in door.desk.engine.calls)
        leaves = asyncio.Event()
        other = asyncio.create_task(door.ask({}, receive=sending(b'{"model": "poet"}', leaves=leaves)))
        await door.desk.until(lambda: door.desk.scheduler.requests_waiting(door.desk.ref("poet@1")) == 2)
        leaves.set()
        assert not (await other).messages
        assert door.desk.scheduler.requests_waiting(door.desk.ref("poet@1")) == 1, "it waits on for nobody"
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert not door.vllm.bodies
        door.check_nothing_is_held()
        labels = {"adapter": "poet", "finish_reason": "abort"}
        assert door.registry.get_sample_value("perft_adapter_requests_total", labels) == 1
        await door.desk.until(lambda: door.desk.is_on_device("poet@1"))


@on_a_loop
async def test_an_adapter_that_cannot_be_loaded_is_503_and_counted(folder: Path) -> None:
    async with doors(folder) as door:
        door.desk.engine.failures["place", "poet@1"] = 1
        answered = await door.ask({"model": "poet"})
        assert (answered.status, answered.code) == (503, "adapter_unavailable") and b"retry-after" in answered.headers
        labels = {"adapter": "poet", "finish_reason": "adapter_unavailable"}
        assert door.registry.get_sample_value("perft_adapter_requests_total", labels) == 1
        assert not door.vllm.bodies


@on_a_loop
async def test_a_version_that_can_never_be_served_is_503_and_counted(folder: Path) -> None:
    async with doors(folder) as door:
        door.desk.found("poet").accepted = None
        answered = await door.ask({"model": "poet"})
        assert (answered.status, answered.code) == (503, "adapter_unavailable")
        labels = {"adapter": "poet", "finish_reason": "adapter_unavailable"}
        assert door.registry.get_sample_value("perft_adapter_requests_total", labels) == 1


@on_a_loop
async def test_a_delete_ends_what_waits(folder: Path) -> None:
    async with doors(folder) as door:
        door.desk.engine.delays["place"] = 0.5
        asked = asyncio.create_task(door.ask({"model": "poet"}))
        await door.desk.until(lambda: door.desk.scheduler.requests_waiting(door.desk.ref("poet@1")) == 1)
        await door.desk.service.delete("poet", None, ADMIN)
        assert ((await asked).status, (await asked).code) == (410, "adapter_deleted")
        await door.desk.until_gone("poet")


# The failure


@on_a_loop
async def test_a_failure_takes_the_place_of_vllms_words(folder: Path) -> None:
    async with doors(folder, plain(500, FAILURE)) as door:
        answered = await door.ask({"model": "poet"})
        assert answered.status == 410 and json.loads(answered.body) == ERROR.body()
        assert answered.headers[b"retry-after"] == b"3"
        assert answered.headers[b"content-length"] == str(len(answered.body)).encode()
        door.vllm.script = plain(500)
        answered = await door.ask({"model": "poet"})
        assert (answered.status, answered.code) == (500, "internal_error") and b"Internal server" not in answered.body
        door.vllm.script = plain(200, FAILURE)
        assert json.loads((await door.ask({"model": "poet"})).body) == {"fine": True}


CONTENT = b'data: {"id": "1", "choices": [{"text": "data: {\\"error\\": 1}"}]}\n\n'
VLLM_SAYS = b'data: {"error": {"message": "Gone", "code": 410}}\n\n'
VLLM_FAILED = b'data: {"error": {"message": "/root/x.py broke", "type": "InternalServerError", "code": 500}}\n\n'
DONE = b"data: [DONE]\n\n"


def events(body: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line.startswith(b"data: ")]
    return [json.loads(line) if line != b"[DONE]" else "[DONE]" for line in lines]


@on_a_loop
async def test_a_failure_within_a_stream_takes_the_place_of_vllms_event(folder: Path) -> None:
    async with doors(folder, streamed([CONTENT, CONTENT, VLLM_SAYS, DONE], failure_before=2)) as door:
        answered = await door.ask({"model": "poet"})
        assert answered.body == CONTENT * 2 + b"data: " + json.dumps(ERROR.body()).encode() + b"\n\n" + DONE
        assert answered.status == 200 and events(answered.body)[2] == ERROR.body()


@on_a_loop
async def test_a_failure_of_the_request_itself_names_its_field(folder: Path) -> None:
    for failure, named in (
        (ContextLengthError("too long"), "prompt"), (InvalidRequestError("no grammar"), "response_format"),
        (InvalidRequestError("no grammar", param="tools"), "tools"), (EngineUnavailableError("gone"), None),
    ):  # fmt: skip
        async with doors(folder / str(named), plain(400, failure)) as door:
            answered = await door.ask({"model": "poet", "prompt": "x", "response_format": {"type": "json_object"}})
            error = json.loads(answered.body)["error"]
            assert (error["code"], error["param"]) == (failure.code, named)


@on_a_loop
async def test_a_stream_without_an_error_passes_as_it_is(folder: Path) -> None:
    chunks = [CONTENT, CONTENT[:7], CONTENT[7:30], CONTENT[30:], b"data: {x", DONE]
    async with doors(folder, streamed(chunks)) as door:
        answered = await door.ask({"model": "poet"})
        assert answered.body == b"".join(chunks)
        bodies = [m["body"] for m in answered.messages[1:]]
        assert bodies == [CONTENT, b"", CONTENT[:30], CONTENT[30:], b"data: {x", DONE, b""], "nothing else is held back"


@on_a_loop
async def test_an_error_of_vllms_own_within_a_stream_is_told_as_ours(folder: Path) -> None:
    refusal = (
        b'data: {"error": {"message": "n must be at most 3", "type": "BadRequestError", "param": null, "code": 400}}'
    )
    async with doors(folder, streamed([CONTENT, refusal + b"\n\n", DONE])) as door:
        answered = await door.ask({"model": "poet", "n": 4})
        (error,) = (event["error"] for event in events(answered.body)[1:2])
        assert error == {
            "message": "n must be at most 3", "type": "invalid_request_error", "param": "n", "code": "invalid_request",
        }  # fmt: skip
        assert answered.body.startswith(CONTENT) and answered.body.endswith(DONE)


@on_a_loop
async def test_an_error_before_the_first_event_has_a_status_of_its_own(folder: Path) -> None:
    """Nothing was sent yet: not even that all is well."""
    for said, status, code in ((VLLM_SAYS, 410, "invalid_request"), (VLLM_FAILED, 500, "internal_error")):
        async with doors(folder / code, streamed([said, DONE])) as door:
            answered = await door.ask({"model": "poet"})
            assert answered.status == (400 if status < 500 else 500) and answered.code == code
            assert answered.headers[b"content-type"] == b"application/json"
    async with doors(folder / "ours", streamed([VLLM_SAYS, DONE], failure_before=0)) as door:
        answered = await door.ask({"model": "poet"})
        assert (answered.status, json.loads(answered.body)) == (410, ERROR.body())


@on_a_loop
async def test_the_event_is_found_wherever_the_stream_is_cut(folder: Path) -> None:
    whole = CONTENT + VLLM_SAYS + DONE
    told = CONTENT + b"data: " + json.dumps(ERROR.body()).encode() + b"\n\n" + DONE
    async with doors(folder) as door:
        for cut in range(1, len(whole)):
            for chunks in (
                [whole[:cut], whole[cut:]],
                [whole[:cut], *(whole[i : i + 1] for i in range(cut, len(whole)))],
            ):
                before = 0 if cut >= len(CONTENT) else 1
                door.vllm.script = streamed(chunks, failure_before=before)
                assert (await door.ask({"model": "poet"})).body == told, (cut, len(chunks))


@on_a_loop
async def test_the_other_dialects_have_their_own_event(folder: Path) -> None:
    anthropic = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"Gone"}}\n\n'
    async with doors(folder, streamed([CONTENT, anthropic], failure_before=1)) as door:
        answered = await door.ask({"model": "poet"}, "/v1/messages")
        event = answered.body.removeprefix(CONTENT)
        assert event.startswith(b"event: error\ndata: ")
        (told,) = events(event.removeprefix(b"event: error\n"))
        assert told == ERROR.body("anthropic") and told["error"]["type"] == "not_found_error"


@on_a_loop
async def test_a_stream_that_breaks_off_still_says_why(folder: Path) -> None:
    """vLLM's /v1/responses lets an exception of the engine's client end the stream without a word."""
    async with doors(folder, streamed([CONTENT], ends=False)) as door:
        answered = await door.ask({"model": "poet"}, "/v1/responses")
        event = answered.body.removeprefix(CONTENT)
        assert event.startswith(b"event: error\ndata: ")
        (told,) = events(event.removeprefix(b"event: error\n"))
        flat = {"type": "error", "code": "adapter_deleted", "message": ERROR.message, "param": "model"}
        assert told == flat | {"sequence_number": 1} | ERROR.body()
        door.vllm.script = streamed([CONTENT[:20]], ends=False)
        answered = await door.ask({"model": "poet"}, "/v1/responses")
        assert answered.body.startswith(CONTENT[:20] + b"\n\nevent: error\n")


@on_a_loop
async def test_a_failure_raised_before_anything_was_sent(folder: Path) -> None:
    async def fail(vllm: Vllm, scope: Scope, receive: Receive, send: Send) -> None:
        vllm.contexts[-1].failure = FAILURE
        raise RuntimeError

    async with doors(folder, fail) as door:
        answered = await door.ask({"model": "poet"})
        assert answered.status == 410 and json.loads(answered.body) == ERROR.body()


@on_a_loop
async def test_what_selects_no_model_passes_untouched(folder: Path) -> None:
    async with opened(folder):
        seen: list[Scope] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope)

        for scope in (
            {"type": "http", "state": {"route": match("GET", "/v1/models")}},
            {"type": "http", "state": {}},
            {"type": "lifespan"},
        ):
            await AdapterRouting(app)(scope, sending(b""), Answered().send)
            assert seen[-1] is scope
