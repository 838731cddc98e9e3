"""How long the slices of a prompt should be that flows through a pipeline of stages.

A token depends on earlier ones only, so slices of one prompt follow each other through P stages (TeraPipe, ICML'21, arXiv
2102.07988). Stages that take equal time make a proportionate flow shop: slices of times t_1 .. t_m are through after exactly
sum(t_i) + (P - 1) * max(t_i), in whatever order. Many slices pay their constant cost often, few leave stages idle.

The cost of a slice counts every pair of a token and one it attends to, those within the slice included. Then the sum over a
prompt depends on the number m of slices alone, m * constant + work, and the best m slices take equal time, constant + work / m
each: later slices are shorter, since their context is longer. That leaves m * constant + (P - 1) * work / m to be minimised:
`choose_chunk` rounds m = sqrt((P - 1) * work / constant). `best_chunks` is the exact dynamic program that it is held against.

Pure: same arguments, same answer. Knows costs and lengths; no sequences.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf, sqrt

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SliceCost:
    """Time of one slice on one stage."""

    constant_s: float
    """Of any slice: reading the weights, launching kernels, handing over to the next stage."""
    token_s: float
    """Per token."""
    pair_s: float
    """Per pair of a token and one that it attends to, itself included."""

    def __post_init__(self) -> None:
        assert min(self.constant_s, self.token_s, self.pair_s) >= 0 and self.token_s + self.pair_s > 0

    def work_s(self, tokens: int, context: int) -> float:
        """What `tokens` after `context` others cost in however many slices, but for the constant of each."""
        return self.token_s * tokens + self.pair_s * num_pairs(tokens, context)

    def seconds(self, tokens: int, context: int) -> float:
        """Time of a slice of `tokens` after `context` others."""
        return self.constant_s + self.work_s(tokens, context)

    def tokens_within(self, work_s: float, context: int) -> float:
        """How many tokens after `context` others cost `work_s`; the inverse of `work_s`, a fraction."""
        linear = self.token_s + self.pair_s * (context + 0.5)
        return 2 * work_s / (linear + sqrt(linear * linear + 2 * self.pair_s * work_s))


def num_pairs(tokens: float, context: float) -> float:
    """Pairs of one of `tokens` and a token that it attends to: the `context` before them, those before it, and itself."""
    return tokens * (context + (tokens + 1) / 2)


def pipeline_s(cost: SliceCost, lengths: tuple[int, ...], *, num_stages: int, context: int = 0) -> float:
    """Until slices of these lengths, that follow each other after `context` tokens, are through all stages."""
    times = []
    for tokens in lengths:
        times.append(cost.seconds(tokens, context))
        context += tokens
    return sum(times) + (num_stages - 1) * max(times, default=0.0)


def choose_chunk(cost: SliceCost, *, num_stages: int, start: int, position: int, end: int, max_tokens: int) -> int:
    """Length of the slice at `position` when the tokens [start, end) are to go through `num_stages` stages.

    The tokens before `position` are taken to have been slices of the same prompt: asked again after each slice, this goes on with
    one plan. (To plan the rest anew would shorten its slices each time and end with twice as many.) Within 3 % of the shortest
    time, whatever P, length and cost, as long as a single token costs less than that. A few microseconds.

    Args:
        cost: of a slice on the slowest stage.
        num_stages: P.
        start: context that was there before the first slice.
        position: where the slice begins.
        end: where the last slice ends.
        max_tokens: the longest slice.

    Returns:
        At least 1, at most `max_tokens`; not past `end`.
    """
    assert start <= position < end and max_tokens >= 1 and num_stages >= 1
    work_s = cost.work_s(end - start, start)
    num_slices = min(_num_slices(cost.constant_s, work_s, num_stages), end - start)
    tokens = ceil(cost.tokens_within(work_s / num_slices, position) - 1e-9)  # up: one slice more would cost a constant
    return max(1, min(tokens, max_tokens, end - position))


def _num_slices(constant_s: float, work_s: float, num_stages: int) -> int:
    """The m that makes m * constant + (P - 1) * work / m smallest: of the two next to the minimum of this convex function."""
    if num_stages == 1:
        return 1
    if constant_s * 1e12 <= work_s:  # slices are free
        return 10**9
    best = sqrt((num_stages - 1) * work_s / constant_s)
    low = max(1, int(best))
    return min((low, low + 1), key=lambda m: m * constant_s + (num_stages - 1) * work_s / m)


def best_chunks(
    cost: SliceCost, *, num_stages: int, tokens: int, context: int = 0, grain: int = 1, max_tokens: int | None = None
) -> tuple[int, ...]:
    """Slices of the shortest `pipeline_s`, exact where slices end at multiples of `grain`: the oracle, too slow to serve with.

    TeraPipe's dynamic program: for every time that a slice can take, as the longest allowed, the smallest sum of times. The
    candidates are the exact times: rounded down, they would make the optimum infeasible.

    Args:
        cost: of a slice on the slowest stage.
        num_stages: P.
        tokens: length of the prompt.
        context: tokens that are there before it.
        grain: slices are multiples of so many tokens, but for the last.
        max_tokens: the longest slice; None: any.
    """
    assert tokens >= 1 and grain >= 1 and (max_tokens is None or max_tokens >= grain)
    ends = np.array([*range(0, tokens, grain), tokens], dtype=np.float64)
    lengths = ends[:, None] - ends[None, :]
    pairs = lengths * (context + ends[None, :] + (lengths + 1) / 2)
    times = np.where(lengths > 0, cost.constant_s + cost.token_s * lengths + cost.pair_s * pairs, inf)
    if max_tokens is not None:
        times[lengths > max_tokens] = inf
    shortest_sum, _ = _smallest_sum(times, inf)
    best_s, best = inf, []
    for longest_s in np.unique(times[np.isfinite(times)]):
        if shortest_sum + (num_stages - 1) * longest_s >= best_s:
            break
        total_s, path = _smallest_sum(times, float(longest_s))
        if total_s + (num_stages - 1) * longest_s < best_s:
            best_s, best = total_s + (num_stages - 1) * float(longest_s), path
    return tuple(int(ends[end] - ends[begin]) for begin, end in pairwise(best))


def _smallest_sum(times: Floats, longest_s: float) -> tuple[float, list[int]]:
    """The smallest sum of times[end, begin] along a path from 0 to the last position, none above `longest_s`, and the path."""
    size = len(times)
    allowed = np.where(times <= longest_s, times, inf)
    sums = np.full(size, inf)
    sums[0] = 0.0
    before = np.zeros(size, dtype=np.int64)
    for end in range(1, size):
        through = sums[:end] + allowed[end, :end]
        before[end] = through.argmin()
        sums[end] = through[before[end]]
    if not np.isfinite(sums[-1]):
        return inf, []
    path = [size - 1]
    while path[-1]:
        path.append(int(before[path[-1]]))
    return float(sums[-1]), path[::-1]


class SliceCostFit:
    """A `SliceCost` that follows what steps are seen to take: recursive least squares that forgets.

    One owner, mutable. Coefficients that observations say nothing about stay those of the prior. A step of several sequences is
    one observation: its tokens, and the pairs of all of them.
    """

    def __init__(self, prior: SliceCost, *, forgetting: float = 0.99) -> None:
        assert 0 < forgetting <= 1
        self._scale = np.array([1.0, 1.0 / 256, 1.0 / 2**18])
        self._coefficients = np.array([prior.constant_s, prior.token_s, prior.pair_s]) / self._scale
        self._covariance = np.eye(3) * 100.0
        self._forgetting = forgetting

    @property
    def cost(self) -> SliceCost:
        """What is believed now."""
        constant_s, token_s, pair_s = np.maximum(self._coefficients, 0.0) * self._scale
        return SliceCost(float(constant_s), max(float(token_s), 1e-12), float(pair_s))

    def observe(self, *, tokens: int, pairs: float, seconds: float) -> None:
        """A step of so many tokens, with so many pairs (see `num_pairs`), took so long on its slowest stage."""
        features = np.array([1.0, tokens, pairs]) * self._scale
        gain = self._covariance @ features
        gain /= self._forgetting + features @ gain
        self._coefficients += gain * (seconds - features @ self._coefficients)
        covariance = (self._covariance - np.outer(gain, features @ self._covariance)) / self._forgetting
        self._covariance = covariance * min(1.0, 300.0 / np.trace(covariance))  # what is never seen must not grow without bound
