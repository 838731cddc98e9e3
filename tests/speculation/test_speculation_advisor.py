"""What the advisor predicts, against published figures and against its own definition.

The published step times are those of Llama-3.1-8B on an H100 under vLLM with an EAGLE-3 drafter, as SpecDecode-Bench fits them:
5.89 ms + 21.0 us per token + 39.3 ns per token of KV, drafting flat 2.14 ms, 1.21 ms per step besides. The tables computed from
them count KV once per sequence, leave the draft's own tokens out of it, and have the 1.21 ms in every step, draft or none.
"""

from math import ceil, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.speculation.advisor import (
    DraftCost,
    DraftProfile,
    Load,
    best_choice,
    break_even_acceptance,
    expected_tokens,
    is_better,
    speedup,
    step_s,
    tokens_per_s,
    worth_loading,
)
from spotserve.speculation.cost import StepCost

H100 = StepCost(5.89e-3 + 1.21e-3, 0.0, 21.0e-6, 39.3e-9, kv_reread=0.0)
FLAT = DraftCost(2.14e-3, 0.0, 0.0)
BEST_AT_LOAD = {
    (512, 1): ((1.51, 7), (2.48, 13), (3.65, 20), (6.56, 20)),
    (512, 32): ((1.26, 3), (1.78, 5), (2.29, 7), (3.37, 12)),
    (512, 128): ((1.09, 2), (1.39, 3), (1.65, 4), (2.11, 7)),
    (512, 256): ((1.05, 1), (1.26, 2), (1.45, 3), (1.77, 5)),
    (4096, 128): ((1.40, 3), (1.95, 4), (2.47, 6), (3.51, 11)),
    (32768, 128): ((1.81, 5), (2.82, 8), (3.95, 12), (6.74, 20)),
}
"""Context and batch: best speedup and its length, at most 20, at acceptance .5, .7, .8, .9."""
BREAK_EVEN = {
    1: (0.31, 0.34, 0.36, 0.40, 0.43, 0.46),
    3: (0.24, 0.34, 0.41, 0.49, 0.56, 0.62),
    5: (0.24, 0.40, 0.49, 0.58, 0.66, 0.71),
}
"""Length: break-even acceptance at context 512, batch 1, 32, 64, 128, 256, 512. The table is *rounded up*: the first hundredth that
pays (0.3026 is printed as .31)."""
IDEAL = {
    0.02: ((2.17, 6), (2.76, 8), (3.82, 11), (6.37, 19)),
    0.05: ((1.92, 4), (2.35, 6), (3.09, 8), (4.67, 13)),
    0.1: ((1.67, 3), (1.98, 4), (2.47, 6), (3.43, 10)),
    0.2: ((1.40, 2), (1.58, 3), (1.87, 4), (2.37, 7)),
    0.3: ((1.23, 1), (1.37, 2), (1.55, 3), (1.87, 5)),
}
"""Cost of a drafted token over that of a step: best speedup and its length if verifying is free, at acceptance .6, .7, .8, .9."""

chances = st.floats(0.0, 1.0)
seconds = st.floats(0.0, 1.0)
step_costs = st.builds(
    StepCost,
    st.floats(1e-4, 1.0),
    st.floats(0.0, 1e-3),
    st.floats(0.0, 1e-2),
    st.floats(0.0, 1e-5),
    st.sampled_from([1, 4]),
    st.floats(0.0, 1.0),
)
draft_costs = st.builds(DraftCost, st.floats(0.0, 1e-2), st.floats(0.0, 1e-2), st.floats(0.0, 1e-3), st.floats(0.0, 1e-3))
loads = st.builds(Load, st.integers(1, 512), st.integers(0, 4096))


# ---------------------------------------------------------------------- published figures


@pytest.mark.parametrize("load", BEST_AT_LOAD)
def test_the_best_speedup_and_its_length_are_those_of_the_published_fit(load: tuple[int, int]) -> None:
    context, batch = load
    for acceptance, (expected, length) in zip((0.5, 0.7, 0.8, 0.9), BEST_AT_LOAD[load], strict=True):
        draft = DraftProfile.constant(acceptance, cost=FLAT, depth=20)
        choice = best_choice(H100, draft, load=Load(batch, context))
        assert choice.length == length
        assert choice.speedup == pytest.approx(expected, abs=0.0065)  # the table cuts or rounds two digits


