"""Moves between disk, host and device: each end is told as it was, once, and only to the move it belongs to."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters.errors import InvalidAdapterError
from adapters.format.files import Limits
from adapters.format.folder import read_folder
from adapters.ref import AdapterRef
from perft.base_model import BaseShape
from perft.config import AdapterConfig
from perft.engine.host_cache import HostCache, Mover, OtherContentsError, Outcome
from perft.engine.moe_layer import StepState
from perft.engine.ordered_loading import Move, Movers, OrderedLoading
from perft.engine.perft_loader import PerftLoader
from perft.engine.pool import RowPool, pack
from tests.store_contents import BASE

WAIT_S = 500.0


@pytest.fixture
def mover() -> Mover:
    return Mover(0.0)


def nothing() -> None:
    pass


def until(gate: threading.Event) -> Callable[[], None]:
    """A job that ends with the gate's opening."""

    def job() -> None:
        gate.wait(WAIT_S)

    return job


def end_untold(mover: Mover, key: str, job: Callable[[], None]) -> None:
    """Run a job to its end without being told of it: the question, or its answer, got lost."""
    gate = threading.Event()
    mover.start("before it", until(gate))
    assert mover.start(key, job) == Outcome("running")
    gate.set()
    mover._jobs[key].exception(WAIT_S)


class EndsWhileAsked(Future[None]):
    """A job that succeeds just after waiting for it was given up."""

    def result(self, timeout: float | None = None) -> None:
        try:
            return super().result(timeout)
        except TimeoutError:
            self.set_result(None)
            raise


def test_a_job_that_ends_while_it_is_asked_for_did_not_fail(mover: Mover) -> None:
    job = mover._jobs["a"] = EndsWhileAsked()
    assert mover.outcome("a") == Outcome("running")
    job.set_result(None)
    assert mover.outcome("a") == Outcome("done") and mover.outcome("a") == Outcome("reported")


def test_a_job_is_under_way_until_its_end(mover: Mover) -> None:
    gate = threading.Event()
    assert mover.start("a", until(gate)) == Outcome("running")
    assert mover.start("a", nothing) == Outcome("running") == mover.outcome("a")
    gate.set()
    assert mover.outcome("a", WAIT_S) == Outcome("done")


@pytest.mark.parametrize("error", [TimeoutError("the disk"), MemoryError("no memory"), OSError("no such file")])
def test_a_job_that_raised_failed_with_its_reason(mover: Mover, error: Exception) -> None:
    def fail() -> None:
        raise error

    end_untold(mover, "a", fail)
    assert mover.outcome("a") == Outcome("failed", f"{type(error).__name__}: {error}")


def test_an_end_that_was_never_told_is_not_the_next_jobs(mover: Mover) -> None:
    ran: list[str] = []
    end_untold(mover, "a", nothing)
    assert Outcome("done") in (mover.start("a", lambda: ran.append("a")), mover.outcome("a", WAIT_S))
    assert ran == ["a"]


def test_a_job_that_ended_can_be_forgotten(mover: Mover) -> None:
    gate = threading.Event()
    end_untold(mover, "a", nothing)
    mover.start("b", until(gate))
    for key in "abc":
        mover.forget(key)
    assert mover.outcome("a") == Outcome("reported") and mover.outcome("b") == Outcome("running")
    gate.set()


@pytest.mark.parametrize("undo", ["evict", "drop"])
def test_what_was_undone_is_not_told_to_be_done(undo: str) -> None:
    """The server's question for a move's end failed; it gives up the rows, or the host's copy."""
    calls: list[str] = []
    cache: Any = SimpleNamespace(evict=calls.append, drop=calls.append)
    pool, movers = RowPool(16, 8, torch.float32, torch.device("cpu"), 1), Movers()
    loading = OrderedLoading(StepState(), movers, PerftLoader(cache, pool, movers))
    order = AdapterRef("a@1", 1, "PERFT", "d", Path("/a"))
    move: Move = "place" if undo == "evict" else "prepare"
    movers[move]._jobs[order.key] = lost = Future()
    lost.set_result(None)
    getattr(loading, undo)(order.key)
    assert calls == ["d"] and loading.outcome(move, order) == Outcome("reported")


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> HostCache:
    """HostCache whose reading takes no time: a folder's name is its digest."""
    monkeypatch.setattr(HostCache, "_packed", lambda self, digest, folder: SimpleNamespace(rows=0))
    return HostCache(RowPool(16, 8, torch.float32, torch.device("cpu"), 1), BASE, Limits())


@pytest.fixture
def often() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("often")
def test_folders_are_known_whatever_is_dropped_while_they_are_read(tiers: HostCache) -> None:
    """The engine's thread drops some adapters while the other one reads the next."""
    old, new = [f"old{i}" for i in range(1000)], [f"new{i}" for i in range(1000)]
    for digest in old:
        tiers.read(digest, Path(digest))
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(lambda: [tiers.read(digest, Path(digest)) for digest in new])
        for digest in old:
            tiers.drop(digest)
        reading.result(WAIT_S)
    assert [tiers.digest_of(digest) for digest in new] == new
    assert not any(tiers.digest_of(digest) for digest in old)


