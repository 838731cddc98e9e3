"""What an engine hands out: values, made of token ids and bytes. No tensors."""

from dataclasses import dataclass

from spotserve.core.request import FinishReason, Request, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutput:
    """What one step gave one sequence: the fields of a `TokenDelta` but its epoch, which the engine does not know."""

    request_id: str
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    gaps: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    recomputed_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One engine step."""

    outputs: tuple[SequenceOutput, ...]
    num_prefill_tokens: int
    num_decode_tokens: int
    """Rows of decoding sequences, draft tokens included."""
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedSequence:
    """A sequence on its way to another engine."""

    request: Request
    output_token_ids: tuple[int, ...]
    computed_tokens: int
    kv: tuple[bytes, ...]
    """Per layer [2, computed_tokens, kv_heads, head_size], contiguous, in `dtype`."""
    dtype: str
