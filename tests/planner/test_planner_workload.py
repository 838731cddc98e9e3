"""Lengths by quantiles, and limits."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.planner.workload import Latency, Lengths, Objective, Workload


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=200))
def test_quantiles_of_a_sample_stay_within_it_and_grow(sample: list[float]) -> None:
    lengths = Lengths.of(sample)
    quantiles = [lengths.quantile(share / 50) for share in range(51)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] == min(sample)
    assert quantiles[-1] == max(sample)
    assert min(sample) <= lengths.mean * (1 + 1e-9) + 1e-9
    assert lengths.mean <= max(sample) * (1 + 1e-9) + 1e-9


def test_moments_are_those_of_the_uniform_pieces() -> None:
    lengths = Lengths(((0.0, 0.0), (0.5, 100.0), (1.0, 300.0)))
    assert lengths.mean == pytest.approx(0.5 * 50 + 0.5 * 200)
    assert lengths.mean_square == pytest.approx(0.5 * 100**2 / 3 + 0.5 * (100**2 + 100 * 300 + 300**2) / 3)
    assert lengths.quantile(0.75) == pytest.approx(200)


def test_fixed_lengths_do_not_vary() -> None:
    lengths = Lengths.fixed(128)
    assert (lengths.mean, lengths.mean_square, lengths.quantile(0.99)) == (128, 128**2, 128)


@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        (Objective(), True),
        (Objective(ttft_s=1.0, tpot_s=0.1, e2e_s=10.0), True),
        (Objective(ttft_s=0.5), False),
        (Objective(tpot_s=0.05), False),
        (Objective(e2e_s=9.0), False),
    ],
)
def test_every_limit_counts(objective: Objective, kept: bool) -> None:
    latency = Latency(0.5, 0.9, 0.05, 0.09, 5.0, 9.5, 0.7)
    assert latency.meets(objective) is kept
    assert not Latency(inf, inf, inf, inf, inf, inf, 1.0).meets(objective)


def test_a_workload_is_cut_to_what_a_context_holds() -> None:
    workload = Workload(rate_rps=1.0, prompt=Lengths(((0.0, 10.0), (1.0, 600.0))), output=Lengths.fixed(200))
    assert workload.within(800) == workload
    cut = workload.within(400)
    assert cut.prompt.quantile(1.0) + cut.output.quantile(1.0) == pytest.approx(400)
    assert cut.prompt.quantile(0.0) == 10
    assert cut.rate_rps == 1.0