def test_a_folder_is_known_while_its_content_is_held(tiers: HostCache) -> None:
    tiers.read("a", Path("a-first"))
    tiers.drop("a")
    assert not tiers.holds("a") and tiers.digest_of("a-first") is None
    tiers.read("a", Path("a-second"))
    assert tiers.digest_of("a-first") is None and tiers.digest_of("a-second") == "a"
    tiers._placed.add("a")
    tiers.drop("a")
    assert tiers.digest_of("a-second") == "a", "its rows are there"
    tiers.evict("a")
    assert tiers.digest_of("a-second") is None


SERVED = replace(BASE, num_layers=2, moe_layers=(0, 1))


def cache(base: BaseShape = SERVED, limits: Limits | None = None) -> HostCache:
    pool = RowPool(64, base.hidden_size, base.dtype, torch.device("cpu"), base.num_layers)
    return HostCache(pool, base, limits or Limits())


def stored(folder: Path) -> tuple[str, Path]:
    """The digest and the folder of an adapter of two layers, R with three experts of bottleneck 2."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in SERVED.moe_layers:
        shapes = {"router": (3, 8), "down_proj": (3, 2, 8), "up_proj": (3, 8, 2)}
        tensors |= {f"layers.{layer}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    tensors["layers.1.up_proj"][0, 0, 0] = 50_000.0
    folder.mkdir()
    (folder / "adapter_config.json").write_text(CONFIG.file_json())
    save_file(tensors, folder / "adapter_model.safetensors")
    return read_folder(folder, SERVED).digest, folder


CONFIG = AdapterConfig(
    base_model_name_or_path="tiny", variant="R", expert_type="lora", bottleneck=2, alpha=4.0, num_experts=3, top_k=2,
    renormalize=True,
)  # fmt: skip


def test_what_is_read_is_what_was_checked(tmp_path: Path) -> None:
    digest, folder = stored(tmp_path / "a")
    tiers = cache()
    tiers.read(digest, folder)
    expected = pack(CONFIG, read_folder(folder, SERVED).layer_weights(SERVED))
    assert tiers._host[digest].config == CONFIG
    assert tiers._host[digest].layers == expected.layers
    assert torch.equal(tiers._host[digest].rows_RD, expected.rows_RD)
    tiers.place(digest)
    assert tiers.holds(digest) and tiers.digest_of(str(folder)) == digest


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("raw", [b"", b"garbage", b"{}", bytes(70_000)])
def test_other_contents_are_never_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, raw: bytes
) -> None:
    digest, folder = stored(tmp_path / "a")
    monkeypatch.setattr("perft.engine.host_cache.load_layers", lambda *_: pytest.fail("parsed"))
    (folder / file).write_bytes(raw)
    tiers = cache()
    with pytest.raises((OtherContentsError, InvalidAdapterError), match=r"were changed|expected at most 65536"):
        tiers.read(digest, folder)
    assert not tiers.holds(digest) and tiers.digest_of(str(folder)) is None


def test_one_bit_of_the_weights_is_other_contents(tmp_path: Path) -> None:
    digest, folder = stored(tmp_path / "a")
    raw = bytearray((folder / "adapter_model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(OtherContentsError, match=f"expected {digest}"):
        cache().read(digest, folder)


def _as_pipe(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "safetensors: missing"),
    "weights that are a pipe": (_as_pipe, "expected a plain file"),
    "another file": (lambda folder: (folder / "evil.bin").touch(), "evil.bin: not part of an adapter"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_a_violation(tmp_path: Path, case: str) -> None:
    digest, folder = stored(tmp_path / "a")
    spoil, expected = BROKEN[case]
    spoil(folder)
    with pytest.raises(InvalidAdapterError, match=expected):
        cache().read(digest, folder)


OTHER_BASES: dict[str, tuple[BaseShape, str]] = {
    "dtype": (replace(SERVED, dtype=torch.float16), r"layers.1.up_proj: found values that overflow torch.float16"),
    "width": (replace(SERVED, hidden_size=16), r"layers.0.router: found shape \[3, 8\], expected \[3, 16\]"),
    "layers": (replace(SERVED, moe_layers=(0, 1, 2), num_layers=3), "layers.2.router: missing"),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_a_store_may_be_served_on_another_base(tmp_path: Path, case: str) -> None:
    digest, folder = stored(tmp_path / "a")
    base, expected = OTHER_BASES[case]
    with pytest.raises(InvalidAdapterError, match=expected) as caught:
        cache(base).read(digest, folder)
    if case == "dtype":
        assert len(caught.value.violations) == 1
        cache(replace(SERVED, dtype=torch.bfloat16)).read(digest, folder)


def test_a_base_that_cannot_serve_the_configuration(tmp_path: Path) -> None:
    digest, folder = stored(tmp_path / "a")
    config = CONFIG.model_copy(update={"base_fingerprint": "b" * 64})
    (folder / "adapter_config.json").write_text(config.file_json())
    base = replace(SERVED, fingerprint="a" * 64)
    with pytest.raises(InvalidAdapterError, match="base_fingerprint: found bbb"):
        cache(base).read(digest, folder)
    cache(base, Limits(allow_other_base=True)).read(digest, folder)
