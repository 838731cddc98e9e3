"""What belongs to the embedding, the layers and the head is found by watching; what cannot be cut is refused."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spotserve.core.cut import EMBEDDING
from spotserve.core.errors import ModelError
from spotserve.engine.homes import find_homes

LAYERS = 3
Forward = Callable[["Decoder", torch.Tensor, dict[str, object]], torch.Tensor]


class Layer(nn.Module):
    """Never run: what is watched is the model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "full"
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a layer is replaced")


class Decoder(nn.Module):
    """A causal language model around `run`."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(4)
        self.between = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8)
        self._run = run

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self._run(self, input_ids, {"paged": kwargs["paged"]}))


def plain(model: Decoder, ids: torch.Tensor, paged: dict[str, object]) -> torch.Tensor:
    hidden = model.embed(ids)
    for layer in model.layers:
        assert layer.kind == "full", "the model may ask a layer for its kind"
        hidden = layer(hidden, **paged)
    logits: torch.Tensor = model.head(model.norm(hidden))
    return logits


def in_tuples(model: Decoder, ids: torch.Tensor, paged: dict[str, object]) -> torch.Tensor:
    hidden = model.embed(ids)
    for layer in model.layers:
        hidden = layer(hidden, **paged)[0]
    logits: torch.Tensor = model.head(model.norm(hidden))
    return logits


def unpacked(model: Decoder, ids: torch.Tensor, paged: dict[str, object]) -> torch.Tensor:
    hidden = model.embed(ids)
    for layer in model.layers:
        (hidden,) = layer(hidden, **paged)
    logits: torch.Tensor = model.head(model.norm(hidden))
    return logits


@pytest.mark.parametrize(("run", "in_tuple"), [(plain, False), (in_tuples, True), (unpacked, True)])
def test_parts_are_told_apart_by_when_they_run(run: Forward, in_tuple: bool) -> None:
    homes = find_homes(Decoder(run), LAYERS)
    assert homes.layers_path == "layers"
    assert homes.layers_in_tuple is in_tuple
    assert homes.outside == {"embed": EMBEDDING, "norm": LAYERS, "head": LAYERS}, "and what never runs is nowhere"


def leaks_the_embedding(model: Decoder, ids: torch.Tensor, paged: dict[str, object]) -> torch.Tensor:
    first = hidden = model.embed(ids)
    for layer in model.layers:
        hidden = layer(hidden, (first * 2,), **paged)
    logits: torch.Tensor = model.head(hidden)
    return logits


def mixes_between(model: Decoder, ids: torch.Tensor, paged: dict[str, object]) -> torch.Tensor:
    hidden = model.embed(ids)
    for layer in model.layers:
        hidden = model.between(layer(hidden, **paged))
    logits: torch.Tensor = model.head(hidden)
    return logits


def norms_both_ends(model: Decoder, ids: torch.Tensor, paged: dict[str, object]) -> torch.Tensor:
    hidden = model.norm(model.embed(ids))
    for layer in model.layers:
        hidden = layer(hidden, **paged)
    logits: torch.Tensor = model.head(model.norm(hidden))
    return logits


def drops_keywords(model: Decoder, ids: torch.Tensor, _: dict[str, object]) -> torch.Tensor:
    return plain(model, ids, {})


def skips_a_layer(model: Decoder, ids: torch.Tensor, paged: dict[str, object]) -> torch.Tensor:
    hidden = model.embed(ids)
    for layer in list(model.layers)[1:]:
        hidden = layer(hidden, **paged)
    logits: torch.Tensor = model.between(hidden)
    return logits


def uses_a_weight_by_itself(model: Decoder, ids: torch.Tensor, paged: dict[str, object]) -> torch.Tensor:
    hidden = model.embed(ids)
    for layer in model.layers:
        hidden = layer(hidden, **paged)
    logits: torch.Tensor = hidden @ model.nowhere.T
    return logits


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (leaks_the_embedding, "more than the hidden state"),
        (mixes_between, "between runs between decoder layers"),
        (norms_both_ends, "norm runs before and after"),
        (drops_keywords, "keywords do not reach"),
        (skips_a_layer, "runs between decoder layers"),
        (uses_a_weight_by_itself, "nowhere"),
    ],
)
def test_what_cannot_be_cut_is_refused(run: Forward, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"Decoder: .*{reason}"):
        find_homes(Decoder(run), LAYERS)


def test_no_list_of_layers() -> None:
    with pytest.raises(ModelError, match="no list of 4 decoder layers"):
        find_homes(Decoder(plain), LAYERS + 1)
