"""Slices through a pipeline: the dynamic program against every composition, the chooser against the dynamic program."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.planner.chunks import SliceCost, SliceCostFit, best_chunks, choose_chunk, num_pairs, pipeline_s

COSTS = {
    "70B, L4": SliceCost(14e-3, 0.34e-3, 8e-9),
    "13B, T4": SliceCost(6.2e-3, 0.235e-3, 12e-9),
    "70B, A100": SliceCost(2.6e-3, 0.078e-3, 2e-9),
    "7B, H100": SliceCost(0.16e-3, 4.7e-6, 0.3e-9),
    "demo model on one core": SliceCost(0.4e-3, 12e-6, 4e-9),
    "long context": SliceCost(1e-3, 1e-5, 40e-9),
    "cheap constant": SliceCost(1e-6, 1e-4, 0.0),
    "dear constant": SliceCost(0.2, 1e-5, 1e-10),
}
costs = st.builds(SliceCost, st.floats(0, 2), st.floats(0.01, 1), st.floats(0, 0.3))


def chosen(cost: SliceCost, *, num_stages: int, tokens: int, context: int, max_tokens: int) -> tuple[int, ...]:
    """What asking for one slice after the other gives."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        position = context + sum(lengths)
        lengths.append(
            choose_chunk(
                cost,
                num_stages=num_stages,
                start=context,
                position=position,
                end=context + tokens,
                max_tokens=max_tokens,
            )
        )
    return tuple(lengths)


def compositions(tokens: int) -> list[tuple[int, ...]]:
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, tokens), n) for n in range(tokens))
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, tokens))) for cut in cuts]


@settings(max_examples=60, deadline=None)
@given(costs, st.integers(1, 6), st.integers(1, 9), st.integers(0, 20), st.integers(1, 9))
def test_the_dynamic_program_finds_what_trying_everything_finds(
    cost: SliceCost, num_stages: int, tokens: int, context: int, max_tokens: int
) -> None:
    found = best_chunks(cost, num_stages=num_stages, tokens=tokens, context=context, max_tokens=max_tokens)
    assert sum(found) == tokens and max(found) <= max_tokens
    every = [lengths for lengths in compositions(tokens) if max(lengths) <= max_tokens]
    best_s = min(pipeline_s(cost, lengths, num_stages=num_stages, context=context) for lengths in every)
    assert pipeline_s(cost, found, num_stages=num_stages, context=context) == pytest.approx(best_s, rel=1e-12)


@given(costs, st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 20))
def test_the_closed_form_is_what_a_pipeline_takes(cost: SliceCost, num_stages: int, lengths: list[int], context: int) -> None:
    starts = itertools.accumulate(lengths, initial=context)
    times = [cost.seconds(tokens, start) for tokens, start in zip(lengths, starts, strict=False)]
    done_s = [0.0] * (num_stages + 1)
    for time_s in times:
        for stage in range(1, num_stages + 1):
            done_s[stage] = max(done_s[stage], done_s[stage - 1]) + time_s
    assert pipeline_s(cost, tuple(lengths), num_stages=num_stages, context=context) == pytest.approx(done_s[-1], rel=1e-12)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
def test_the_chooser_is_within_three_percent_of_a_bound_that_nothing_goes_below(name: str, num_stages: int) -> None:
    """Of m slices the sum is m constants and the work, and the longest is no shorter than their mean."""
    cost = COSTS[name]
    for tokens, context in itertools.product((48, 200, 1000, 4096, 30_000), (0, 6000)):
        work_s = cost.work_s(tokens, context)
        bound_s = min(
            m * cost.constant_s + work_s + (num_stages - 1) * (cost.constant_s + work_s / m) for m in range(1, tokens + 1)
        )
        found = chosen(cost, num_stages=num_stages, tokens=tokens, context=context, max_tokens=tokens)
        found_s = pipeline_s(cost, found, num_stages=num_stages, context=context)
        assert found_s <= 1.03 * bound_s, (tokens, context, found)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
