"""From measured times to the constants of devices and links: one fitter for micro-benchmarks, public profiles and live steps.

A device is three numbers (`roofline`): operations per second, bytes per second, overhead per layer. They are fitted as logarithms,
to the logarithm of time: errors are relative, constants stay positive, and a doubling weighs as much as a halving.

What samples say nothing about follows the prior. Both fits share what is believed before anything is seen: that a device is as
the table says up to a factor of its own, and that its constants keep their ratios better than their values. So a machine that is
seen to stream weights at 70 % of its promise is taken to compute at about 70 % as well, until it is seen to compute.

`chunks.SliceCostFit` is for another question: it learns the slices of one stage, whatever they are made of. What is learnt here
holds for every model and every shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from spotserve.core.hardware import DeviceType, Link
from spotserve.planner.roofline import NORM, roofline_s

Floats = npt.NDArray[np.float64]
Predict = Callable[[Floats], tuple[Floats, Floats]]
"""From the logarithms of constants to times, and to the slopes of the logarithms of the times: [samples], [samples, constants]."""

_OUTLIER = 0.1
"""Relative errors beyond it count by their size, not their square: what other work on the machine or a first call does."""
_PRIOR_WEIGHT = 0.02
"""Of the prior, beside a sample with weight 1: a dozen samples overrule it wherever they say anything."""
_COMMON_DEVIATION = 0.7
"""By how much a device may differ from the table as a whole, as a logarithm: by a factor of two."""
_OWN_DEVIATION = 0.25
"""By how much each of its constants may differ besides."""
_SMALLEST_S = 1e-7
"""Stands for no overhead and no latency, which have no logarithm."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A step, or part of one, on one device."""

    flops: float
    num_bytes: float
    """Weights and KV, read and written."""
    num_layers: float
    """How often it met the overhead of a layer; 0 for a bare kernel."""
    seconds: float
    """Of the device alone: without sums over shards and without hops."""

    def __post_init__(self) -> None:
        assert min(self.flops, self.num_bytes, self.num_layers) >= 0 and self.seconds > 0
        assert max(self.flops, self.num_bytes, self.num_layers) > 0


@dataclass(frozen=True, slots=True)
class LinkSample:
    """Messages over a link, one after the other."""

    num_bytes: float
    """Of all of them."""
    seconds: float
    num_messages: float = 1.0

    def __post_init__(self) -> None:
        assert min(self.num_bytes, self.num_messages) >= 0 and max(self.num_bytes, self.num_messages) > 0 and self.seconds > 0


def predicted_s(samples: Sequence[Sample], device: DeviceType) -> Floats:
    """What the samples take on `device`, in seconds."""
    return _steps(_columns(samples), _constants(device))[0]


def fit_device(samples: Sequence[Sample], prior: DeviceType) -> DeviceType:
    """The device that explains the samples with the least relative error; `prior` speaks where they do not.

    Robust (soft absolute errors beyond 10 %) and deterministic; a few milliseconds for a thousand samples.
    """
    columns = _columns(samples)
    start = _constants(prior)
    whiten = np.asarray(np.linalg.inv(_deviations(start.size)), dtype=np.float64)
    best = _fit(lambda constants: _steps(columns, constants), columns[3], start, whiten)
    return _device(prior, best)


def fit_link(samples: Sequence[LinkSample], prior: Link) -> Link:
    """The latency and bandwidth that explain the samples with the least relative error, see `fit_device`."""
    messages, num_bytes, seconds = (
        np.array([(each.num_messages, each.num_bytes, each.seconds) for each in samples]).reshape(-1, 3).T
    )

    def predict(constants: Floats) -> tuple[Floats, Floats]:
        latency_s, bytes_s = messages * exp(constants[0]), num_bytes / exp(constants[1])
        total_s = latency_s + bytes_s
        return total_s, np.stack([latency_s / total_s, -bytes_s / total_s], axis=1)

    start = np.log([max(prior.latency_s, _SMALLEST_S), prior.bytes_per_s])
    best = _fit(predict, seconds, start, np.eye(2) / _COMMON_DEVIATION)
    return Link(latency_s=exp(best[0]), bytes_per_s=exp(best[1]))