@pytest.mark.parametrize("length", BREAK_EVEN)
def test_break_even_acceptance_is_that_of_the_published_fit(length: int) -> None:
    for batch, expected in zip((1, 32, 64, 128, 256, 512), BREAK_EVEN[length], strict=True):
        found = break_even_acceptance(H100, FLAT, length=length, load=Load(batch, 512))
        assert found is not None
        assert ceil(found * 100) / 100 == pytest.approx(expected)


@pytest.mark.parametrize("share", IDEAL)
def test_where_verifying_is_free_the_cost_of_drafting_alone_decides(share: float) -> None:
    target, cost = StepCost(1.0, 0.0, 0.0, 0.0), DraftCost(0.0, share, 0.0)
    for acceptance, (expected, length) in zip((0.6, 0.7, 0.8, 0.9), IDEAL[share], strict=True):
        choice = best_choice(target, DraftProfile.constant(acceptance, cost=cost, depth=40), load=Load(1, 0))
        assert (round(choice.speedup, 2), choice.length) == (expected, length)


def test_published_pairs_of_latency_and_throughput_imply_eight_drafted_tokens() -> None:
    """13.13 ms per drafted token, 3.81 tokens per step, 23.10 tokens/s; and 6.69 ms, 3.70, 32.59 (arXiv 2402.01528)."""
    pairs = ((13.13e-3, 3.81, 23.10), (6.69e-3, 3.70, 32.59))
    verify_s = [tokens / rate - 8 * draft_s for draft_s, tokens, rate in pairs]
    assert verify_s == pytest.approx([60e-3, 60e-3], abs=0.2e-3)
    other = {length: [tokens / rate - length * draft_s for draft_s, tokens, rate in pairs] for length in (7, 9)}
    assert all(abs(first - second) > 5e-3 for first, second in other.values())
    for draft_s, tokens, rate in pairs:
        played = (1.0,) * 8 + (tokens,)
        draft = DraftProfile("", DraftCost(0.0, draft_s, 0.0), (1.0,) * 8, tokens_by_length=played)
        assert tokens_per_s(StepCost(60e-3, 0, 0, 0), draft, length=8, load=Load(1, 0)) == pytest.approx(rate, rel=2e-3)
    (slow_s, slow_tokens, _), (quick_s, quick_tokens, _) = pairs
    assert is_better(tokens=quick_tokens, draft_s=8 * quick_s, than_tokens=slow_tokens, than_draft_s=8 * slow_s, verify_s=60e-3), (
        "fewer accepted tokens, and yet faster"
    )


# ---------------------------------------------------------------------- the law


@given(st.floats(0.0, 0.999), st.integers(0, 30))
def test_the_same_chance_at_every_depth_makes_a_geometric_series(chance: float, length: int) -> None:
    assert expected_tokens((chance,) * length, length) == pytest.approx((1 - chance ** (length + 1)) / (1 - chance))


@given(st.lists(chances, max_size=8))
def test_a_longer_draft_never_brings_less(acceptance: list[float]) -> None:
    tokens = [expected_tokens(acceptance, length) for length in range(len(acceptance) + 1)]
    assert tokens[0] == 1.0 and tokens == sorted(tokens) and tokens[-1] <= len(acceptance) + 1


@given(step_costs, draft_costs, loads, st.lists(chances, min_size=1, max_size=8))
def test_the_best_choice_is_no_worse_than_any_other_and_never_than_none(
    target: StepCost, cost: DraftCost, load: Load, acceptance: list[float]
) -> None:
    draft = DraftProfile("d", cost, tuple(acceptance))
    choice = best_choice(target, draft, load=load)
    speedups = [speedup(target, draft, length=length, load=load) for length in range(draft.longest + 1)]
    assert speedups[0] == 1.0 and choice.speedup == pytest.approx(max(speedups)) and choice.speedup >= 1.0
    assert choice.speedup == pytest.approx(speedups[choice.length])


@given(step_costs, draft_costs, loads, st.integers(1, 8), chances)
def test_above_break_even_drafting_pays_and_below_it_does_not(
    target: StepCost, cost: DraftCost, load: Load, length: int, chance: float
) -> None:
    threshold = break_even_acceptance(target, cost, length=length, load=load)
    gain = speedup(target, DraftProfile.constant(chance, cost=cost, depth=length), length=length, load=load)
    assert gain >= 1 - 1e-9 if chance >= (inf if threshold is None else threshold) else gain <= 1 + 1e-9


