"""What follows from `findings` at the loads that are asked about: every drafter at every length, and one line of advice per load.

Pure. Knows drafters by name; does not know how anything was measured or is shown.
"""

from collections.abc import Sequence

import msgspec

from spotserve.speculation.advisor import (
    LEAST_SPEEDUP,
    Choice,
    DraftProfile,
    Load,
    StepTimes,
    best_choice,
    break_even_acceptance,
    step_s,
    tokens_per_s,
)
from spotserve.speculation.findings import Findings


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """One drafter at one load."""

    sequences: int
    tokens_per_s: dict[int, float]
    """By length; 0 is without it."""
    best: Choice
    cost_share: float
    """Seconds to draft one token of every sequence over those of a step of the target without drafts (c)."""
    break_even: float | None
    """Acceptance, the same at every depth, above which the best length pays, or the shortest where none does. None: no acceptance
    is enough."""


class DraftPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """One drafter at all loads."""

    name: str
    loads: tuple[Prediction, ...]


class LoadAdvice(msgspec.Struct, frozen=True, kw_only=True):
    """What to do at one load."""

    sequences: int
    name: str | None
    """The drafter; None: off."""
    length: int
    tokens_per_s: float
    speedup: float


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    findings: Findings
    context_tokens: float
    lengths: tuple[int, ...]
    drafts: tuple[DraftPrediction, ...]
    loads: tuple[LoadAdvice, ...]


def advice_for(findings: Findings, *, loads: Sequence[int], lengths: Sequence[int], context_tokens: float | None = None) -> Advice:
    """Predictions for all drafters, loads and lengths.

    Args:
        findings: what was measured.
        loads: numbers of clients at once.
        lengths: of drafts, none longer than was measured; 0 is always among them.
        context_tokens: of each client's sequence; None: as when the drafters were judged.
    """
    context = findings.context_tokens if context_tokens is None else context_tokens
    wanted = tuple(sorted({0, *lengths}))
    profiles = [each.profile for each in findings.drafts]
    drafts = tuple(
        DraftPrediction(name=each.name, loads=tuple(_predict(findings.step, each, Load(n, context), wanted) for n in loads))
        for each in profiles
    )
    lines = tuple(_line(index, sequences, drafts) for index, sequences in enumerate(loads))
    return Advice(findings=findings, context_tokens=context, lengths=wanted, drafts=drafts, loads=lines)


def _predict(target: StepTimes, draft: DraftProfile, load: Load, lengths: tuple[int, ...]) -> Prediction:
    best = best_choice(target, draft, load=load, lengths=lengths)
    longest = lengths[-1]
    judged = best.length or next(iter(lengths[1:]), 0)
    plain_s = step_s(target, draft, length=0, load=load)
    return Prediction(
        sequences=int(load.sequences),
        tokens_per_s={length: tokens_per_s(target, draft, length=length, load=load) for length in lengths},
        best=best,
        cost_share=draft.cost.at(sequences=load.sequences, depth=longest) / max(1, longest) / plain_s,
        break_even=break_even_acceptance(target, draft.cost, length=judged, load=load) if judged else None,
    )


def _line(index: int, sequences: int, drafts: Sequence[DraftPrediction]) -> LoadAdvice:
    best = max(drafts, key=lambda draft: draft.loads[index].best.tokens_per_s)
    choice = best.loads[index].best
    if choice.speedup < LEAST_SPEEDUP:
        plain = best.loads[index].tokens_per_s[0]
        return LoadAdvice(sequences=sequences, name=None, length=0, tokens_per_s=plain, speedup=1.0)
    return LoadAdvice(
        sequences=sequences, name=best.name, length=choice.length, tokens_per_s=choice.tokens_per_s, speedup=choice.speedup
    )
