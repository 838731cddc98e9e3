"""The split of a prefix against every whole-token split, and the formula it comes from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_specs import small_spec

from spotserve.core.messages import Address, SequenceAction, SequenceReport
from spotserve.migration.split import best_split, split_s
from spotserve.migration.verdicts import Destination, InstanceSpeed, decide, margin_s

times = st.floats(1e-6, 1e-2)


@given(st.integers(0, 400), times, times, st.sampled_from([0.0, 0.01, 1.0]), st.floats(-1, 3))
def test_no_whole_token_split_that_keeps_the_deadline_is_sooner(tokens, recompute, move, wait, within) -> None:
    split = best_split(tokens, recompute_token_s=recompute, move_token_s=move, wait_s=wait, move_within_s=within)
    every = [
        split_s(tokens - sent, sent, recompute_token_s=recompute, move_token_s=move, wait_s=wait)
        for sent in range(tokens + 1)
        if sent == 0 or sent * move <= within
    ]
    assert split.recompute_tokens + split.move_tokens == tokens
    assert split.move_tokens == 0 or split.move_tokens * move <= within
    assert split.seconds == pytest.approx(min(every), rel=1e-12, abs=1e-15)


@given(st.integers(1000, 100_000), times, times)
def test_the_formula_and_a_grid_of_one_percent(tokens, recompute, move) -> None:
    """planning.md: x* = t_net / (t_rec + t_net), both parts done at once; no share of a 1 % grid is better."""
    split = best_split(tokens, recompute_token_s=recompute, move_token_s=move)
    assert abs(split.recompute_tokens - tokens * move / (recompute + move)) < 1 + 1e-6
    together = tokens * recompute * move / (recompute + move)
    assert together <= split.seconds * (1 + 1e-9) and split.seconds <= together + max(recompute, move)
    grid = [round(tokens * share / 100) for share in range(101)]
    for each in grid:
        assert split.seconds <= split_s(each, tokens - each, recompute_token_s=recompute, move_token_s=move, wait_s=0.0) + 1e-12


MODEL = small_spec(num_layers=5, num_kv_heads=5, head_size=5)
"""1000 bytes of KV per token."""

SPEED = InstanceSpeed(step_s=0.02, prefill_tokens_per_s=1000.0, link_bytes_per_s=1e6)
"""A token takes 1 ms to compute and 1 ms to send."""


def orders(*sequences: SequenceReport, left_s: float = 100.0, can_split: bool = True, speed: InstanceSpeed = SPEED):
    to = (Destination("r-2", "i-2", Address("h", 1), 8, speed),)
    return decide(sequences, now_s=0.0, deadline_s=left_s, source=SPEED, destinations=to, model=MODEL, can_split=can_split)


def test_half_is_computed_where_both_ways_are_equally_fast() -> None:
    (order,) = orders(SequenceReport("s", 1001, 1000, 10_000))
    assert (order.action, order.recompute_tokens) == (SequenceAction.SPLIT, 500)
    assert order.destination == Address("h", 1)
    assert order.reason == "recompute 500 tokens while 500 are sent in 500 ms; deadline in 100.0 s"


def test_who_cannot_split_moves_or_resumes() -> None:
    (order,) = orders(SequenceReport("s", 1001, 1000, 10_000), can_split=False)
    assert (order.action, order.recompute_tokens) == (SequenceAction.RESUME, 0)


def test_the_deadline_limits_what_is_sent_and_the_next_waits_for_both_ways() -> None:
    made = orders(SequenceReport("a", 1001, 1000, 10_000), SequenceReport("b", 1001, 1000, 10_000), left_s=0.5)
    assert [each.action for each in made] == [SequenceAction.SPLIT, SequenceAction.RESUME]
    assert made[0].recompute_tokens == 700, "0.3 s can be used: 300 tokens are sent"


def test_where_the_speed_of_computing_is_not_known_all_is_sent() -> None:
    (order,) = orders(SequenceReport("s", 1001, 1000, 10_000), speed=InstanceSpeed(0.02, 0.0, 1e6))
    assert order.action is SequenceAction.MOVE


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.floats(0.3, 20))
def test_split_or_not_the_port_is_never_taken_for_longer_than_there_is(contexts, left_s) -> None:
    made = orders(*(SequenceReport(f"s-{index}", tokens + 1, tokens, 9**9) for index, tokens in enumerate(contexts)), left_s=left_s)
    computed = {f"s-{index}": tokens for index, tokens in enumerate(contexts)}
    sent = sum(computed[each.request_id] - each.recompute_tokens for each in made if each.action is not SequenceAction.RESUME)
    assert sent * 1e-3 <= left_s - margin_s(left_s) + 1e-9
