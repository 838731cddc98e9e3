"""How sure a number is: intervals over the repeats of a replay, and of the difference between two policies.

Repeats differ by their seed alone, and two policies of one study play the same seeds: what is compared are pairs, whose common
luck cancels. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, log, sqrt
from statistics import fmean, stdev

from spotserve.replay.summary import Summary

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
          2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
"""Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom."""
_Z_975 = 1.960
_LARGEST_LOG = 700.0
"""Of a number that floats have."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over repeats, and where it is with 95 % confidence."""

    mean: float
    low: float
    high: float
    repeats: int

    @property
    def half_width(self) -> float:
        """From the mean to either end; of an interval that is not symmetric, the mean of both."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is there, at this confidence."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Contrast:
    """One number of two policies on the same repeats."""

    difference: Interval
    """Second less first."""
    ratio: Interval | None
    """Second over first, by the mean of logarithms; None: one of them is not above 0 in some repeat."""


def student_t(degrees: int) -> float:
    """The factor of a two-sided 95 % interval. Beyond the table by the first term of Cornish and Fisher."""
    assert degrees >= 1
    return _T_975[degrees - 1] if degrees <= len(_T_975) else _Z_975 + (_Z_975**3 + _Z_975) / (4 * degrees)


def interval(values: Sequence[float]) -> Interval:
    """Mean ± t s / sqrt(n) (Student). Of one value: the whole line, for nothing is known of its spread."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, -inf, inf, len(values))
    half = student_t(len(values) - 1) * stdev(values) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def contrast(first: Sequence[float], second: Sequence[float]) -> Contrast:
    """What the second has more than the first, repeat by repeat; both in the order of repeats.

    Difference: Student's interval of the pairs' differences. Ratio: of the pairs' logarithms, taken back.
    """
    pairs = list(zip(first, second, strict=True))
    difference = interval([b - a for a, b in pairs])
    if min(min(pair) for pair in pairs) <= 0:
        return Contrast(difference, None)
    logs = interval([log(b / a) for a, b in pairs])
    return Contrast(difference, Interval(exp(logs.mean), exp(logs.low), exp(min(logs.high, _LARGEST_LOG)), logs.repeats))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float] | None:
    """Of ours over theirs, run by run: mean by logarithms, and both ends of its interval, which are the mean where there was one
    run. Runs in which one of them is not above 0 are left out; None: no run is left."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a > 0 and b > 0]
    if not pairs:
        return None
    logs = interval([log(a / b) for a, b in pairs])
    low, high = (logs.mean, logs.mean) if len(pairs) == 1 else (logs.low, logs.high)
    return exp(logs.mean), exp(low), exp(min(high, _LARGEST_LOG))


def runs_needed(values: Sequence[float], *, half_width_share: float) -> int:
    """How many runs it takes until the 95 % interval of the mean is this narrow, as a share of the mean.

    n >= (1.96 CV / h)², as in the analysis of DAWNBench (Coleman et al., 2019), with the coefficient of variation of the values at
    hand; at least as many as there are degrees of freedom to have an interval at all.
    """
    mean = fmean(values)
    if len(values) < 2 or mean == 0:
        return 2
    return max(2, ceil((_Z_975 * abs(stdev(values) / mean) / half_width_share) ** 2 * (1 - 1e-12)))


def over_repeats(summaries: Sequence[Summary]) -> dict[str, Interval]:
    """Each number of a policy over its repeats; those that some repeat lacks are left out."""
    known = [key for key in summaries[0] if all(summary.get(key) is not None for summary in summaries)]
    return {key: interval([float(summary[key] or 0.0) for summary in summaries]) for key in known}


def means(summaries: Sequence[Summary]) -> Summary:
    """One summary for several repeats: of each number the mean over those that have it. Of one repeat: itself."""
    if len(summaries) == 1:
        return dict(summaries[0])
    found: Summary = {}
    for key in summaries[0]:
        values = [value for summary in summaries if (value := summary.get(key)) is not None]
        found[key] = fmean(values) if values else None
    return found


def as_json(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    """For a file."""
    return {
        key: {"mean": each.mean, "low": each.low, "high": each.high, "repeats": each.repeats} for key, each in intervals.items()
    }
