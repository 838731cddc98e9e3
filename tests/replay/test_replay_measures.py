"""The formulas of a replay's numbers, by hand and against naive twins."""

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from played_scene import by_hand, event, outcome, replays

from spotserve.replay.measures import AFTER_LOSS_S, PERCENTS, measure, metric_names
from spotserve.replay.outcome import Gaps, Outcomes, Replayed
from spotserve.replay.recovery import HEARD_S, Windows, availability, recovery_times_s
from spotserve.replay.summary import Objectives, percentile


def test_by_hand() -> None:
    found = measure(by_hand(), Objectives(ttft_s=1.0, tpot_s=1.0, e2e_s=8.0), after_loss_s=20.0)
    expected = {
        "duration_s": 110.0,
        "trace_duration_s": 100.0,
        "requests_total": 4,
        "requests_finished": 3,
        "requests_lost": 1,
        "requests_interrupted": 2,
        "requests_moved": 1,
        "requests_resumed": 0,
        "requests_restarted": 1,
        "tokens_total": 11,
        "prompt_tokens_total": 40,
        "tokens_recomputed": 12,
        "weights_moved_bytes": 3,
        "weights_read_bytes": 4,
        "kv_moved_bytes": 5,
        "ttft_p50_s": 1.0,
        "ttft_mean_s": 5.5 / 3,
        "ttft_max_s": 4.0,
        "tpot_p50_s": 0.5,
        "tpot_max_s": 8.5 / 4,
        "e2e_p50_s": 5.0,
        "e2e_p999_s": 9.0,
        "longest_gap_p99_s": 5.0,
        "longest_gap_s": 5.0,
        "requests_per_s": 3 / 110,
        "offered_requests_per_s": 0.04,
        "tokens_per_s": 0.1,
        "goodput_requests_per_s": 1 / 110,
        "goodput_share": 0.25,
        "losses_with_notice": 2,
        "losses_without_notice": 1,
        "loss_moments": 2,
        "recovery_mean_s": 20.0,
        "recovery_max_s": 20.0,
        "recoveries_unfinished": 1,
        "available_share": 0.9,
        "whole_plan_share": 0.69,
        "after_loss_requests": 2,
        "after_loss_ttft_p99_s": 0.5,
        "after_loss_e2e_p50_s": 9.0,
        "after_loss_longest_gap_max_s": 5.0,
        "instance_hours_spot": 100 / 3600,
        "instance_hours_on_demand": 90 / 3600,
        "instance_seconds": 190.0,
        "spot_usd": 0.05,
        "on_demand_usd": 0.1,
        "cost_usd": 0.15,
        "all_on_demand_usd": 190 / 900,
        "saved_share": 1 - 0.15 * 900 / 190,
        "usd_per_million_output_tokens": 0.15 / 11 * 1e6,
        "usd_per_million_tokens": 0.15 / 41 * 1e6,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["itl_p50_s"] == pytest.approx(0.5, rel=0.003) and found["itl_max_s"] == pytest.approx(5.0, rel=0.003)
    assert found["itl_mean_s"] == pytest.approx(1.0, rel=0.003)


@given(replays(), st.sampled_from([5.0, AFTER_LOSS_S]))
def test_against_naive_twins(replayed: Replayed, after_loss_s: float) -> None:
    objectives = Objectives(ttft_s=20.0, tpot_s=3.0, e2e_s=70.0)
    found, outcomes = measure(replayed, objectives, after_loss_s=after_loss_s), list(replayed.outcomes)
    families = {"ttft": [o.ttft_s for o in outcomes], "tpot": [o.tpot_s for o in outcomes], "e2e": [o.e2e_s for o in outcomes]}
    for name, values in families.items():
        known = [value for value in values if value is not None]
        for short, percent in PERCENTS.items():
            assert found[f"{name}_{short}_s"] == percentile(known, percent)
        assert found[f"{name}_max_s"] == max(known, default=None)
    assert found["requests_interrupted"] == sum(o.was_interrupted for o in outcomes)
    good = [
        o.is_whole and (o.ttft_s or 0) <= 20 and (o.tpot_s or 0) <= 3 and (o.e2e_s or 0) <= 70
        for o in outcomes
    ]  # fmt: skip
    assert found["goodput_share"] == (sum(good) / len(good) if good else None)
    losses_s = {each.time_s for each in replayed.fleet_events if each.kind == "lost"}
    touched = [o for o in outcomes if any(o.arrival_s <= at_s + after_loss_s and o.end_s >= at_s for at_s in losses_s)]
    assert found["after_loss_requests"] == len(touched)
    assert found["after_loss_e2e_p99_s"] == percentile([o.e2e_s for o in touched if o.e2e_s is not None], 99)
    seconds = sum(max(0.0, lease.until_s - lease.from_s) for lease in replayed.leases)
    assert found["instance_seconds"] == pytest.approx(seconds)


@given(replays())
def test_availability_against_looking_every_tenth(replayed: Replayed) -> None:
    changes = [each for each in replayed.fleet_events if each.kind == "serving"]
    any_share, planned_share = availability(replayed)
    if not changes:
        assert any_share is planned_share is None
        return
    looks = []
    for tenth in range(600):
        told = [each for each in changes if each.time_s <= tenth / 10 + 1e-9]
        looks.append((told[-1].details["replicas"], told[-1].details["planned"]) if told else (0, 0))
    assert any_share == pytest.approx(sum(replicas > 0 for replicas, _ in looks) / 600)
    assert planned_share == pytest.approx(sum(0 < planned <= replicas for replicas, planned in looks) / 600)


def with_events(*events: object) -> Replayed:
    return replace(by_hand(), fleet_events=events)


def serving(at_s: float, replicas: int, planned: int):
    return event(at_s, "serving", replicas=replicas, planned=planned)


def test_a_loss_that_was_seen_coming_takes_no_time() -> None:
    before = (serving(0.0, 2, 2), serving(3.0, 1, 2), serving(8.0, 2, 2), event(10.0, "lost", "a"))
    assert recovery_times_s(with_events(*before)) == [(0.0, True)]
    later_s = 10.0 + HEARD_S + 5
    assert recovery_times_s(with_events(*before, serving(later_s, 1, 2), serving(95.0, 2, 2))) == [(0.0, True)]


def test_a_loss_that_is_noticed_late_counts_from_the_loss() -> None:
    late = with_events(serving(0.0, 2, 2), event(10.0, "lost", "a"), serving(14.0, 1, 2), serving(40.0, 2, 2))
    assert recovery_times_s(late) == [(30.0, True)]


def test_what_is_whole_at_the_moment_of_the_loss_but_before_it_is_not_its_recovery() -> None:
    same = with_events(serving(2.0, 0, 1), serving(10.0, 1, 1), event(10.0, "lost", "a"), serving(10.0, 0, 1), serving(25.0, 1, 1))
    assert recovery_times_s(same) == [(15.0, True)]


def test_of_losses_while_something_lacks_each_counts_from_its_own_moment() -> None:
    twice = with_events(
        serving(0.0, 2, 2), serving(9.0, 1, 2), event(10.0, "lost", "a"), event(20.0, "lost", "b"), serving(30.0, 1, 1)
    )
    assert recovery_times_s(twice) == [(20.0, True), (10.0, True)]
    nothing_planned = with_events(serving(0.0, 1, 1), event(10.0, "lost", "a"), serving(10.0, 0, 0))
    assert recovery_times_s(nothing_planned) == [(100.0, False)]


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(0, 60), st.integers(0, 20), st.integers(0, 15))
def test_windows_against_trying_all(times_s: list[int], from_s: int, length_s: int, window_s: int) -> None:
    meets = any(from_s <= at_s + window_s and from_s + length_s >= at_s for at_s in times_s)
    assert Windows(sorted(times_s), window_s).meet(from_s, from_s + length_s) is meets


def test_of_nothing_there_are_no_numbers() -> None:
    empty = replace(by_hand(), outcomes=Outcomes(), gaps=Gaps(), fleet_events=(), leases=(), duration_s=0.0, ended_s=0.0)
    found = measure(empty)
    assert list(found) == metric_names()
    assert all(found[key] is None for key in ("e2e_p99_s", "goodput_share", "saved_share", "recovery_mean_s", "itl_mean_s"))
    assert found["requests_total"] == found["cost_usd"] == 0


def test_a_hundred_thousand_requests_take_a_moment() -> None:
    outcomes = Outcomes([outcome(n, n / 10, n / 10 + 1, n / 10 + 3 + n % 7, longest_gap_s=0.1) for n in range(50_000)])
    started_s = time.process_time()
    assert measure(replace(by_hand(), outcomes=outcomes))["requests_total"] == 50_000
    assert time.process_time() - started_s < 3.0
