"""What a step of the target takes, and what drafting takes: laws of a few coefficients, and how they are learned from real steps.

A step reads the weights once (constant), handles sequences (scheduling, tokens out), computes rows and reads keys and values. All
but the second are TurboSpec's features (Liu et al., arXiv 2406.14066), and without the second a draft's row would be charged with
what only sequences cost. The coefficients of one machine are fitted while it serves: least squares over recent steps, older ones
fading, none below zero. Knows no sequences and no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Final

_SETTLED = 4
"""Measurements after which surprises are held back."""
_MOST_SURPRISE = 4.0
"""A measurement counts as so many times what was expected, at most."""
_PRIOR_WEIGHT = 1e-3
"""Of the prior against all measurements together."""
_REFITTED_ALWAYS = 64
"""Measurements until which each one is followed by a fit; then there is one every `_REFIT_STEPS`."""
_REFIT_STEPS = 4


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step of the target."""

    constant_s: float
    per_sequence_s: float
    per_row_s: float
    """A row is one token that the step computes."""
    per_kv_token_s: float
    """Per token of context that a row reads, summed over rows."""
    row_multiple: int = 1
    """Rows are computed in multiples of this: the step is padded."""
    kv_reread: float = 1.0
    """What reading the context of a sequence costs each row after its first, as a share of what it costs the first. 0 where a
    kernel reads it once for all rows of a sequence; between where caches help."""
    doubling_steps: int = 0
    """Rows are rounded up to so many numbers per power of two as well (2: 1, 2, 3, 4, 6, 8, 12, ...), as on a GPU that has recorded
    its steps; 0: to multiples alone."""

    def __post_init__(self) -> None:
        assert min(self.constant_s, self.per_sequence_s, self.per_row_s, self.per_kv_token_s) >= 0
        assert self.row_multiple >= 1 and 0 <= self.kv_reread <= 1

    def computed_rows(self, rows: float) -> float:
        """With padding."""
        step = float(self.row_multiple)
        if self.doubling_steps and rows > 1:
            step = max(step, 2.0 ** ceil(log2(rows)) / (2 * self.doubling_steps))
        return rows if step == 1.0 else ceil(rows / step) * step  # on average rows may be parts of rows

    def has_padding(self, rows: float) -> bool:
        """Whether a step of so many rows has room for one more that costs nothing."""
        return self.computed_rows(rows) > rows

    @property
    def per_draft_kv_token_s(self) -> float:
        """Per token of context that a draft's row reads."""
        return self.per_kv_token_s * self.kv_reread

    def at(self, *, sequences: float, rows: float, kv_tokens: float) -> float:
        """A step of so many sequences and rows; `kv_tokens`: context that is read, a row's after its sequence's first as far as
        `kv_reread` says."""
        computed = self.computed_rows(rows)
        return self.constant_s + sequences * self.per_sequence_s + computed * self.per_row_s + kv_tokens * self.per_kv_token_s


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds of drafting for a batch, by the work that it takes."""

    constant_s: float
    per_pass_s: float
    """Per forward pass of the draft model; a drafter without a model makes none."""
    per_row_s: float
    """Per row of its passes; without a model, per sequence."""

    def at(self, *, passes: float, rows: float) -> float:
        """So many passes with so many rows in all."""
        return self.constant_s + passes * self.per_pass_s + rows * self.per_row_s


UNKNOWN: Final = StepCost(0.0, 0.0, 0.0, 0.0)
"""A machine without padding, of which no seconds are known."""


class FadingFit:
    """Nonnegative least squares over a stream, in which a measurement fades as later ones come.

    A prior of little weight decides what measurements leave open: coefficients cannot be told apart while every step is alike. In
    plain numbers: a fit is made every few steps of a millisecond, and arrays of four would take longer.
    """

    def __init__(self, prior: Sequence[float], *, memory: float) -> None:
        """Expects `prior` until there is more to go by; its scale is found from the first measurements.

        Args:
            prior: a first guess of the coefficients, in proportion.
            memory: how many measurements weigh in, about.
        """
        self._fading = 1.0 - 1.0 / memory
        self._prior = list(prior)
        self._square = [[0.0] * len(prior) for _ in prior]
        self._product = [0.0] * len(prior)
        self._fitted: list[float] | None = self._prior
        self._measurements = 0

    @property
    def measurements(self) -> int:
        """How many there were."""
        return self._measurements

    @property
    def coefficients(self) -> Sequence[float]:
        """As fitted now."""
        if self._fitted is None:
            self._fitted = self._fit()
        return self._fitted

    def add(self, features: Sequence[float], seconds: float) -> None:
        """One measurement. One far beyond what is expected is held back to a few times it: the machine did something else."""
        if self._measurements < _SETTLED:  # the first ones set the scale of the prior: shares are guessed well, seconds are not
            guessed = _dot(features, self._prior)
            share = (seconds / guessed if guessed > 0 else 1.0) ** (1.0 / (self._measurements + 1))
            self._prior = [value * share for value in self._prior]
        else:
            seconds = min(seconds, _MOST_SURPRISE * _dot(features, self.coefficients))
        weight = 1.0 / max(seconds, 1e-9) ** 2  # relative errors count: steps of all sizes are to be predicted equally well
        for row, feature in enumerate(features):
            of_row, weighted = self._square[row], weight * feature
            for column, other in enumerate(features):
                of_row[column] = of_row[column] * self._fading + weighted * other
            self._product[row] = self._product[row] * self._fading + weighted * seconds
        self._fitted = None
        self._measurements += 1

    def _fit(self) -> list[float]:
        """Solves the normal equations; a coefficient that would be negative is 0, and the others are solved again."""
        most = max(self._square[place][place] for place in range(len(self._prior)))
        pulls = [_PRIOR_WEIGHT * max(self._square[place][place], 1e-12 * most) for place in range(len(self._prior))]
        free = list(range(len(self._prior)))
        while free:
            rows = [
                [*(self._square[row][column] + (pulls[row] if row == column else 0.0) for column in free), self._product[row]]
                for row in free
            ]
            for row, place in zip(rows, free, strict=True):
                row[-1] += pulls[place] * self._prior[place]
            values = _solved(rows)
            if min(values) >= 0:
                break
            free = [place for place, value in zip(free, values, strict=True) if value >= 0]
        found = [0.0] * len(self._prior)
        for place, value in zip(free, values, strict=True):
            found[place] = value
        return found


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _solved(rows: list[list[float]]) -> list[float]:
    """The solution of a system of equations that is symmetric and positive definite, each row with its right side at the end."""
    size = len(rows)
    for pivot in range(size):
        for below in range(pivot + 1, size):
            factor = rows[below][pivot] / rows[pivot][pivot]
            for column in range(pivot, size + 1):
                rows[below][column] -= factor * rows[pivot][column]
    values = [0.0] * size
    for pivot in range(size - 1, -1, -1):
        known = sum(rows[pivot][column] * values[column] for column in range(pivot + 1, size))
        values[pivot] = (rows[pivot][size] - known) / rows[pivot][pivot]
    return values


class StepCostFit:
    """`StepCost` of the machine that runs this, from its steps."""

    def __init__(self, law: StepCost) -> None:
        """`law` says how rows are padded and context is read again; its seconds are not looked at."""
        self._law = law
        # Shares of an ordinary step; the first measurements give them their seconds.
        self._fit = FadingFit((1.0, 0.02, 0.01, 0.000_01), memory=400)
        self._cost: StepCost | None = None

    @property
    def measurements(self) -> int:
        """How many steps were measured."""
        return self._fit.measurements

    @property
    def cost(self) -> StepCost:
        """As fitted now."""
        if self._cost is None:
            constant_s, per_sequence_s, per_row_s, per_kv_token_s = self._fit.coefficients
            self._cost = replace(
                self._law,
                constant_s=constant_s,
                per_sequence_s=per_sequence_s,
                per_row_s=per_row_s,
                per_kv_token_s=per_kv_token_s,
            )
        return self._cost

    def add(self, *, sequences: int, rows: int, kv_tokens: int, draft_kv_tokens: int, seconds: float) -> None:
        """A step without prompts took so long; `draft_kv_tokens`: context that the rows of drafts read, sum over rows."""
        read = kv_tokens + self._law.kv_reread * draft_kv_tokens
        self._fit.add((1.0, sequences, self._law.computed_rows(rows), read), seconds)
        if self._fit.measurements < _REFITTED_ALWAYS or self._fit.measurements % _REFIT_STEPS == 0:
            self._cost = None


class PassCostFit:
    """`PassCost` of one drafter, from its calls."""

    def __init__(self) -> None:
        self._fit = FadingFit((0.1, 1.0, 0.05), memory=200)

    @property
    def measurements(self) -> int:
        """How many calls were measured."""
        return self._fit.measurements

    @property
    def cost(self) -> PassCost:
        """As fitted now; seconds mean nothing before the first measurement."""
        constant_s, per_pass_s, per_row_s = self._fit.coefficients
        return PassCost(constant_s, per_pass_s, per_row_s)

    def add(self, *, passes: int, rows: int, seconds: float) -> None:
        """A call took so long."""
        self._fit.add((1.0, passes, rows), seconds)
