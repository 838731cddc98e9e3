"""Did interruptions change an answer? Compares a run's tokens with those of the same requests, undisturbed.

A request's output is a pure function of weights, prompt, sampling parameters and seed, up to float rounding: another batch
shape may flip a choice between two tokens that were as good as equal. Such a *tie flip* is told from an *altered* answer by
the gap at the first position that differs: by how much the chosen token led the runner-up. What follows the first difference
says nothing, for it has another context. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from spotserve.core.ties import near_tie_gap
from spotserve.replay.record import RequestRecord


class Verdict(Enum):
    """What became of one answer."""

    EQUAL = "equal"
    TIE_FLIP = "tie_flip"
    """The first difference is a choice between two tokens that were as good as equal."""
    ALTERED = "altered"
    LOST = "lost"
    """No whole answer came."""
    UNKNOWN = "unknown"
    """No whole reference answer came."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One request's answer against its reference."""

    index: int
    verdict: Verdict
    position: int | None = None
    """First output position that differs; None: none does."""
    gap: float | None = None
    """The smaller of both runs' gaps at that position; None: no run said one."""
    tokens_altered: int = 0
    """Positions that differ, or that one answer lacks, in an altered answer."""


def compare_runs(run: Sequence[RequestRecord], reference: Sequence[RequestRecord], *, dtype: str) -> tuple[Comparison, ...]:
    """One comparison per request of `run`, matched by the timeline's index; `dtype`: what the engine computes in."""
    known: Mapping[int, RequestRecord] = {record.arrival.index: record for record in reference}
    return tuple(_compare(record, known.get(record.arrival.index), near_tie_gap(dtype)) for record in run)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """First position at which the sequences differ, the end of the shorter one included; None: they are equal."""
    for position, (token, other_token) in enumerate(zip(one, other, strict=False)):
        if token != other_token:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


def _compare(record: RequestRecord, reference: RequestRecord | None, tie_gap: float) -> Comparison:
    index = record.arrival.index
    if reference is None or not reference.complete:
        return Comparison(index, Verdict.UNKNOWN if record.complete else Verdict.LOST)
    expected = reference.token_ids
    if not record.complete:
        # A lost answer is judged by what came of it: a client may have used that.
        expected = expected[: len(record.token_ids)]
    position = first_difference(record.token_ids, expected)
    if position is None:
        return Comparison(index, Verdict.EQUAL if record.complete else Verdict.LOST)
    gaps = [gaps[position] for gaps in (record.gaps, reference.gaps) if position < len(gaps)]
    gap = min(gaps, default=None)
    is_tie = gap is not None and gap <= tie_gap
    verdict = Verdict.TIE_FLIP if is_tie else Verdict.ALTERED
    altered = sum(a != b for a, b in zip(record.token_ids, expected, strict=False)) + abs(len(record.token_ids) - len(expected))
    return Comparison(index, verdict if record.complete else Verdict.LOST, position, gap, 0 if is_tie else altered)
