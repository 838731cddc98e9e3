"""A request below the gateway: token ids in, token ids out, one sequence.

The gateway turns one call with n choices into n of these. The output of a `Request` is a pure function of the weights, the
prompt, the sampling parameters and the seed; everything that moves, resumes or speculates relies on that.
"""

from enum import Enum

import msgspec


class FinishReason(Enum):
    """Why a sequence ended. The values of the first two are those of the OpenAI API."""

    STOP = "stop"
    """The end-of-text token, one of `stop_token_ids`, or (said by the gateway) a stop string."""
    LENGTH = "length"
    """`max_tokens` were made, or the model's context is full."""
    CANCELLED = "cancelled"
    """The client left or withdrew the request."""
    FAILED = "failed"
    """The request could not be served; the delta's `error` says why."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Ranges are those of the OpenAI API and vLLM; the gateway checks them."""

    max_tokens: int
    """Upper bound on output tokens, at least 1."""
    seed: int = 0
    """Key of the noise, any 64-bit unsigned integer."""
    temperature: float = 1.0
    """0: greedy, no noise."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1: keep all."""
    top_k: int = 0
    """Keep the k most probable tokens; 0: keep all."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one; 0: keep all."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that occurs in the output so far."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each time it occurs in the output so far."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occur in prompt or output; 1: off."""
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    """Added to the logit of a token id."""
    min_tokens: int = 0
    """No end-of-text and no stop id before this many output tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the sequence; the id itself is part of the output, as end-of-text is."""
    ignore_eos: bool = False
    """Go on past the model's end-of-text token (load tests of fixed length)."""
    logprobs: int | None = None
    """None: none; k: the chosen token's log-probability and those of the k most probable tokens, at temperature 1 and before
    penalties and truncation."""
    gaps: bool = False
    """Report by how much each chosen token led the runner-up in perturbed log-probability (what tells a near tie)."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to be generated."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float = 0.0
    """When the gateway accepted it, seconds since the Unix epoch."""
    priority: int = 0
    """Requests of a lower number are served first, as in vLLM; it orders requests and never changes an answer."""

    def __post_init__(self) -> None:
        assert self.request_id and self.prompt_token_ids and self.sampling.max_tokens >= 1


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a chosen token, and of the most probable tokens at its position, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Some consecutive output tokens of one sequence, and perhaps its end.

    `position` is the output position of the first token (0 = first token after the prompt). Deltas of one sequence may
    repeat positions, never contradict each other; a reader keeps what extends its prefix.
    """

    request_id: str
    epoch: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token when `SamplingParams.logprobs` was asked."""
    gaps: tuple[float, ...] | None = None
    """One per token when `SamplingParams.gaps` was asked."""
    finish_reason: FinishReason | None = None
    """None: more will come."""
    error: str | None = None
    """What went wrong when `finish_reason` is FAILED."""
    recomputed_tokens: int = 0
    """Tokens that had been computed before an interruption and were computed again; reported once per resume."""
    cached_tokens: int = 0
    """Tokens whose KV was found in a prefix cache; reported once per admission to a batch."""
    draft_tokens: int = 0
    """Draft tokens verified for these tokens."""
    accepted_tokens: int = 0
    """How many of the draft tokens were accepted."""
    drafter: str = ""
    """Name of the drafter that most of these draft tokens came from; empty: nothing was drafted."""

    @property
    def end_position(self) -> int:
        """Position after the last token."""
        return self.position + len(self.token_ids)
