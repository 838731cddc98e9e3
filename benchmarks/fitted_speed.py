"""A replica by a few constants, fitted to what clients of a real one saw: for `fidelity.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import TypeAlias

from scipy.optimize import minimize

from spotserve.replay.outcome import Replayed
from spotserve.replay.record import RunRecord
from spotserve.replay.timeline import Timeline

_OUTLIER = 0.1
"""Errors much larger count by their size, not by its square: what disturbed the machine for a moment is no speed."""
_STARTS = ((0.004, 0.001, 1e-7, 0.0002, 0.02), (0.010, 0.0003, 1e-6, 0.0004, 0.01))


@dataclass(frozen=True)
class FittedSpeed:
    """A `ReplicaSpeed`; times in seconds."""

    step_s: float
    sequence_s: float
    context_token_s: float
    prompt_token_s: float
    way_s: float
    """From a client to the first step, and back."""
    max_batch: int = 32
    kv_tokens: int = 32_768

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """See `ReplicaSpeed`."""
        return self.step_s + self.sequence_s * sequences + self.context_token_s * context_tokens

    def prompt_s(self, tokens: float) -> float:
        """See `ReplicaSpeed`."""
        return self.prompt_token_s * tokens

    def first_token_s(self, tokens: float) -> float:
        """See `ReplicaSpeed`."""
        return self.way_s + self.prompt_token_s * tokens


Play: TypeAlias = Callable[[Timeline, FittedSpeed], Replayed]


def fit_speed(served: Sequence[tuple[Timeline, RunRecord]], play: Play) -> FittedSpeed:
    """The constants with which `play` gives each request of these runs the times to first and last token that it had.

    Least sum of a smooth absolute value of the logarithms of simulated / live, by the simplex method of Nelder and Mead.
    """

    def error(constants: Sequence[float]) -> float:
        speed = FittedSpeed(*(abs(each) for each in constants))
        return sum(_error(play(timeline, speed), run) for timeline, run in served)

    tried = [
        minimize(error, start, method="Nelder-Mead", options={"maxiter": 400, "xatol": 1e-6, "fatol": 1e-4}) for start in _STARTS
    ]
    best = min(tried, key=lambda each: float(each.fun))
    return FittedSpeed(*(abs(float(each)) for each in best.x))


def _error(played: Replayed, run: RunRecord) -> float:
    seen = {record.arrival.index: record for record in run.requests if record.complete}
    total = 0.0
    for outcome in played.outcomes:
        record = seen.get(outcome.index)
        if record is not None:
            for simulated_s, live_s in ((outcome.ttft_s, record.ttft_s), (outcome.e2e_s, record.e2e_s)):
                if simulated_s and live_s:
                    total += sqrt(log(simulated_s / live_s) ** 2 + _OUTLIER**2) - _OUTLIER
    return total
