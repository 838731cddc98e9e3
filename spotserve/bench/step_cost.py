"""What one step of an engine takes, as `speculation.advisor` wants it: a few constants, fitted to steps of many kinds.

Decoding steps of several batches and contexts say what a sequence and its context cost. Steps of several short prompts say what
further rows of a sequence do, those that go on after a long prefix what reading its context again does. A prompt's row is cheaper
than a draft's: only the last one gets a next token. So the head's share, by its operations, is moved from the sequence to the
row: every row of a draft has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter

import numpy as np
from scipy.optimize import nnls

from spotserve.core.model import ModelSpec
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.batch import ROW_MULTIPLE
from spotserve.engine.engine import Engine
from spotserve.engine.linear import padded_rows
from spotserve.speculation.cost import StepCost

CONTEXT_TOKENS = 256
"""A long context, of whole blocks."""
DECODING = ((1, 16), (2, 16), (4, 16), (8, 16), (16, 16), (32, 16), (1, CONTEXT_TOKENS), (4, CONTEXT_TOKENS), (8, CONTEXT_TOKENS))
"""Sequences, and tokens of each one's context."""
PROMPTS = ((1, 4), (1, 8), (1, 64), (2, 4), (2, 8), (4, 4), (4, 8), (8, 4), (8, 8), (16, 4), (16, 8))
"""Sequences, and tokens of each one's prompt, all in one step."""
EXTENSIONS = ((1, 4), (1, 8), (4, 4), (4, 8), (8, 4), (8, 8))
"""Sequences, and tokens of each one's prompt after a prefix of `CONTEXT_TOKENS` that is in the cache."""
MOST_SEQUENCES = 32
MOST_ROWS = 512
KV_TOKENS = 16_384
"""Room that an engine needs to be measured."""
REPEATS = 7
LEAST_ROUNDS = 3
MEASURING_S = 4.0
"""After so long no further round begins."""
GOOD_FIT = 0.05
"""Mean error at which no further round is needed."""
_PATIENCE_S = 0.7
"""For one kind of step in one round: slow models are measured less often, twice at least."""


@dataclass(frozen=True, slots=True)
class StepKind:
    """What a step holds."""

    sequences: int
    rows: int
    """Of all sequences, without padding."""
    kv_tokens: float
    """Context that is read by the first row of each sequence, summed."""
    kv_tokens_again: float
    """Context that is read by all others."""


@dataclass(frozen=True, slots=True)
class FittedStep:
    """The constants, and how well they say what was measured."""

    cost: StepCost
    error: float
    """Mean of |predicted - measured| / measured."""


def fit(quickest_s: dict[StepKind, float], spec: ModelSpec) -> FittedStep:
    """Least squares of relative errors, with constants that are not negative."""
    kinds = list(quickest_s)
    held = np.array([[1.0, each.sequences, _padded(each.rows), each.kv_tokens, each.kv_tokens_again] for each in kinds])
    seconds = np.array(list(quickest_s.values()))
    constants, _ = nnls(held / seconds[:, None], np.ones(len(kinds)))
    errors = np.abs(held @ constants - seconds) / seconds
    constant_s, per_sequence_s, per_row_s, per_kv_token_s, again_s = map(float, constants)
    head_s = min(per_sequence_s, per_row_s * spec.head_flops_per_token / (spec.num_layers * spec.layer_flops_per_token))
    cost = StepCost(
        constant_s,
        per_sequence_s - head_s,
        per_row_s + head_s,
        per_kv_token_s,
        row_multiple=ROW_MULTIPLE,
        kv_reread=min(1.0, again_s / per_kv_token_s) if per_kv_token_s > 0 else 1.0,
    )
    return FittedStep(cost, float(errors.mean()))