class Refit:
    """A `DeviceType` that follows what steps are seen to take. One owner, mutable.

    An extended Kalman filter on the logarithms of the three constants. They drift as an Ornstein-Uhlenbeck process (Uhlenbeck and
    Ornstein, 1930) about the prior, with its deviations: what is seen is followed within a dozen steps, what is not seen goes
    back to the ratio that it has to what is seen, and nothing grows without bound.
    """

    def __init__(self, prior: DeviceType, *, noise: float = 0.1, memory_steps: float = 20_000.0) -> None:
        """`noise`: relative deviation of a step's time that says nothing; `memory_steps`: after so many, what was seen fades."""
        assert noise > 0 and memory_steps > 1
        self._prior = prior
        self._mean = _constants(prior)
        self._prior_mean = self._mean.copy()
        factor = _deviations(self._mean.size)
        self._prior_covariance: Floats = factor @ factor.T
        self._covariance = self._prior_covariance.copy()
        self._noise = noise
        self._keep = exp(-1.0 / memory_steps)

    @property
    def device(self) -> DeviceType:
        """What is believed now."""
        return _device(self._prior, self._mean)

    def observe(self, sample: Sample) -> None:
        """A step took so long. A single one moves belief by three deviations at most."""
        self._fade()
        columns = _columns([sample])
        predicted, slopes = _steps(columns, self._mean)
        slope = slopes[0]
        spread = self._covariance @ slope
        variance = float(slope @ spread) + self._noise**2
        surprise = float(np.log(columns[3][0] / predicted[0]))
        limit = 3.0 * variance**0.5
        self._mean = self._mean + spread / variance * min(max(surprise, -limit), limit)
        self._covariance = self._covariance - np.outer(spread, spread) / variance

    def _fade(self) -> None:
        keep = self._keep
        self._mean = self._prior_mean + keep * (self._mean - self._prior_mean)
        self._covariance = keep**2 * self._covariance + (1 - keep**2) * self._prior_covariance


def _columns(samples: Sequence[Sample]) -> Floats:
    """Operations, bytes, layers, seconds: [4, samples]."""
    rows = [(each.flops, each.num_bytes, each.num_layers, each.seconds) for each in samples]
    return np.array(rows, dtype=np.float64).reshape(-1, 4).T


def _constants(device: DeviceType) -> Floats:
    overhead_s = max(device.layer_overhead_s, _SMALLEST_S)
    constants: Floats = np.log([device.flops_per_s, device.memory_bytes_per_s, overhead_s])
    return constants


def _device(prior: DeviceType, constants: Floats) -> DeviceType:
    flops_per_s, memory_bytes_per_s, overhead_s = (exp(constant) for constant in constants)
    changed = {"flops_per_s": flops_per_s, "memory_bytes_per_s": memory_bytes_per_s, "layer_overhead_s": overhead_s}
    return msgspec.structs.replace(prior, **changed)


def _steps(columns: Floats, constants: Floats) -> tuple[Floats, Floats]:
    """See `Predict`."""
    flops_per_s, memory_bytes_per_s, overhead_s = np.exp(constants)
    compute_s, memory_s, layers_s = columns[0] / flops_per_s, columns[1] / memory_bytes_per_s, columns[2] * overhead_s
    busy_s = roofline_s(compute_s, memory_s)
    total_s = busy_s + layers_s
    scale = np.where(busy_s > 0, np.maximum(busy_s, 1e-300), 1.0) ** (1 - NORM) / total_s
    return total_s, np.stack([-(compute_s**NORM) * scale, -(memory_s**NORM) * scale, layers_s / total_s], axis=1)


def _deviations(size: int) -> Floats:
    """A factor F of the prior's covariance F F': one deviation that all constants share, and one of each."""
    covariance = _COMMON_DEVIATION**2 * np.ones((size, size)) + _OWN_DEVIATION**2 * np.eye(size)
    return np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)


def _fit(predict: Predict, seconds: Floats, start: Floats, whiten: Floats) -> Floats:
    """Least squares of the logarithms, robust, with a weak prior about `start` whose covariance `whiten` turns into the unit."""
    weigh = _PRIOR_WEIGHT * whiten

    def residuals(constants: Floats) -> Floats:
        return np.concatenate([np.log(predict(constants)[0] / seconds), weigh @ (constants - start)])

    def slopes(constants: Floats) -> Floats:
        return np.concatenate([predict(constants)[1], weigh])

    found = least_squares(residuals, start, jac=slopes, loss="soft_l1", f_scale=_OUTLIER, x_scale=1.0)
    best: Floats = found.x
    return best
