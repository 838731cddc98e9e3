"""What steps cost: the law, and its fit against numpy's and scipy's solvers."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import nnls

from spotserve.speculation.cost import UNKNOWN, FadingFit, PassCost, PassCostFit, StepCost, StepCostFit

GPU = StepCost(7.1e-3, 0.0, 21e-6, 39.3e-9)
CPU = StepCost(1.1e-3, 70e-6, 130e-6, 2e-7, row_multiple=4, kv_reread=0.3)
PRIOR = (1.0, 0.02, 0.03)


def measured(coefficients: Sequence[float], count: int, seed: int, noise: float = 0.0) -> list[tuple[tuple[float, ...], float]]:
    """Steps of many kinds and what they took."""
    chance = random.Random(seed)
    steps = []
    for _ in range(count):
        sequences = chance.randint(1, 64)
        features = (1.0, float(sequences), float(sequences + chance.randint(0, 256)))
        seconds = sum(a * b for a, b in zip(features, coefficients, strict=True))
        steps.append((features, seconds * (1 + chance.uniform(-noise, noise))))
    return steps


def twin(steps: Sequence[tuple[tuple[float, ...], float]], memory: float, prior: Sequence[float]) -> NDArray[np.float64]:
    """The same least squares by scipy: rows of relative errors, fading, and the prior as rows of its own."""
    features = np.array([step[0] for step in steps])
    seconds = np.array([step[1] for step in steps])
    weights = (1 - 1 / memory) ** (np.arange(len(steps))[::-1] / 2) / seconds
    pulls = np.sqrt(1e-3 * np.maximum((features * weights[:, None]) ** 2, 0.0).sum(axis=0))
    rows = np.vstack([features * weights[:, None], np.diag(pulls)])
    found, _ = nnls(rows, np.concatenate([seconds * weights, pulls * np.array(prior)]))
    return np.asarray(found)


def scaled(prior: Sequence[float], steps: Sequence[tuple[tuple[float, ...], float]]) -> list[float]:
    """The prior after the first four measurements: in the scale that is their geometric mean, each against the last guess."""
    found = list(prior)
    for number, (features, seconds) in enumerate(steps[:4], start=1):
        share = (seconds / sum(a * b for a, b in zip(features, found, strict=True))) ** (1 / number)
        found = [value * share for value in found]
    return found


@settings(max_examples=60)
@given(
    coefficients=st.tuples(st.floats(1e-4, 1e-1), st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-3)),
    seed=st.integers(0, 10**6),
    count=st.integers(5, 120),
)
def test_the_fit_is_weighted_nonnegative_least_squares(coefficients: tuple[float, ...], seed: int, count: int) -> None:
    steps = measured(coefficients, count, seed, noise=0.1)
    fit = FadingFit(PRIOR, memory=50)
    for features, seconds in steps:
        fit.add(features, seconds)
    expected = twin(steps, 50, scaled(PRIOR, steps))
    predicted = [float(np.dot(features, fit.coefficients)) for features, _ in steps]
    wanted = [float(np.dot(features, expected)) for features, _ in steps]
    assert min(fit.coefficients) >= 0
    if expected.min() > 0:
        assert fit.coefficients == pytest.approx(expected, rel=1e-5), "inside the quadrant there is one solution"
    # On its edge the rule (drop what is negative, solve again) may leave out one coefficient too many; it predicts as well.
    assert predicted == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("law", [GPU, CPU], ids=["gpu", "cpu"])
def test_known_laws_are_recovered_from_steps_of_many_kinds(law: StepCost) -> None:
    chance = random.Random(3)
    fit = StepCostFit(law)
    for _ in range(400):
        sequences = chance.choice((1, 2, 4, 8, 16, 32, 64))
        nodes, context = sequences * chance.randint(0, 8), chance.randint(16, 2000)
        kv_tokens, draft_kv_tokens = sequences * context, nodes * context
        seconds = law.at(sequences=sequences, rows=sequences + nodes, kv_tokens=kv_tokens + law.kv_reread * draft_kv_tokens)
        fit.add(
            sequences=sequences,
            rows=sequences + nodes,
            kv_tokens=kv_tokens,
            draft_kv_tokens=draft_kv_tokens,
            seconds=seconds * chance.uniform(0.98, 1.02),
        )
    assert fit.cost.constant_s == pytest.approx(law.constant_s, rel=0.03)
    assert fit.cost.per_row_s == pytest.approx(law.per_row_s, rel=0.05)
    assert fit.cost.per_kv_token_s == pytest.approx(law.per_kv_token_s, rel=0.05)
    assert fit.cost.per_sequence_s == pytest.approx(law.per_sequence_s, abs=4e-6)
    assert (fit.cost.row_multiple, fit.cost.kv_reread) == (law.row_multiple, law.kv_reread)


def test_passes_are_recovered() -> None:
    law = PassCost(2e-4, 1.2e-3, 3e-5)
    chance = random.Random(5)
    fit = PassCostFit()
    for _ in range(200):
        passes = chance.randint(1, 8)
        rows = passes * chance.randint(1, 64)
        fit.add(passes=passes, rows=rows, seconds=law.at(passes=passes, rows=rows) * chance.uniform(0.98, 1.02))
    assert fit.cost.per_pass_s == pytest.approx(law.per_pass_s, rel=0.03)
    assert fit.cost.per_row_s == pytest.approx(law.per_row_s, rel=0.03)


def test_the_prior_decides_what_steps_that_are_all_alike_leave_open() -> None:
    fit = FadingFit(PRIOR, memory=100)
    for _ in range(50):
        fit.add((1.0, 8.0, 8.0), 0.014)
    constant, per_sequence, per_row = fit.coefficients
    assert constant + 8 * per_sequence + 8 * per_row == pytest.approx(0.014, rel=1e-3)
    assert per_sequence / constant == pytest.approx(0.02, rel=0.05)
    assert per_row / constant == pytest.approx(0.03, rel=0.05)


def test_before_drafts_were_verified_a_row_is_expected_to_be_cheap() -> None:
    """What looks too expensive is never tried: the other way round one step corrects it."""
    for load in (1, 8, 64):
        fit = StepCostFit(UNKNOWN)
        for _ in range(100):
            seconds = GPU.at(sequences=load, rows=load, kv_tokens=load * 300)
            fit.add(sequences=load, rows=load, kv_tokens=load * 300, draft_kv_tokens=0, seconds=seconds)
        plain_s = GPU.at(sequences=load, rows=load, kv_tokens=load * 300)
        assert fit.cost.per_row_s * load / plain_s < 0.25, "a draft would have to be right more often than every fourth time"
        rows = 3 * load
        fit.add(
            sequences=load,
            rows=rows,
            kv_tokens=load * 300,
            draft_kv_tokens=2 * load * 300,
            seconds=GPU.at(sequences=load, rows=rows, kv_tokens=3 * load * 300),
        )
        predicted = fit.cost.at(sequences=load, rows=rows, kv_tokens=3 * load * 300)
        assert predicted == pytest.approx(GPU.at(sequences=load, rows=rows, kv_tokens=3 * load * 300), rel=0.1)


def test_an_outlier_is_held_back() -> None:
    steps = measured((7e-3, 1e-5, 2e-5), 100, seed=1)
    fit = FadingFit(PRIOR, memory=100)
    for features, seconds in steps:
        fit.add(features, seconds)
    before = float(np.dot((1.0, 32.0, 64.0), fit.coefficients))
    fit.add((1.0, 32.0, 64.0), 1000 * before)
    assert float(np.dot((1.0, 32.0, 64.0), fit.coefficients)) == pytest.approx(before, rel=0.05)


def test_the_first_measurements_set_the_scale() -> None:
    for scale in (1e-6, 1e-2, 10.0):
        fit = FadingFit(PRIOR, memory=100)
        fit.add((1.0, 4.0, 4.0), scale)
        assert float(np.dot((1.0, 4.0, 4.0), fit.coefficients)) == pytest.approx(scale, rel=1e-6)


def test_a_changed_machine_is_learned_anew() -> None:
    fit = FadingFit(PRIOR, memory=40)
    for features, seconds in measured((7e-3, 1e-5, 2e-5), 200, seed=1):
        fit.add(features, seconds)
    for features, seconds in measured((14e-3, 1e-5, 9e-5), 200, seed=2):
        fit.add(features, seconds)
    assert fit.coefficients == pytest.approx([14e-3, 1e-5, 9e-5], rel=0.1, abs=4e-6)


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.tuples(st.just(1.0), st.floats(0, 64), st.floats(0, 512)), st.floats(1e-6, 10.0)), min_size=1, max_size=40
    )
)
def test_no_coefficient_is_ever_negative(steps: list[tuple[tuple[float, ...], float]]) -> None:
    fit = FadingFit(PRIOR, memory=20)
    for features, seconds in steps:
        fit.add(features, seconds)
        assert min(fit.coefficients) >= 0
        assert all(np.isfinite(fit.coefficients))
    assert max(fit.coefficients) > 0


def test_features_that_are_always_zero_do_no_harm() -> None:
    fit = FadingFit(PRIOR, memory=20)
    for _ in range(30):
        fit.add((1.0, 0.0, 0.0), 0.01)
    assert fit.coefficients[0] == pytest.approx(0.01, rel=1e-3)
    assert all(np.isfinite(fit.coefficients))


def test_rows_are_padded() -> None:
    seconds = [CPU.at(sequences=1, rows=rows, kv_tokens=0) for rows in range(1, 10)]
    assert seconds[0] == seconds[3] < seconds[4] == seconds[7] < seconds[8]
    assert seconds[4] - seconds[3] == pytest.approx(4 * CPU.per_row_s)
    assert GPU.at(sequences=1, rows=1.5, kv_tokens=0) - GPU.at(sequences=1, rows=1, kv_tokens=0) == pytest.approx(0.5 * 21e-6), (
        "rows may be expected ones"
    )
    assert GPU.at(sequences=1, rows=2, kv_tokens=0) - GPU.at(sequences=1, rows=1, kv_tokens=0) == pytest.approx(21e-6)


def test_context_of_a_drafts_row_is_charged_as_far_as_it_is_read_again() -> None:
    assert CPU.per_draft_kv_token_s == pytest.approx(0.3 * 2e-7)
    assert StepCost(1.0, 0.0, 0.0, 1.0, kv_reread=0.0).per_draft_kv_token_s == 0.0
    with pytest.raises(AssertionError):
        StepCost(1.0, 0.0, 0.0, 1.0, kv_reread=1.5)
    with pytest.raises(AssertionError):
        StepCost(-1.0, 0.0, 0.0, 1.0)
