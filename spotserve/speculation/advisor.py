"""Which drafter, how far ahead, or none: what is to be expected of speculation, from what was measured of target and drafter.

The law is that of "Decoding Speculative Decoding" (Yan et al., arXiv 2402.01528), for batches: a step that verifies k drafted
tokens for each of n sequences takes the time to draft them and that of a target step of n (k + 1) rows, and brings each sequence
the tokens that are accepted, and one more. The time of a step is linear in what it holds (as SmartSpec fits it, arXiv 2406.14066),
so batch, length and context decide together; no threshold on one of them can.

These are predictions, made before anything runs: whether a drafter is worth loading, and where to begin. While requests run
`goodput` decides by what happens. Pure arithmetic on seconds and tokens; knows no model, no device and no request.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

LEAST_SPEEDUP: Final = 1.03
"""What a drafter must promise to be loaded: less is within the error of the fit, and memory for nothing."""
_BISECTIONS: Final = 50


class StepTimes(Protocol):
    """Seconds of one step of the target."""

    @property
    def kv_reread(self) -> float:
        """What reading the context of a sequence costs each row after its first, as a share of what it costs the first."""
        ...

    def at(self, *, sequences: float, rows: float, kv_tokens: float) -> float:
        """A step of `rows` tokens of `sequences` sequences; `kv_tokens`: context that is read, by all rows together."""
        ...


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Seconds to draft for one step of the target.

    A model drafts in passes, one per depth; a drafter on the host makes none, and one that guesses all depths at once has only a
    constant.
    """

    constant_s: float
    """Per step, whatever is drafted."""
    per_pass_s: float
    """Per depth, whatever the number of sequences: reading the draft model's weights."""
    per_row_s: float
    """Per token that is asked for."""
    per_sequence_s: float = 0.0
    """Per sequence, whatever the depth: looking up, or catching up with what was accepted."""

    def __post_init__(self) -> None:
        assert min(self.constant_s, self.per_pass_s, self.per_row_s, self.per_sequence_s) >= 0

    def at(self, *, sequences: float, depth: int) -> float:
        """Of a draft of `depth` tokens for each of so many sequences; nothing is drafted in no time."""
        if depth == 0:
            return 0.0
        return self.constant_s + depth * self.per_pass_s + sequences * depth * self.per_row_s + sequences * self.per_sequence_s


@dataclass(frozen=True, slots=True)
class DraftProfile:
    """What a drafter costs, and what it brings with this target."""

    name: str
    cost: DraftCost
    acceptance: tuple[float, ...]
    """By depth, from 1 on: the chance that the target says the token there, given that it said all before it."""
    tokens_by_length: tuple[float, ...] = ()
    """Tokens per step and sequence when 0, 1, 2, ... are drafted, where that was measured; none: by `acceptance`. The two differ:
    a step begins where the last one was wrong, and what is hard to guess comes in clusters."""
    drafted_by_length: tuple[float, ...] = ()
    """Tokens drafted per step and sequence when at most 0, 1, 2, ... may be; none: as many as may be. Look-ups often find none."""

    def __post_init__(self) -> None:
        assert all(0 <= chance <= 1 for chance in self.acceptance)
        assert {len(self.tokens_by_length), len(self.drafted_by_length)} <= {0, len(self.acceptance) + 1}

    @classmethod
    def constant(cls, acceptance: float, *, cost: DraftCost, depth: int, name: str = "") -> "DraftProfile":
        """One whose tokens are all accepted with the same chance."""
        return cls(name, cost, (acceptance,) * depth)

    @property
    def longest(self) -> int:
        """The deepest draft that is known."""
        return len(self.acceptance)

    def tokens(self, length: int) -> float:
        """Tokens that a step brings a sequence, the target's own included."""
        return self.tokens_by_length[length] if self.tokens_by_length else expected_tokens(self.acceptance, length)

    def drafted(self, length: int) -> float:
        """Tokens of it that a step verifies, per sequence."""
        return self.drafted_by_length[length] if self.drafted_by_length else float(length)


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica does at once."""

    sequences: float
    context_tokens: float
    """Of each sequence."""

    def __post_init__(self) -> None:
        assert self.sequences > 0 and self.context_tokens >= 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The best that a drafter can do at a load."""

    length: int
    """Tokens to draft; 0: off."""
    tokens_per_s: float
    """Of all sequences together."""
    speedup: float
    """Over drafting nothing; 1 at least, since that may be chosen."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a drafter should be in memory at all."""

    is_loaded: bool
    length: int
    """Tokens to begin with; 0 when it is not loaded."""
    speedup: float
    """Expected, with the drafter loaded."""
    needed_bytes: int
    """Its weights, and its KV at the load."""
    reason: str


