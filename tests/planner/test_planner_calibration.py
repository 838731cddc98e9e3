"""Constants that were planted are found again, whatever little is seen of them, and followed when they drift."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotserve.core.hardware import DeviceType, Link
from spotserve.planner.calibration import LinkSample, Refit, Sample, fit_device, fit_link, predicted_s


def device(flops_per_s: float, memory_bytes_per_s: float, layer_overhead_s: float) -> DeviceType:
    return DeviceType(
        name="d",
        memory_bytes=10**10,
        flops_per_s=flops_per_s,
        memory_bytes_per_s=memory_bytes_per_s,
        layer_overhead_s=layer_overhead_s,
    )


PRIOR = device(1e14, 1e12, 5e-5)
STEP = Sample(flops=1e9, num_bytes=4e8, num_layers=1, seconds=1.0)
"""One decode step of a layer: bound by memory."""
PROMPT = Sample(flops=2e12, num_bytes=4e8, num_layers=1, seconds=1.0)
"""A long prompt: bound by computing."""
NOTHING = Sample(flops=1e3, num_bytes=1e3, num_layers=1, seconds=1.0)
"""A layer that is all overhead."""


def timed(sample: Sample, true: DeviceType, factor: float = 1.0) -> Sample:
    seconds = float(predicted_s([sample], true)[0]) * factor
    return Sample(flops=sample.flops, num_bytes=sample.num_bytes, num_layers=sample.num_layers, seconds=seconds)


def mixed(true: DeviceType, number: int, *, noise: float, seed: int = 0) -> Iterator[Sample]:
    random = np.random.default_rng(seed)
    for _ in range(number):
        flops, num_bytes = 10 ** random.uniform(7, 12.5), 10 ** random.uniform(6, 9)
        shape = Sample(flops=flops, num_bytes=num_bytes, num_layers=int(random.integers(0, 3)), seconds=1.0)
        yield timed(shape, true, float(np.exp(random.normal(0, noise))))


def ratios(found: DeviceType, true: DeviceType) -> list[float]:
    return [
        found.flops_per_s / true.flops_per_s,
        found.memory_bytes_per_s / true.memory_bytes_per_s,
        found.layer_overhead_s / true.layer_overhead_s,
    ]


rates = st.tuples(st.floats(11, 15), st.floats(9.5, 13), st.floats(-6, -3)).map(lambda logs: device(*(10**log for log in logs)))


@settings(deadline=None, max_examples=30)
@given(rates, st.integers(0, 2**16))
def test_planted_constants_are_found_from_far_away(true: DeviceType, seed: int) -> None:
    shapes = [STEP, PROMPT, NOTHING]
    balance = true.flops_per_s / true.memory_bytes_per_s
    shapes += [Sample(flops=4e8 * balance * scale, num_bytes=4e8, num_layers=0, seconds=1.0) for scale in (0.05, 1, 20)]
    random = np.random.default_rng(seed)
    samples = [timed(shape, true, float(np.exp(random.normal(0, 0.02)))) for shape in shapes for _ in range(10)]
    assert ratios(fit_device(samples, PRIOR), true) == pytest.approx([1, 1, 1], rel=0.06)


def test_the_fit_is_as_good_as_the_noise_allows_and_repeatable() -> None:
    true = device(2e14, 1.6e12, 7e-5)
    samples = list(mixed(true, 400, noise=0.08))
    found = fit_device(samples, PRIOR)
    assert ratios(found, true) == pytest.approx([1, 1, 1], rel=0.03)
    assert fit_device(samples, PRIOR) == found
    assert (found.name, found.memory_bytes) == (PRIOR.name, PRIOR.memory_bytes)


def test_a_few_outliers_do_not_count() -> None:
    true = device(2e14, 1.6e12, 7e-5)
    samples = list(mixed(true, 100, noise=0.02))
    disturbed = [timed(sample, true, 30.0) if index % 20 == 0 else sample for index, sample in enumerate(samples)]
    assert ratios(fit_device(disturbed, PRIOR), true) == pytest.approx([1, 1, 1], rel=0.05)


def test_what_is_not_seen_keeps_its_ratio_to_what_is() -> None:
    true = device(1e14, 0.4e12, 5e-5)
    assert fit_device([], PRIOR).flops_per_s == pytest.approx(PRIOR.flops_per_s)
    decoding = [Sample(flops=0, num_bytes=4e8, num_layers=0, seconds=1e-3)] * 20
    found = fit_device(decoding, PRIOR)
    assert found.memory_bytes_per_s == pytest.approx(0.4e12, rel=1e-3)
    assert found.flops_per_s / PRIOR.flops_per_s == pytest.approx(0.4, rel=0.15)
    both = [*decoding, *[Sample(flops=2e12, num_bytes=0, num_layers=0, seconds=0.02)] * 20]
    assert ratios(fit_device(both, PRIOR), true)[:2] == pytest.approx([1, 1], rel=1e-3)


def test_a_device_without_overhead_is_found_to_have_next_to_none() -> None:
    true = device(1e12, 1e10, 0.0)
    samples = [timed(sample, true) for sample in mixed(device(1e12, 1e10, 1e-9), 60, noise=0.0)]
    assert fit_device(samples, PRIOR).layer_overhead_s < 2e-6


@given(st.floats(-6, -3), st.floats(7, 12), st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_a_link_is_found(latency: float, bandwidth: float, seed: int) -> None:
    true = Link(10**latency, 10**bandwidth)
    random = np.random.default_rng(seed)
    sizes = true.latency_s * true.bytes_per_s * np.array([0.01, 0.1, 1, 10, 100] * 8)
    samples = [LinkSample(size, true.seconds(size) * float(np.exp(random.normal(0, 0.02)))) for size in sizes]
    found = fit_link(samples, Link(5e-5, 1e9))
    assert found.latency_s == pytest.approx(true.latency_s, rel=0.05)
    assert found.bytes_per_s == pytest.approx(true.bytes_per_s, rel=0.05)


def test_messages_one_after_the_other_count_their_latency_each() -> None:
    samples = [LinkSample(size, 4 * 1e-5 + size / 1e9, num_messages=4) for size in (1e3, 1e5, 1e7)]
    found = fit_link(samples, Link(1e-4, 1e8))
    assert (found.latency_s, found.bytes_per_s) == pytest.approx((1e-5, 1e9), rel=1e-2)


def test_a_refit_finds_what_the_fit_finds() -> None:
    true = device(2e14, 1.6e12, 7e-5)
    refit = Refit(PRIOR)
    for sample in mixed(true, 600, noise=0.05):
        refit.observe(sample)
    assert ratios(refit.device, true) == pytest.approx([1, 1, 1], rel=0.15)


def test_a_refit_follows_a_drift_within_dozens_of_steps() -> None:
    random = np.random.default_rng(0)
    fast, slow = device(1e14, 1e12, 5e-5), device(1e14, 0.5e12, 5e-5)
    refit = Refit(PRIOR)
    for true in (fast, slow, fast):
        for _ in range(60):
            refit.observe(timed(STEP, true, float(np.exp(random.normal(0, 0.05)))))
        assert predicted_s([STEP], refit.device) == pytest.approx(predicted_s([STEP], true), rel=0.1)


def test_a_refit_that_only_sees_decoding_takes_computing_along() -> None:
    refit = Refit(PRIOR)
    true = device(0.5e14, 0.5e12, 1e-4)
    for _ in range(2000):
        refit.observe(timed(STEP, true))
    assert predicted_s([STEP], refit.device) == pytest.approx(predicted_s([STEP], true), rel=1e-2)
    assert refit.device.flops_per_s == pytest.approx(0.5e14, rel=0.25)
    for _ in range(100):
        refit.observe(timed(PROMPT, device(0.8e14, 0.5e12, 1e-4)))
    assert refit.device.flops_per_s == pytest.approx(0.8e14, rel=0.05), "what is seen at last is believed"


def test_one_step_that_took_forever_is_no_news() -> None:
    refit = Refit(PRIOR)
    for _ in range(200):
        refit.observe(timed(STEP, PRIOR))
    before_s = predicted_s([STEP], refit.device)[0]
    refit.observe(timed(STEP, PRIOR, 1000.0))
    assert predicted_s([STEP], refit.device)[0] < 1.1 * before_s


def test_a_refit_stays_finite_however_long_it_sees_one_shape() -> None:
    refit = Refit(PRIOR, memory_steps=50)
    for _ in range(3000):
        refit.observe(timed(STEP, PRIOR, 1.5))
    assert np.linalg.eigvalsh(refit._prior_covariance - refit._covariance).min() >= -1e-9, "never less certain than at first"
    assert predicted_s([STEP], refit.device) == pytest.approx(1.5 * predicted_s([STEP], PRIOR), rel=0.05)
    refit.observe(timed(PROMPT, PRIOR))
    assert all(0.2 < ratio < 5 for ratio in ratios(refit.device, PRIOR))
