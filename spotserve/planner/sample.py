"""A workload as one thousand requests that stand for all: where the planner takes its percentiles from.

A percentile of a sum (waiting, prompt, tokens at the pace of the moment) has no formula that holds from one request per hour to
overload. So the model draws each part by its inverse distribution at the same fixed points, adds, and sorts. The points are a
Korobov lattice: every coordinate takes each of N equal steps once, and any two are spread evenly over the square. Nothing is
random, and a part that grows everywhere makes every percentile grow: latency stays monotone in load.

Pure. Knows lengths; neither replicas nor time.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from spotserve.planner.workload import Lengths

Floats = npt.NDArray[np.float64]

_NUM_KNOTS = 13
_POINTS = 1021
_MULTIPLIER = 331
"""Of a Korobov rule with 1021 points (L'Ecuyer and Lemieux, Management Science 46(9), 2000, table of multipliers)."""


def _coordinate(index: int) -> Floats:
    """The middles of N equal steps of [0, 1], each once, in an order of its own per index."""
    steps = np.arange(_POINTS) * pow(_MULTIPLIER, index, _POINTS) % _POINTS
    return (steps + 0.5) / _POINTS


OCCUPANCY, OUTPUT, PROMPT, PROMPT_WAIT, BOUNDARY = (_coordinate(index) for index in range(5))
"""Shares (N,) of the parts of a request that are independent of each other."""
STALL, CONTEXT = (ndtri(_coordinate(index)) for index in (5, 6))
"""Standard normal (N,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """N equally likely requests, and the moments that queueing needs."""

    prompt: Floats
    """Prompt tokens (N,)."""
    decoded: Floats
    """Tokens after the first (N,), which the prompt itself gives."""
    prompt_knots: Floats
    """A few prompt lengths between the shortest and the longest, ascending."""
    prompt_residual: float
    """Expected tokens of a prompt that is picked by its tokens: of the one that does not fit any more."""
    decoded_mean: float
    decoded_cv2: float
    """Squared coefficient of variation of `decoded`."""
    context_mean: float
    """Tokens that a running sequence holds, seen at a random moment of decoding."""
    context_var: float


@lru_cache(maxsize=64)
def sample(prompt: Lengths, output: Lengths) -> Sample:
    """Requests of these lengths. A request has one token of output at least."""
    prompts = _quantiles(prompt, PROMPT)
    decoded = np.maximum(_quantiles(output, OUTPUT) - 1, 0.0)
    moment1, moment2, moment3 = (float((decoded**power).mean()) for power in (1, 2, 3))
    age, age_square = (moment2 / (2 * moment1), moment3 / (3 * moment1)) if moment1 > 0 else (0.0, 0.0)
    return Sample(
        prompt=prompts,
        decoded=decoded,
        prompt_knots=np.unique(np.quantile(prompts, np.linspace(0, 1, _NUM_KNOTS))),
        prompt_residual=float((prompts * prompts).mean() / prompts.mean()),
        decoded_mean=moment1,
        decoded_cv2=moment2 / moment1**2 - 1 if moment1 > 0 else 0.0,
        context_mean=float(prompts.mean()) + 1 + age,
        context_var=float(prompts.var()) + age_square - age * age,
    )


def _quantiles(lengths: Lengths, shares: Floats) -> Floats:
    at, tokens = zip(*lengths.points, strict=True)
    return np.asarray(np.interp(shares, at, tokens))


def quantile(values: Floats, weights: Floats, share: float) -> float:
    """The value that `share` of the weight does not exceed, linear between the middles of the steps.

    Args:
        values: any order (n,).
        weights: not negative, of positive sum (n,).
        share: in (0, 1).
    """
    order = np.argsort(values)
    ordered = weights[order]
    middles = np.cumsum(ordered) - ordered / 2
    return float(np.interp(share * float(weights.sum()), middles, values[order]))