def expected_tokens(acceptance: Sequence[float], length: int) -> float:
    """Tokens per step and sequence when `length` are drafted: 1 + a1 + a1 a2 + ...

    With the same a at every depth this is (1 - a^(k+1)) / (1 - a) (Leviathan et al., ICML'23, equation 1).
    """
    assert 0 <= length <= len(acceptance)
    tokens, survival = 1.0, 1.0
    for chance in acceptance[:length]:
        survival *= chance
        tokens += survival
    return tokens


def step_s(target: StepTimes, draft: DraftProfile, *, length: int, load: Load) -> float:
    """Seconds of drafting and verifying `length` tokens for every sequence."""
    drafted = draft.drafted(length)
    rows, readers = load.sequences * (1 + drafted), load.sequences * (1 + drafted * target.kv_reread)
    verify_s = target.at(sequences=load.sequences, rows=rows, kv_tokens=readers * load.context_tokens)
    return draft.cost.at(sequences=load.sequences, depth=length) + verify_s


def tokens_per_s(target: StepTimes, draft: DraftProfile, *, length: int, load: Load) -> float:
    """Output tokens of all sequences together; length 0 is decoding without a drafter."""
    return load.sequences * draft.tokens(length) / step_s(target, draft, length=length, load=load)


def speedup(target: StepTimes, draft: DraftProfile, *, length: int, load: Load) -> float:
    """Over decoding without a drafter."""
    plain = tokens_per_s(target, draft, length=0, load=load)
    return tokens_per_s(target, draft, length=length, load=load) / plain


def best_choice(target: StepTimes, draft: DraftProfile, *, load: Load, lengths: Iterable[int] | None = None) -> Choice:
    """The length that brings most tokens per second; of equals the shortest.

    Args:
        target: its step times.
        draft: what drafts.
        load: of the replica.
        lengths: those to choose from, beside 0; None: all that are known.
    """
    wanted = range(1, draft.longest + 1) if lengths is None else lengths
    rates = {length: tokens_per_s(target, draft, length=length, load=load) for length in sorted({0, *wanted})}
    best = max(rates, key=lambda length: (rates[length], -length))
    return Choice(best, rates[best], rates[best] / rates[0])


def break_even_acceptance(target: StepTimes, cost: DraftCost, *, length: int, load: Load) -> float | None:
    """The acceptance, the same at every depth, above which drafting `length` tokens pays; None: not even if all are accepted.

    Found by bisection: more acceptance is never slower.
    """
    assert length >= 1

    def pays(acceptance: float) -> bool:
        draft = DraftProfile.constant(acceptance, cost=cost, depth=length)
        return speedup(target, draft, length=length, load=load) >= 1

    if not pays(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


def is_better(*, tokens: float, draft_s: float, than_tokens: float, than_draft_s: float, verify_s: float) -> bool:
    """The published rule between drafters B and A: prefer B if and only if TAR_B / TAR_A > (k t_B + t_v) / (k t_A + t_v).

    Args:
        tokens: that a step brings with B, the target's own included (TAR).
        draft_s: time to draft with B: k t_B.
        than_tokens: with A.
        than_draft_s: with A.
        verify_s: of the target's step, the same with both, as the length is.
    """
    return tokens / than_tokens > (draft_s + verify_s) / (than_draft_s + verify_s)


def worth_loading(
    target: StepTimes,
    draft: DraftProfile,
    *,
    load: Load,
    weight_bytes: int,
    kv_bytes_per_token: int,
    free_bytes: int,
    least_speedup: float = LEAST_SPEEDUP,
) -> Verdict:
    """Whether a drafter earns its memory at the load that is expected.

    Args:
        target: its step times.
        draft: the drafter.
        load: expected.
        weight_bytes: of the drafter; 0 when it needs none.
        kv_bytes_per_token: of the drafter's own cache; 0 when it has none.
        free_bytes: what target and its KV leave.
        least_speedup: what it must promise.
    """
    needed = round(weight_bytes + kv_bytes_per_token * load.sequences * load.context_tokens)
    best = best_choice(target, draft, load=load)
    at = f"at {load.sequences:g} sequences of {load.context_tokens:g} tokens"
    if needed > free_bytes:
        reason = f"needs {_size(needed)} of weights and KV {at}, {_size(free_bytes)} are free"
        return Verdict(False, 0, best.speedup, needed, reason)
    if best.length == 0 or best.speedup < least_speedup:
        return Verdict(False, 0, best.speedup, needed, f"{best.speedup:.2f} x {at}, less than {least_speedup:.2f} x")
    return Verdict(True, best.length, best.speedup, needed, f"{best.speedup:.2f} x {at} with {best.length}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