def test_the_chooser_is_within_three_percent_of_the_dynamic_program(name: str, num_stages: int) -> None:
    cost = COSTS[name]
    for tokens, context, max_tokens in itertools.product((48, 1000, 4096), (0, 6000), (256, 100_000)):
        grain = max(1, tokens // 32)
        best = best_chunks(cost, num_stages=num_stages, tokens=tokens, context=context, grain=grain, max_tokens=max_tokens)
        found = chosen(cost, num_stages=num_stages, tokens=tokens, context=context, max_tokens=max_tokens)
        best_s, found_s = (pipeline_s(cost, lengths, num_stages=num_stages, context=context) for lengths in (best, found))
        assert found_s <= 1.03 * best_s, (tokens, context, max_tokens, best, found)


@settings(max_examples=60, deadline=None)
@given(costs, st.integers(1, 8), st.integers(1, 40), st.integers(0, 60))
def test_the_chooser_is_near_the_best_of_short_prompts_and_odd_costs(
    cost: SliceCost, num_stages: int, tokens: int, context: int
) -> None:
    best = best_chunks(cost, num_stages=num_stages, tokens=tokens, context=context)
    found = chosen(cost, num_stages=num_stages, tokens=tokens, context=context, max_tokens=tokens)
    assert sum(found) == tokens
    one_token_s = cost.work_s(1, context + tokens)
    best_s, found_s = (pipeline_s(cost, lengths, num_stages=num_stages, context=context) for lengths in (best, found))
    assert found_s <= 1.03 * best_s + (num_stages - 1) * one_token_s, "a slice is whole tokens: its time is rounded up by one"


def test_one_stage_takes_the_longest_slices_and_more_stages_shorter_ones() -> None:
    cost = COSTS["70B, L4"]
    first = [chosen(cost, num_stages=stages, tokens=4096, context=0, max_tokens=8192)[0] for stages in (1, 2, 4, 8)]
    assert first[0] == 4096
    assert first == sorted(first, reverse=True) and len(set(first)) == 4


def test_slices_get_shorter_as_their_context_grows() -> None:
    lengths = chosen(COSTS["long context"], num_stages=4, tokens=8000, context=0, max_tokens=8000)
    assert list(lengths[:-1]) == sorted(lengths[:-1], reverse=True)
    assert lengths[0] > 1.5 * lengths[-2]


@given(costs, st.integers(1, 500), st.integers(0, 500))
def test_tokens_within_inverts_work(cost: SliceCost, tokens: int, context: int) -> None:
    assert cost.tokens_within(cost.work_s(tokens, context), context) == pytest.approx(tokens, rel=1e-9)


@given(costs, st.integers(0, 30), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_work_does_not_depend_on_where_slices_end(cost: SliceCost, context: int, lengths: list[int]) -> None:
    starts = itertools.accumulate(lengths, initial=context)
    parts_s = sum(cost.work_s(tokens, start) for tokens, start in zip(lengths, starts, strict=False))
    assert parts_s == pytest.approx(cost.work_s(sum(lengths), context), rel=1e-12)


def test_the_fit_finds_the_cost_and_follows_its_change() -> None:
    random = np.random.default_rng(0)
    fit = SliceCostFit(SliceCost(1.0, 1.0, 1.0))
    for true in (COSTS["70B, L4"], COSTS["demo model on one core"]):
        for _ in range(1500):
            tokens, context = int(random.integers(1, 512)), int(random.integers(0, 8000))
            seconds = true.seconds(tokens, context) * random.normal(1, 0.02)
            fit.observe(tokens=tokens, pairs=num_pairs(tokens, context), seconds=seconds)
        for tokens, context in ((16, 0), (256, 0), (256, 4000), (512, 8000)):
            assert fit.cost.seconds(tokens, context) == pytest.approx(true.seconds(tokens, context), rel=0.06)


def test_a_fit_that_sees_one_shape_alone_predicts_it_and_stays_finite() -> None:
    fit = SliceCostFit(SliceCost(1e-3, 1e-5, 1e-9))
    for _ in range(5000):
        fit.observe(tokens=64, pairs=num_pairs(64, 0), seconds=5e-3)
    assert fit.cost.seconds(64, 0) == pytest.approx(5e-3, rel=1e-3)
    fit.observe(tokens=256, pairs=num_pairs(256, 1000), seconds=2e-2)
    assert fit.cost.seconds(256, 1000) == pytest.approx(2e-2, rel=0.5)
