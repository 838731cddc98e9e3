"""Closed forms of a pipeline against a small discrete-event simulation, and the number of slices against trying all."""

import heapq
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.planner.pipeline import cycle_s, through_s
from spotserve.planner.prefill import num_slices
from spotserve.planner.roofline import StepCost, roofline_s

stations = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


def simulate(times_s: list[list[float]], *, rounds: int = 1) -> list[list[float]]:
    """Jobs pass stations in order, `rounds` times; a station serves one at a time, who came first first. Ends of rounds by job."""
    ends: list[list[float]] = [[] for _ in times_s]
    free_s = [0.0] * len(times_s[0])
    arrivals = [(0.0, job, 0, job) for job in range(len(times_s))]
    ticket = itertools.count(len(times_s))
    while arrivals:
        at_s, _, station, job = heapq.heappop(arrivals)
        free_s[station] = max(free_s[station], at_s) + times_s[job][station]
        following = (station + 1) % len(free_s)
        if following == 0:
            ends[job].append(free_s[station])
        if following != 0 or len(ends[job]) < rounds:
            heapq.heappush(arrivals, (free_s[station], next(ticket), following, job))
    return ends


@settings(deadline=None, max_examples=50)
@given(stations, st.integers(1, 8))
def test_groups_that_go_round_take_the_cycle(stations_s: list[float], groups: int) -> None:
    ends = simulate([stations_s] * groups, rounds=60)
    seen_s = (ends[0][59] - ends[0][29]) / 30
    assert cycle_s(stations_s, groups) == pytest.approx(seen_s, rel=1e-9)


@given(stations, st.integers(1, 9), st.floats(0, 20))
def test_slices_are_through_when_the_simulation_says(stations_s: list[float], slices: int, head_s: float) -> None:
    """The last station may take longer with the last slice: that comes on top."""
    last_s = [*stations_s[:-1], stations_s[-1] + head_s]
    ends = simulate([stations_s] * (slices - 1) + [last_s])
    assert through_s(stations_s, slices) + head_s == pytest.approx(ends[-1][0], rel=1e-9)


def test_fewer_groups_than_stages_leave_stages_idle() -> None:
    assert cycle_s([1.0] * 4, 4) == cycle_s([1.0] * 4, 1) == 4.0
    assert cycle_s([1.0, 2.0, 1.0], 3) == 6.0, "an uneven pipeline waits for its slowest stage"


costs = st.builds(
    StepCost,
    constant_s=st.floats(0, 1),
    weights_s=st.floats(1e-3, 3),
    token_s=st.floats(1e-3, 1),
    pair_s=st.floats(0, 1e-2),
    kv_token_s=st.just(0.0),
    token_link_s=st.floats(0, 0.1),
)


@settings(deadline=None)
@given(costs, st.integers(1, 200), st.integers(1, 8))
def test_the_number_of_slices_is_that_of_trying_all(cost: StepCost, tokens: int, num_stages: int) -> None:
    work_s = cost.token_s * tokens + cost.pair_s * tokens * (tokens + 1) / 2

    def takes_s(number: int) -> float:
        each_s = roofline_s(work_s / number, cost.weights_s) + cost.constant_s + tokens * cost.token_link_s / number
        return (number + num_stages - 1) * each_s

    found = num_slices(cost, tokens, num_stages)
    assert takes_s(found) == pytest.approx(min(takes_s(number) for number in range(1, tokens + 1)), rel=1e-9)
    assert found == 1 or num_stages > 1
