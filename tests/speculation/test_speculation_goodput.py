"""The cut against every set of nodes that is whole paths."""

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.speculation.cost import StepCost
from spotserve.speculation.goodput import Base, best_cut
from spotserve.speculation.tree import ROOT

FLAT = StepCost(5e-3, 1e-5, 3e-4, 0.0)
PADDED = StepCost(1.1e-3, 70e-6, 130e-6, 0.0, row_multiple=4)
WITH_KV = StepCost(2e-3, 1e-5, 1e-4, 3e-7, row_multiple=4, kv_reread=0.5)


def forest(chance: random.Random, size: int) -> tuple[list[int], list[float]]:
    """Parents, and chances of survival that never grow along a path. Some are equal, some 0."""
    parents: list[int] = []
    survivals: list[float] = []
    for node in range(size):
        parent = chance.randint(ROOT, node - 1)
        parents.append(parent)
        above = 1.0 if parent == ROOT else survivals[parent]
        survivals.append(above * chance.choice((0.0, 1.0, 0.5, chance.random(), chance.random())))
    return parents, survivals


def closed_sets(parents: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All sets in which every node's parent is."""
    for kept in itertools.product((False, True), repeat=len(parents)):
        if all(not kept[node] or parent == ROOT or kept[parent] for node, parent in enumerate(parents)):
            yield tuple(node for node, is_kept in enumerate(kept) if is_kept)


def goodput_of(nodes: Sequence[int], worths: Sequence[float], kv_tokens: Sequence[int], base: Base, cost: StepCost) -> float:
    """From first principles."""
    read = base.kv_tokens + cost.kv_reread * sum(kv_tokens[node] for node in nodes)
    seconds = cost.at(sequences=base.sequences, rows=base.rows + len(nodes), kv_tokens=read)
    return (base.worth + sum(worths[node] for node in nodes)) / seconds


def scene(seed: int, size: int, *, contexts: bool) -> tuple[list[int], list[float], list[int], Base]:
    chance = random.Random(seed)
    parents, worths = forest(chance, size)
    sequences = chance.randint(1, 5)
    kv_tokens = [chance.choice((10, 500, 4000)) if contexts else 100] * size
    if contexts:
        kv_tokens = [chance.choice((10, 500, 4000)) for _ in range(size)]
    base = Base(sequences, sequences + chance.choice((0, 0, 7)), sequences * 100, float(sequences))
    return parents, worths, kv_tokens, base


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6), size=st.integers(0, 11), cost=st.sampled_from([FLAT, PADDED]))
def test_no_set_of_whole_paths_is_better_where_rows_cost_alike(seed: int, size: int, cost: StepCost) -> None:
    parents, worths, kv_tokens, base = scene(seed, size, contexts=False)
    cut = best_cut(worths, kv_tokens, base, cost, max_nodes=100)
    best = max(goodput_of(nodes, worths, kv_tokens, base, cost) for nodes in closed_sets(parents))
    assert cut.goodput == pytest.approx(best, rel=1e-9)
    assert cut.goodput == pytest.approx(goodput_of(cut.nodes, worths, kv_tokens, base, cost), rel=1e-9)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(0, 40),
    cost=st.sampled_from([FLAT, PADDED, WITH_KV]),
    max_nodes=st.integers(0, 45),
)
def test_the_cut_is_the_best_beginning_of_the_line_and_whole_paths(seed: int, size: int, cost: StepCost, max_nodes: int) -> None:
    parents, worths, kv_tokens, base = scene(seed, size, contexts=True)
    cut = best_cut(worths, kv_tokens, base, cost, max_nodes=max_nodes)
    line = sorted(range(size), key=lambda node: -worths[node])
    best = max(goodput_of(line[:count], worths, kv_tokens, base, cost) for count in range(min(size, max_nodes) + 1))
    assert cut.nodes == tuple(line[: len(cut.nodes)])
    assert len(cut.nodes) <= max_nodes
    assert cut.goodput == pytest.approx(best, rel=1e-9), "it stopped before a better beginning"
    assert cut.goodput == pytest.approx(goodput_of(cut.nodes, worths, kv_tokens, base, cost), rel=1e-9)
    assert all(parents[node] == ROOT or parents[node] in cut.nodes for node in cut.nodes), "a node without its parent"


def test_padding_is_filled_even_by_unlikely_nodes() -> None:
    base = Base(1, 1, 0, 1.0)
    assert len(best_cut([0.01] * 5, [0] * 5, base, PADDED, max_nodes=10).nodes) == 3
    assert best_cut([0.01] * 5, [0] * 5, base, FLAT, max_nodes=10).nodes == ()


def test_a_poor_row_may_be_paid_for_by_the_padding_that_it_opens() -> None:
    """Four likely nodes behind each other fill a multiple of rows that the first alone would not pay."""
    cost = StepCost(1e-3, 0.0, 1e-4, 0.0, row_multiple=4)
    cut = best_cut([0.2] * 4, [0] * 4, Base(4, 4, 0, 4.0), cost, max_nodes=10)
    one = goodput_of([0], [0.2] * 4, [0] * 4, Base(4, 4, 0, 4.0), cost)
    none = goodput_of([], [0.2] * 4, [0] * 4, Base(4, 4, 0, 4.0), cost)
    assert one < none
    assert (len(cut.nodes) == 4) == (goodput_of(range(4), [0.2] * 4, [0] * 4, Base(4, 4, 0, 4.0), cost) > none)


def test_long_contexts_are_verified_less() -> None:
    base = Base(2, 2, 8000, 2.0)
    dear = StepCost(1e-3, 0.0, 1e-5, 1e-6)
    near, far = best_cut([0.5], [10], base, dear, max_nodes=4), best_cut([0.5], [8000], base, dear, max_nodes=4)
    assert near.nodes == (0,)
    assert far.nodes == ()
