"""What is learned of the load from gateways' reports."""

import random

import pytest

from spotserve.controller.demand import UNKNOWN, WINDOW_S, Demand
from spotserve.core.messages import GatewayReport, Served
from spotserve.planner.workload import Lengths, Workload


def report(arrived: int = 0, *served: tuple[int, int]) -> GatewayReport:
    sizes = tuple(Served(*each) for each in served)
    return GatewayReport(gateway_id="g", queued=0, running=0, suspended=0, finished=0, lost=0, arrived=arrived, served=sizes)


def feed(demand: Demand, counts: list[int], start_s: float = 0.0) -> float:
    """One report per window; the time after the last one."""
    for index, count in enumerate(counts):
        demand.note(report(count), start_s + index * WINDOW_S)
    return start_s + len(counts) * WINDOW_S


def test_nothing_is_believed_before_anything_came() -> None:
    demand = Demand()
    demand.note(report(0), 0.0)
    assert demand.workload(100.0) == UNKNOWN


def test_what_the_user_knows_stands() -> None:
    known = Workload(rate_rps=7.0, prompt=Lengths.fixed(10), output=Lengths.fixed(20))
    demand = Demand(known)
    feed(demand, [100] * 10)
    assert demand.workload(50.0) == known


def test_the_rate_is_that_of_the_newest_half_minute() -> None:
    demand = Demand()
    now_s = feed(demand, [100] * 10 + [10] * 6)
    assert demand.workload(now_s).rate_rps == pytest.approx(10 / WINDOW_S)


def test_a_rate_that_ends_is_forgotten_without_reports() -> None:
    demand = Demand()
    now_s = feed(demand, [50] * 10)
    assert demand.workload(now_s + 60).rate_rps == 0
    assert demand.workload(now_s + 1000) == UNKNOWN


def test_lengths_are_those_of_what_was_answered() -> None:
    demand = Demand()
    demand.note(report(100, *((prompt, 7) for prompt in range(10, 20))), 0.0)
    workload = demand.workload(WINDOW_S)
    assert workload.prompt.quantile(0) == 10
    assert workload.prompt.quantile(1) == 19
    assert workload.output == Lengths.of([7] * 10)


@pytest.mark.parametrize(("shape", "expected"), [(1.0, 1.0), (0.25, 2.0), (1000.0, 0.05)])
def test_burstiness_is_the_dispersion_of_the_counts(shape: float, expected: float) -> None:
    """Gamma gaps of this shape have a coefficient of variation of 1 / sqrt(shape)."""
    chance = random.Random(3)
    found = []
    for _ in range(20):
        demand, now_s = Demand(), 0.0
        demand.note(report(0), 0.0)
        while now_s < 24 * WINDOW_S:
            now_s += chance.gammavariate(shape, 1 / (shape * 4))
            demand.note(report(1), now_s)
        found.append(demand.workload(now_s).gap_cv)
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.25, abs=0.05)
