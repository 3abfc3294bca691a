"""Where a wrong calculation goes wrong."""

import pytest

from benchmarks.quality.base import Recipe
from benchmarks.quality.mistakes import KINDS, first_mistakes, kind_of
from benchmarks.quality.places import BASE
from perft.hf.base import load_model, load_tokenizer
from perft.training.encoding import IGNORED, Encoded

TOKENS = ["14", "+", "27", "=", "41", ",", "41", "-", "5", "=", "36", "<eos>"]


@pytest.mark.parametrize(
    ("place", "kind"),
    [(0, "quantity"), (1, "sign"), (2, "quantity"), (4, "result"), (5, "end"), (6, "quantity"), (10, "result"),
     (11, "end")],
)  # fmt: skip
def test_each_token_of_a_calculation_is_of_a_kind(place: int, kind: str) -> None:
    assert kind_of(TOKENS, place) == kind and kind in KINDS


def test_a_result_of_several_tokens_is_one_result() -> None:
    assert kind_of(["99", "+", "9", "=", "10", "8"], 5) == "result"


def test_problems_are_counted_by_their_first_mistake() -> None:
    """The base as it is does not say that 15 + 1 is 50; it does say what comes before."""
    import torch

    model, tokenizer = load_model(str(BASE), torch.float32), load_tokenizer(str(BASE))
    ids = tokenizer.encode("7 + 8 = 15, 15 + 1 = 50", add_special_tokens=False)
    encoded = Encoded(ids, [IGNORED] * (len(ids) - 2) + ids[-2:])
    assert first_mistakes(model, tokenizer, [encoded] * 3) == {"quantity": 0, "sign": 0, "result": 3, "end": 0}
    assert len(tokenizer) == Recipe().vocabulary
