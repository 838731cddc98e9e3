"""Cuts into stages that are not alike: the dynamic program against every composition."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.planner.stages import Cut, Stage, best_cut, best_order, welded


def compositions(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, layers))) for cut in cuts]


def cost_of(sizes: tuple[int, ...], stages: Sequence[Stage], layer_bytes: Sequence[int]) -> tuple[float, float] | None:
    """(slowest, sum), straight from the meaning of the words; None when a stage does not fit."""
    times, begin = [], 0
    for size, stage in zip(sizes, stages, strict=True):
        if sum(layer_bytes[begin : begin + size]) > stage.budget_bytes:
            return None
        times.append(stage.constant_s + sum(stage.layer_s[begin : begin + size]))
        begin += size
    return max(times), sum(times)


def everything_tried(stages: Sequence[Stage], layer_bytes: Sequence[int]) -> tuple[float, float] | None:
    costs = (cost_of(sizes, stages, layer_bytes) for sizes in compositions(len(layer_bytes), len(stages)))
    return min((cost for cost in costs if cost is not None), default=None)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[Stage], list[int]]:
    """Whole numbers, whose sums are exact: what is equal is equal to the bit."""
    layers, stages = draw(st.integers(1, 16)), draw(st.integers(1, 5))
    numbers = st.lists(st.integers(0, 9), min_size=layers, max_size=layers)
    made = [
        Stage(tuple(map(float, draw(numbers))), float(draw(st.integers(0, 5))), draw(st.integers(5, 60))) for _ in range(stages)
    ]
    return made, draw(numbers)


@settings(max_examples=250, deadline=None)
@given(pipelines())
def test_the_dynamic_program_finds_what_trying_everything_finds(given: tuple[list[Stage], list[int]]) -> None:
    stages, layer_bytes = given
    found, best = best_cut(stages, layer_bytes), everything_tried(stages, layer_bytes)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert (found.slowest_s, found.total_s) == best
    assert cost_of(found.sizes, stages, layer_bytes) == best


@pytest.mark.parametrize("num_layers", [4, 9, 16])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_never_worse_than_stages_of_equal_length(num_layers: int, num_stages: int) -> None:
    layer_s = welded(0.01, num_layers, embedding=0.001, head=0.024)
    stages = [Stage(layer_s, 0.002, num_layers)] * num_stages
    each, rest = divmod(num_layers, num_stages)
    uniform = cost_of(tuple(each + (stage < rest) for stage in range(num_stages)), stages, [1] * num_layers)
    found = best_cut(stages, [1] * num_layers)
    assert found is not None
    assert uniform is not None
    assert found.slowest_s <= uniform[0] * (1 + 1e-12)


def test_a_large_head_shortens_the_last_stage() -> None:
    """Llama-3-8B: a head of 2.4 layers; stages of 9 hand on 15.6 % more steps than 8/8/8/8."""
    stages = [Stage(welded(1.0, 32, embedding=0.0, head=2.4), 0.0, 100)] * 4
    found = best_cut(stages, [1] * 32)
    assert found is not None
    assert found.slowest_s == pytest.approx(9.0)
    assert found.sizes == (9, 9, 9, 5)
    assert (8 + 2.4) / found.slowest_s == pytest.approx(1.1556, abs=1e-3)


def test_a_slow_device_gets_fewer_layers_and_a_small_one_what_it_holds() -> None:
    fast, slow, small = Stage((1.0,) * 12, 0.0, 12), Stage((2.0,) * 12, 0.0, 12), Stage((1.0,) * 12, 0.0, 2)
    assert best_cut([fast, slow], [1] * 12) == Cut((8, 4), 8.0, 16.0)
    assert best_cut([small, fast], [1] * 12) == Cut((2, 10), 10.0, 12.0)
    assert best_cut([small, small], [1] * 12) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 6), st.integers(0, 6))
def test_trying_the_ends_is_trying_every_order(num_layers: int, kinds: list[int], embedding: int, head: int) -> None:
    numbers = [int(each) for each in welded(3, num_layers, embedding=embedding, head=head)]
    known = [
        Stage(tuple(map(float, welded(speed, num_layers, embedding=0, head=speed * head))), constant, budget)
        for speed, constant, budget in ((1, 2.0, 40), (2, 0.0, 14), (5, 1.0, 30))
    ]
    stages = [known[kind] for kind in kinds]
    every = [everything_tried([stages[i] for i in order], numbers) for order in itertools.permutations(range(len(stages)))]
    best = min((each for each in every if each is not None), default=None)
    found = best_order(stages, numbers)
    if best is None:
        assert found is None
        return
    assert found is not None
    order, cut = found
    assert sorted(order) == list(range(len(stages)))
    assert (cut.slowest_s, cut.total_s) == best
    assert cost_of(cut.sizes, [stages[index] for index in order], numbers) == best


def test_eighty_layers_over_sixty_four_stages() -> None:
    stages = [Stage(welded(0.01, 80, embedding=0.0, head=0.02), 1e-4, 3)] * 64
    found = best_cut(stages, [1] * 80)
    assert found is not None
    assert sum(found.sizes) == 80
    assert found.slowest_s == pytest.approx(0.03 + 1e-4)
