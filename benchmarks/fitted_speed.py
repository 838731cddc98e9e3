"""How fast a replica of a local cluster is, by a few constants: for `fidelity.py`.

`profile` has those of the engine alone, from its own steps. What a cluster adds (client, gateway and other workers on the same
cores, tokens that are committed and sent) is fitted to what clients of one saw: `fit_speed`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log, sqrt
from statistics import median
from typing import TypeAlias

import numpy as np
from scipy.optimize import minimize, nnls

from spotserve.config import EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.engine import Engine
from spotserve.engine.measure import lone_engine
from spotserve.replay.outcome import Replayed
from spotserve.replay.record import RunRecord
from spotserve.replay.timeline import Timeline

PROFILED_PROMPTS = (64, 128, 256, 400, 600, 800)
PROFILED_BATCHES = (1, 2, 4, 8, 16, 32)
NEW_TOKENS = 24
_OUTLIER = 0.1
"""Errors much larger count by their size, not by its square: what disturbed the machine for a moment is no speed."""


@dataclass(frozen=True)
class FittedSpeed:
    """A `ReplicaSpeed`; times in seconds."""

    batches_s: tuple[float, ...]
    """A step of `PROFILED_BATCHES` sequences without their context; between these on straight lines."""
    context_token_s: float
    prompt_token_s: float
    prompt_pair_s: float
    """For each pair of tokens of a prompt: attention."""
    way_s: float = 0.0
    """From a client to the first step, and back."""
    max_batch: int = 32
    kv_tokens: int = 32_768

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """See `ReplicaSpeed`."""
        return float(np.interp(sequences, PROFILED_BATCHES, self.batches_s)) + self.context_token_s * context_tokens

    def prompt_s(self, tokens: float) -> float:
        """See `ReplicaSpeed`."""
        return self.prompt_token_s * tokens + self.prompt_pair_s * tokens**2 / 2

    def first_token_s(self, tokens: float) -> float:
        """See `ReplicaSpeed`."""
        return self.way_s + self.prompt_s(tokens)

    def in_cluster(self, slowdown: float, step_more_s: float, sequence_more_s: float, way_s: float) -> "FittedSpeed":
        """All computing slower by a factor, steps longer by something and something for each sequence, and a way to go."""
        more_s = [step_more_s + sequence_more_s * count for count in PROFILED_BATCHES]
        return replace(
            self,
            batches_s=tuple(slowdown * alone_s + more for alone_s, more in zip(self.batches_s, more_s, strict=True)),
            context_token_s=slowdown * self.context_token_s,
            prompt_token_s=slowdown * self.prompt_token_s,
            prompt_pair_s=slowdown * self.prompt_pair_s,
            way_s=way_s,
        )


Play: TypeAlias = Callable[[Timeline, FittedSpeed], Replayed]


def profile(settings: EngineSettings) -> FittedSpeed:
    """Of the engine alone: least squares over medians of steps, relative errors. Takes a minute."""
    engine = lone_engine(settings)
    _run(engine, 2, 64)  # warms up
    tokens: list[list[float]] = []
    seconds: list[float] = []
    for count, prompt in product(PROFILED_BATCHES, PROFILED_PROMPTS[:4]):
        tokens.append([*(float(count == each) for each in PROFILED_BATCHES), count * (prompt + NEW_TOKENS / 2)])
        seconds.append(median(_run(engine, count, prompt)[1]))
    *batches_s, context_token_s = _least_squares(tokens, seconds)
    prompts = [(float(each), each**2 / 2) for each in PROFILED_PROMPTS]
    prompt_token_s, prompt_pair_s = _least_squares(
        prompts, [median(_run(engine, 1, each)[0] for _ in range(3)) for each in PROFILED_PROMPTS]
    )
    return FittedSpeed(tuple(batches_s), context_token_s, prompt_token_s, prompt_pair_s)


def _run(engine: Engine, count: int, prompt: int) -> tuple[float, list[float]]:
    """So many sequences with prompts so long: seconds that all prompts took, and of each step in which all got a token."""
    sampling = SamplingParams(max_tokens=NEW_TOKENS + 2 * count * (1 + prompt // 256), temperature=0.0, ignore_eos=True)
    for index in range(count):
        ids = tuple((17 + 131 * index + 7 * place * place) % engine.spec.vocabulary_size for place in range(prompt))
        engine.add(Request(request_id=f"{count}-{index}", prompt_token_ids=ids, sampling=sampling))
    prompts_s, steps_s = 0.0, []
    while engine.has_work:
        result = engine.step()
        if result.num_prefill_tokens:
            prompts_s += result.step_s
        elif result.num_decode_tokens == count:
            steps_s.append(result.step_s)
            if len(steps_s) == NEW_TOKENS:
                for index in range(count):
                    engine.cancel(f"{count}-{index}")
    return prompts_s, steps_s


def _least_squares(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    matrix, wanted = np.array(rows), np.array(seconds)
    found, _ = nnls(matrix / wanted[:, None], np.ones(len(wanted)))
    return [float(each) for each in found]


def fit_speed(alone: FittedSpeed, served: Sequence[tuple[Timeline, RunRecord]], play: Play) -> FittedSpeed:
    """How `play` gives each request of these runs the times to first and last token that it had.

    Least sum of a smooth absolute value of the logarithms of simulated / live, by the simplex method of Nelder and Mead.
    """

    def error(constants: Sequence[float]) -> float:
        speed = alone.in_cluster(*(abs(each) for each in constants))
        return sum(_error(play(timeline, speed), run) for timeline, run in served)

    best = minimize(error, (1.1, 0.001, 0.0002, 0.01), method="Nelder-Mead", options={"maxiter": 300, "xatol": 1e-5, "fatol": 1e-3})
    return alone.in_cluster(*(abs(float(each)) for each in best.x))


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
