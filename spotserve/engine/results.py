"""What an engine hands out: values, made of token ids and bytes. No tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from spotserve.core.request import FinishReason, Request, TokenLogprob
from spotserve.speculation.acceptance import SequenceAcceptance


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutput:
    """What one step gave one sequence: the fields of a `TokenDelta` but its epoch, which the engine does not know."""

    request_id: str
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    gaps: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    """What went wrong when `finish_reason` is FAILED."""
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    drafter: str = ""
    """Name of the drafter that most of these draft tokens came from; empty: nothing was drafted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One engine step."""

    outputs: tuple[SequenceOutput, ...]
    num_prefill_tokens: int
    num_decode_tokens: int
    """Rows of decoding sequences, draft tokens included."""
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSequence:
    """A sequence on its way to another engine, whose ranks fetch the KV of its first `computed_tokens` tokens."""

    request: Request
    output_token_ids: tuple[int, ...]
    computed_tokens: int
    learned: Mapping[str, SequenceAcceptance] = field(default_factory=dict)
    """What drafters were worth for it, see `speculation.speculator.SequenceState`."""