@given(chances, chances, seconds, seconds, st.floats(1e-3, 1.0), st.integers(1, 8))
def test_the_published_rule_prefers_whoever_makes_more_tokens_per_second(
    this: float, other: float, this_s: float, other_s: float, verify_s: float, length: int
) -> None:
    target, load = StepCost(verify_s, 0.0, 0.0, 0.0), Load(1, 0)
    one = DraftProfile.constant(this, cost=DraftCost(0.0, this_s, 0.0), depth=length)
    two = DraftProfile.constant(other, cost=DraftCost(0.0, other_s, 0.0), depth=length)
    ours, theirs = (tokens_per_s(target, each, length=length, load=load) for each in (one, two))
    preferred = is_better(
        tokens=one.tokens(length),
        draft_s=length * this_s,
        than_tokens=two.tokens(length),
        than_draft_s=length * other_s,
        verify_s=verify_s,
    )
    assert preferred == (ours > theirs) or ours == pytest.approx(theirs)


def test_rows_are_padded_and_each_reads_its_context_again_as_far_as_that_costs() -> None:
    draft = DraftProfile.constant(0.5, cost=DraftCost(0.0, 0.0, 0.0), depth=4)
    padded = StepCost(0.0, 0.0, 1.0, 0.0, row_multiple=4)
    assert [step_s(padded, draft, length=length, load=Load(1, 0)) for length in range(5)] == [4, 4, 4, 4, 8]
    for reread, seconds_each in ((1.0, 40), (0.5, 25), (0.0, 10)):
        target = StepCost(0.0, 0.0, 0.0, 1.0, kv_reread=reread)
        assert step_s(target, draft, length=3, load=Load(2, 10)) == 2 * seconds_each


def test_what_was_measured_goes_before_what_the_acceptance_implies() -> None:
    free, target = DraftCost(0.0, 0.0, 0.0), StepCost(1.0, 0.0, 1.0, 0.0)
    draft = DraftProfile("d", free, (0.5, 0.5), tokens_by_length=(1.0, 1.2, 1.3), drafted_by_length=(0.0, 0.1, 0.2))
    assert tokens_per_s(target, draft, length=2, load=Load(1, 0)) == pytest.approx(1.3 / 2.2)


def test_a_drafter_costs_nothing_while_it_is_off_and_a_host_drafter_makes_no_passes() -> None:
    cost = DraftCost(1.0, 10.0, 100.0, 1000.0)
    assert cost.at(sequences=5, depth=0) == 0.0
    assert cost.at(sequences=5, depth=2) == 1 + 20 + 1000 + 5000


# ---------------------------------------------------------------------- worth its memory


def verdict(*, batch: int, free_bytes: int, acceptance: float = 0.7) -> tuple[bool, int, str]:
    draft = DraftProfile.constant(acceptance, cost=FLAT, depth=8)
    found = worth_loading(
        H100, draft, load=Load(batch, 512), weight_bytes=500_000_000, kv_bytes_per_token=4096, free_bytes=free_bytes
    )
    assert found.is_loaded == (found.length > 0)
    return found.is_loaded, found.length, found.reason


def test_a_drafter_that_fits_and_gains_is_loaded() -> None:
    assert verdict(batch=1, free_bytes=2**30)[:2] == (True, 8)


def test_a_drafter_that_does_not_fit_is_not_loaded_whatever_it_gains() -> None:
    loaded, _, reason = verdict(batch=1, free_bytes=501_000_000)
    assert not loaded and "502 MB" in reason and "501 MB are free" in reason


def test_kv_of_the_drafter_counts_with_the_load() -> None:
    assert verdict(batch=32, free_bytes=568_000_000)[0]
    assert not verdict(batch=32, free_bytes=566_000_000)[0]


def test_a_drafter_that_gains_less_than_the_error_of_the_fit_is_not_loaded() -> None:
    loaded, _, reason = verdict(batch=512, free_bytes=2**33, acceptance=0.47)
    assert not loaded and "less than 1.03 x" in reason
