"""Timelines: scaling, cutting, notices, and that nothing but the seed decides them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.errors import ConfigError
from spotserve.replay.timeline import Arrive, GiveNotice, Launch, Scaling, Take, merge
from spotserve.replay.trace import CapacityEvent, CapacityTrace, RequestTrace, TraceRequest


def capacity(*rows: tuple[float, str, str]) -> CapacityTrace:
    return CapacityTrace(tuple(CapacityEvent(at_s, change, name, "z") for at_s, change, name in rows), "test")  # type: ignore[arg-type]


def requests(*arrivals_s: float) -> RequestTrace:
    return RequestTrace(tuple(TraceRequest(at_s, 10, 20) for at_s in arrivals_s), "test")


FLEET = capacity((0, "add", "a"), (0, "add", "b"), (100, "remove", "a"), (150, "add", "c"), (200, "remove", "b"))


def test_the_initial_fleet_is_what_was_added_at_time_0() -> None:
    timeline = merge(FLEET, None, Scaling(grace_s=30))
    assert timeline.initial == {"a": "z", "b": "z"}
    assert timeline.actions == (
        GiveNotice(70.0, "a", 100.0),
        Take(100.0, "a", noticed=True),
        Launch(150.0, "c", "z"),
        GiveNotice(170.0, "b", 200.0),
        Take(200.0, "b", noticed=True),
    )
    assert timeline.duration_s == 200.0


def test_without_grace_or_share_nobody_is_told() -> None:
    for scaling in (Scaling(grace_s=0), Scaling(notice_share=0)):
        assert [take.noticed for take in merge(FLEET, None, scaling).losses] == [False, False]


def test_a_later_start_takes_the_fleet_of_that_time() -> None:
    timeline = merge(FLEET, requests(10, 120, 160), Scaling(start_s=120, grace_s=30))
    assert list(timeline.initial) == ["b"]
    assert [(action.at_s, type(action)) for action in timeline.actions] == [
        (0.0, Arrive),
        (30.0, Launch),
        (40.0, Arrive),
        (50.0, GiveNotice),
        (80.0, Take),
    ]
    assert [arrival.index for arrival in timeline.arrivals] == [0, 1]


def test_a_duration_cuts_both_traces() -> None:
    timeline = merge(FLEET, requests(10, 120, 160), Scaling(duration_s=150, grace_s=0))
    assert timeline.duration_s == 150
    assert timeline.actions[-1] == Launch(150.0, "c", "z")
    assert [arrival.at_s for arrival in timeline.arrivals] == [10.0, 120.0]


def test_time_runs_faster_but_grace_does_not() -> None:
    timeline = merge(FLEET, requests(100), Scaling(time_scale=10, grace_s=2))
    assert [(type(action), action.at_s) for action in timeline.actions] == [
        (GiveNotice, 8.0),
        (Take, 10.0),
        (Arrive, 10.0),
        (Launch, 15.0),
        (GiveNotice, 18.0),
        (Take, 20.0),
    ]


def test_rate_scale_moves_requests_alone() -> None:
    timeline = merge(FLEET, requests(0, 100, 200), Scaling(rate_scale=2, grace_s=0))
    assert [arrival.at_s for arrival in timeline.arrivals] == [0.0, 50.0, 100.0]
    assert [take.at_s for take in timeline.losses] == [100.0, 200.0]


def test_equal_times_fleet_first_and_in_the_traces_order() -> None:
    fleet = capacity((0, "add", "a"), (0, "add", "b"), (5, "remove", "b"), (5, "add", "c"), (5, "remove", "a"))
    actions = merge(fleet, requests(5, 5), Scaling(grace_s=0)).actions
    assert [(type(action), getattr(action, "instance", None) or action.index) for action in actions] == [
        (Take, "b"),
        (Launch, "c"),
        (Take, "a"),
        (Arrive, 0),
        (Arrive, 1),
    ]


def test_a_young_instance_gets_a_shorter_grace() -> None:
    fleet = capacity((0, "add", "a"), (10, "add", "b"), (15, "remove", "b"), (20, "remove", "a"))
    actions = merge(fleet, None, Scaling(grace_s=30)).actions
    assert actions[:3] == (GiveNotice(0.0, "a", 20.0), Launch(10.0, "b", "z"), GiveNotice(10.0, "b", 15.0))


def test_a_name_that_comes_back_is_another_instance() -> None:
    fleet = capacity((0, "add", "a"), (5, "remove", "a"), (6, "add", "a"), (9, "remove", "a"))
    actions = merge(fleet, None, Scaling(grace_s=0)).actions
    assert [action.instance for action in actions] == ["a", "a#2", "a#2"]  # type: ignore[union-attr]


def test_values_of_the_trace_win_over_draws() -> None:
    trace = RequestTrace((TraceRequest(0.0, 1, 2, 0.3, 9), TraceRequest(0.0, 1, 2)), "test")
    given_, drawn = merge(None, trace, Scaling(sampled_share=1.0)).arrivals
    assert (given_.temperature, given_.seed) == (0.3, 9)
    assert drawn.temperature == 0.8 and 0 <= drawn.seed < 2**32


def test_undisturbed_keeps_requests_and_fleet() -> None:
    timeline = merge(FLEET, requests(1, 2), Scaling())
    assert timeline.undisturbed().actions == timeline.arrivals and timeline.undisturbed().initial == timeline.initial


LONG = capacity(*[(0, "add", f"i{n}") for n in range(400)], *[(10 + n, "remove", f"i{n}") for n in range(400)])
MANY = requests(*(n / 10 for n in range(2000)))


def test_shares_are_met_and_seeds_differ() -> None:
    one, other = (merge(LONG, MANY, Scaling(notice_share=0.3, sampled_share=0.7, seed=seed)) for seed in (1, 2))
    assert 0.2 < sum(take.noticed for take in one.losses) / 400 < 0.4
    assert 0.65 < sum(arrival.temperature > 0 for arrival in one.arrivals) / 2000 < 0.75
    assert len({arrival.seed for arrival in one.arrivals}) == 2000
    assert [take.noticed for take in one.losses] != [take.noticed for take in other.losses]


def test_a_further_row_moves_no_other_draw() -> None:
    shorter = CapacityTrace(LONG.events[:-1], "test")
    scaling = Scaling(notice_share=0.5, seed=4)
    assert merge(shorter, None, scaling).losses == merge(LONG, None, scaling).losses[:-1]


@given(st.integers(0, 2**32), st.floats(0.1, 100), st.floats(0.1, 10), st.floats(0, 300), st.none() | st.floats(0, 300))
def test_the_same_input_gives_the_same_timeline(
    seed: int, time_scale: float, rate_scale: float, start_s: float, duration_s
) -> None:
    scaling = Scaling(start_s, duration_s, time_scale, rate_scale, notice_share=0.5, seed=seed)
    trace = requests(*(n * 1.5 for n in range(200)))
    timeline = merge(FLEET, trace, scaling)
    assert timeline == merge(FLEET, trace, replace(scaling))
    times = [action.at_s for action in timeline.actions]
    assert times == sorted(times) and all(0 <= at_s <= timeline.duration_s for at_s in times)
    launched = set(timeline.initial)
    for action in timeline.actions:
        if isinstance(action, Launch):
            launched.add(action.instance)
        elif not isinstance(action, Arrive):
            assert action.instance in launched, "nobody is taken who is not there"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time_scale", 0.0),
        ("rate_scale", -1.0),
        ("time_scale", float("inf")),
        ("start_s", -1.0),
        ("grace_s", float("nan")),
        ("notice_share", 1.1),
    ],
)
def test_scaling_that_makes_no_sense_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Scaling(**{field: value})