def _padded(rows: int) -> int:
    return -(-padded_rows(rows) // ROW_MULTIPLE) * ROW_MULTIPLE


def measure_step_cost(engine: Engine) -> FittedStep:
    """Measures an idle engine that drafts nothing, keeps prefixes, and has room for the steps above. Seconds for a small model."""
    return _Stopwatch(engine).fitted()


class _Stopwatch:
    """Times steps of one engine. Prompts begin differently each time, so that only meant prefixes are found in the cache."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._prompts = 0

    def fitted(self) -> FittedStep:
        """All kinds of steps, in rounds: a neighbour that disturbs one round may spare the next."""
        longest = self._engine.spec.context_tokens - 2 * REPEATS
        quickest_s: dict[StepKind, float] = {}
        started_s = perf_counter()
        for num_rounds in count(1):
            timed = [self._decoding(sequences, context) for sequences, context in DECODING if context < longest]
            timed += [self._prompting(sequences, tokens) for sequences, tokens in PROMPTS if tokens < longest]
            if longest > CONTEXT_TOKENS:
                timed += [self._extending(sequences, tokens) for sequences, tokens in EXTENSIONS]
            for kind, seconds in timed:
                quickest_s[kind] = min(seconds, quickest_s.get(kind, seconds))
            found = fit(quickest_s, self._engine.spec)
            is_good = num_rounds >= LEAST_ROUNDS and found.error <= GOOD_FIT
            if is_good or perf_counter() - started_s > MEASURING_S:
                break
        return found

    def _decoding(self, sequences: int, context: int) -> tuple[StepKind, float]:
        """Steps that give each of so many sequences a token."""
        prompt_steps = sequences * context // MOST_ROWS + 1
        ids = self._add([self._fresh(context) for _ in range(sequences)], new_tokens=REPEATS + 1 + prompt_steps)
        times: list[float] = []
        started_s = perf_counter()
        while self._engine.has_work and (len(times) < 3 or perf_counter() - started_s < _PATIENCE_S):
            result = self._engine.step()
            if result.num_prefill_tokens == 0 and result.num_decode_tokens == sequences:
                times.append(result.step_s)
        for request_id in ids:
            self._engine.cancel(request_id)
        return StepKind(sequences, sequences, sequences * (context + REPEATS / 2), 0.0), _quick(times)

    def _prompting(self, sequences: int, tokens: int) -> tuple[StepKind, float]:
        """Steps that compute so many whole prompts and the token after each."""
        again = sequences * (tokens - 1) * tokens / 2
        seconds = self._in_one_step(lambda: [self._fresh(tokens) for _ in range(sequences)])
        return StepKind(sequences, sequences * tokens, sequences * tokens, again), seconds

    def _extending(self, sequences: int, tokens: int) -> tuple[StepKind, float]:
        """The same after a long prefix that is in the cache."""
        prefixes = [self._fresh(CONTEXT_TOKENS) for _ in range(sequences)]
        self._add(prefixes, new_tokens=1)
        while self._engine.has_work:
            self._engine.step()
        seconds = self._in_one_step(lambda: [[*prefix, *self._fresh(tokens)] for prefix in prefixes])
        context = sequences * (CONTEXT_TOKENS + tokens / 2)
        return StepKind(sequences, sequences * tokens, context, context * (tokens - 1)), seconds

    def _in_one_step(self, prompts: Callable[[], list[list[int]]]) -> float:
        times: list[float] = []
        started_s = perf_counter()
        while len(times) <= REPEATS and (len(times) < 3 or perf_counter() - started_s < _PATIENCE_S):
            self._add(prompts(), new_tokens=1)
            times.append(self._engine.step().step_s)
            assert not self._engine.has_work, "all prompts fit one step"
        return _quick(times)

    def _fresh(self, tokens: int) -> list[int]:
        """A prompt that begins as no other did."""
        self._prompts += 1
        return [(17 + 131 * self._prompts + 7 * place * place) % self._engine.spec.vocabulary_size for place in range(tokens)]

    def _add(self, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> list[str]:
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        ids = [str(index) for index in range(len(prompts))]
        for request_id, prompt in zip(ids, prompts, strict=True):
            self._engine.add(Request(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=sampling))
        return ids


def _quick(times: Sequence[float]) -> float:
    """The quickest, but for the first, which meets new kernels: whatever else this machine does only adds."""
    return min(times[1:])
